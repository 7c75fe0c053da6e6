"""`pip install --no-build-isolation .` in a fresh virtual environment beside an installed torch, offline; the package
then computes from a folder that knows nothing of the source.

    python3 install_test.py SOURCE_DIR BUILD_DIR

Runs in the Python that has torch. The operators are those of the built tree: compiling them again would take minutes.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv

PROGRAM = """
import pathlib, sys, torch, tessera
where = pathlib.Path(tessera.__file__).parent
assert where.is_relative_to(sys.prefix), where
assert (where / "py.typed").exists() and (where / "libtessera_torch.so").exists()
q, k, v = (torch.randn(1, 100, 2, 16, requires_grad=True) for _ in range(3))
p = tessera.patterns.dense(100, 100, block=32)
out = tessera.block_sparse_attention(q, k, v, p)
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
out.sum().backward()
print("right")
"""


def run(*command: object, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("TESSERA_", "PYTHON"))}
    done = subprocess.run([str(c) for c in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=variables | environment, cwd=tempfile.gettempdir())
    if done.returncode != 0:
        sys.exit(f"{command}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def main() -> None:
    source, build = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as scratch:
        # A copy, as pip leaves its traces in the source.
        tree = pathlib.Path(scratch, "tree")
        tree.mkdir()
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
            shutil.copy(source / name, tree)
        shutil.copytree(source / "python", tree / "python", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        fresh = pathlib.Path(scratch, "venv")
        venv.create(fresh, with_pip=True)
        python = fresh / "bin/python"
        run(python, "-m", "pip", "uninstall", "--yes", "setuptools")  # an old one; torch brings what it needs
        packages = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the installed torch
        run(python, "-m", "pip", "install", "--no-build-isolation", "--no-index", tree, TESSERA_BUILD_DIR=str(build))
        printed = run(python, "-c", PROGRAM)
        if printed.strip().splitlines()[-1:] != ["right"]:
            sys.exit(f"the installed package printed:\n{printed}")
        library = next(packages.glob("tessera/*.so"))
        for place in (str(source).encode(), str(build).encode()):
            if place in library.read_bytes():
                sys.exit(f"{library.name} knows {place.decode()}")
    print("installed, imported and right")


if __name__ == "__main__":
    main()
