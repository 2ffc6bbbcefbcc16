"""Builds the native libraries by calling CMake; metadata lives in pyproject.toml.

Environment: DFN_CUDA=auto|0|1 (default auto: build `_C_cuda` where nvcc is found, and go on without it where that
fails; 1 insists), MAX_JOBS.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA = "dfn_kernels._C_cuda"


def cuda_choice() -> str:
    choice = os.environ.get("DFN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"DFN_CUDA must be auto, 0 or 1, got {choice!r}")
    return choice


def cuda_wanted() -> bool:
    choice = cuda_choice()
    return choice == "1" or (choice == "auto" and shutil.which("nvcc") is not None)


def tool(name: str, attribute: str) -> str:
    """cmake or ninja as pip has installed it for this interpreter, activated or not; else the one in PATH."""
    try:
        own = Path(getattr(importlib.import_module(name), attribute)) / name
    except (ImportError, AttributeError):
        own = None
    found = str(own) if own is not None and own.exists() else shutil.which(name)
    return found or sys.exit(f"{name} is needed to build dfn-kernels: pip install {name}")


class CMakeBuild(build_ext):
    """One CMake run builds every extension listed below."""

    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        if name.startswith("_C_"):  # operator libraries: no Python ABI, so no ABI tag in the file name
            return os.path.join(*package, name + ".so")
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        cuda = any(e.name == CUDA for e in self.extensions)
        if cuda and (why := self.cmake(cuda=True, required=cuda_choice() == "1")):
            print(f"dfn-kernels: built without {CUDA} (DFN_CUDA=1 insists on it): {why}", file=sys.stderr)
            self.extensions[:] = [e for e in self.extensions if e.name != CUDA]
            cuda = False
        if not cuda:
            self.cmake(cuda=False, required=True)

    def cmake(self, cuda: bool, required: bool) -> str | None:
        """Configures and builds; where that fails and is not `required`, why."""
        import pybind11
        import torch

        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        package_dir = Path(self.get_ext_fullpath("dfn_kernels._C_cpu")).parent.resolve()
        build_dir = ROOT / "build" / "cmake"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DDFN_OUTPUT_DIR={package_dir}",
            f"-DDFN_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DDFN_CUDA={'ON' if cuda else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        for command in (configure, [cmake, "--build", str(build_dir), "-j", jobs]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)
            if done.returncode and required:
                sys.exit(f"dfn-kernels: {' '.join(command[:2])} failed: {reason(done.stdout)}")
            if done.returncode:
                return reason(done.stdout)
        return None


def reason(log: str) -> str:
    """The first line of a build's log that says what is wrong, with the one that explains it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if "error" in line.lower() or "FAILED" in line), len(lines) - 2)
    return " ".join(lines[max(at, 0) : max(at, 0) + 2]) or "it says nothing"


names = ["_C_cpu", "_host"] + (["_C_cuda"] if cuda_wanted() else [])
setup(
    ext_modules=[Extension(f"dfn_kernels.{name}", sources=[]) for name in names],
    cmdclass={"build_ext": CMakeBuild},
)
