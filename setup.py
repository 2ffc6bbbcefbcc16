"""Builds the native libraries by calling CMake; metadata lives in pyproject.toml.

Environment: DFN_CUDA=auto|0|1 (default auto: build `_C_cuda` where nvcc is found), MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_wanted() -> bool:
    choice = os.environ.get("DFN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"DFN_CUDA must be auto, 0 or 1, got {choice!r}")
    return choice == "1" or (choice == "auto" and shutil.which("nvcc") is not None)


class CMakeBuild(build_ext):
    """One CMake run builds every extension listed below."""

    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        if name.startswith("_C_"):  # operator libraries: no Python ABI, so no ABI tag in the file name
            return os.path.join(*package, name + ".so")
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        import pybind11
        import torch

        package_dir = Path(self.get_ext_fullpath("dfn_kernels._C_cpu")).parent.resolve()
        build_dir = ROOT / "build" / "cmake"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DDFN_OUTPUT_DIR={package_dir}",
            f"-DDFN_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DDFN_CUDA={'ON' if cuda_wanted() else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)


names = ["_C_cpu", "_host"] + (["_C_cuda"] if cuda_wanted() else [])
setup(
    ext_modules=[Extension(f"dfn_kernels.{name}", sources=[]) for name in names],
    cmdclass={"build_ext": CMakeBuild},
)
