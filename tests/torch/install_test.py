"""`pip install --no-build-isolation` of the source distribution, and editable of a folder, in a fresh virtual
environment beside an installed torch, offline; the package then computes from a folder that knows nothing of the
source, and goes without a trace.

    python3 install_test.py SOURCE_DIR BUILD_DIR

Runs in the Python that has torch. The operators are those of the built tree: compiling them again would take minutes.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv

BUILT_FROM = ("cli", "cmake", "data", "include", "src", "torch")  # folders without which nothing can be compiled

SDIST = """
import os, sys, scikit_build_core.build
os.chdir(sys.argv[1])
scikit_build_core.build.build_sdist("..")
"""

PROGRAM = """
import pathlib, sys, torch, tessera
where = pathlib.Path(tessera.__file__).parent
assert where == pathlib.Path(sys.argv[1], "tessera"), where
assert (where / "py.typed").exists()
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
    done = subprocess.run(
        [str(c) for c in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables | environment,
        cwd=tempfile.gettempdir(),
    )
    if done.returncode != 0:
        sys.exit(f"{command}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def main() -> None:
    source, build = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as scratch:
        # A copy, as building leaves its traces in the source.
        tree = pathlib.Path(scratch, "tree")
        tree.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
            shutil.copy(source / name, tree)
        for name in (*BUILT_FROM, "tools", "python"):
            shutil.copytree(source / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        fresh = pathlib.Path(scratch, "venv")
        venv.create(fresh, with_pip=True)
        python = fresh / "bin/python"
        run(python, "-m", "pip", "uninstall", "--yes", "setuptools")  # nothing here needs it
        packages = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the installed torch

        run(python, "-c", SDIST, tree)
        sdist = next(pathlib.Path(scratch).glob("tessera-*.tar.gz"))
        with tarfile.open(sdist) as archive:
            packed = {pathlib.PurePath(*pathlib.PurePath(name).parts[1:]) for name in archive.getnames()}
        wanted = {f.relative_to(tree) for name in BUILT_FROM for f in (tree / name).rglob("*") if f.is_file()}
        if not wanted <= packed:
            sys.exit(f"{sdist.name} lacks {sorted(map(str, wanted - packed))}")

        before = {path.name for path in packages.iterdir()}
        for what in ([sdist], ["--editable", tree]):
            run(
                python,
                "-m",
                "pip",
                "install",
                "--no-build-isolation",
                "--no-index",
                *what,
                CMAKE_ARGS=f"-DTESSERA_BUILT_IN={build}",
            )
            place = tree / "python" if "--editable" in what else packages
            printed = run(python, "-c", PROGRAM, place)
            if printed.strip().splitlines()[-1:] != ["right"]:
                sys.exit(f"the installed package printed:\n{printed}")
            version = run(python, "-c", "import tessera; print(tessera.__version__)").strip()
            for program in ([fresh / "bin/tessera"], [python, "-m", "tessera"]):
                if run(*program, "--version").strip() != f"tessera {version}":
                    sys.exit(f"{program} --version is not {version}")
                run(*program, "demo", "--help")
            if not (fresh / "share/tessera/byte_lm_qkv.safetensors").exists():
                sys.exit("the sample is not where the program looks")
            library = next(packages.glob("tessera/*.so"))
            for known in (str(source).encode(), str(build).encode()):
                if known in library.read_bytes():
                    sys.exit(f"{library.name} knows {known.decode()}")
            run(python, "-m", "pip", "uninstall", "--yes", "tessera")
            left = {path.name for path in packages.iterdir()} - before
            if left:
                sys.exit(f"uninstalling left {sorted(left)}")
    print("installed, imported and right")


if __name__ == "__main__":
    main()
