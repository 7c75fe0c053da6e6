"""The wheel: the Python package, and the operators as CMake builds them against the torch that is installed here.

    pip install --no-build-isolation .

TESSERA_BUILD_DIR names a folder in which CMake has configured Tessera already (TESSERA_BUILD_TORCH=ON); it is then
used as it is. CMAKE_ARGS is handed to CMake. The library fits the torch that it was built against, so the wheel asks
for that one.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
LIBRARY = "libtessera_torch.so"


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(pathlib.Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        given = os.environ.get("TESSERA_BUILD_DIR")
        build = pathlib.Path(given or self.build_temp).resolve()
        if not given:
            spec = importlib.util.find_spec("torch")
            if spec is None or spec.origin is None:
                raise SystemExit("torch is not installed here; install it, then pip install --no-build-isolation .")
            options = {"CMAKE_BUILD_TYPE": "Release", "TESSERA_BUILD_TORCH": "ON",
                       "Torch_DIR": pathlib.Path(spec.origin).parent / "share/cmake/Torch"}
            options |= {f"TESSERA_BUILD_{part}": "OFF" for part in ("CLI", "TESTS", "EXAMPLES", "BENCH")}
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator,
                            *(f"-D{name}={value}" for name, value in options.items()),
                            *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "tessera_torch", "--config", "Release",
                        "--parallel", str(os.cpu_count() or 1)], check=True)
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Installing, and not copying, takes the paths of this machine out of the library.
        subprocess.run(["cmake", "--install", build, "--config", "Release", "--component", "wheel", "--prefix", target,
                        "--strip"], check=True)


class PlatformWheel(bdist_wheel):
    """The library is called through torch and knows no Python: one wheel for all versions of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


version = re.search(r"project\(tessera VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())
assert version is not None
torch_version = importlib.metadata.version("torch").split("+")[0]
setup(
    version=version.group(1),
    install_requires=[f"torch=={torch_version}"],
    ext_modules=[Extension("tessera.libtessera_torch", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    options={"build": {"build_base": "build/wheel"}},  # build/ itself is CMake's
)
