"""What the GPU machine lacks, built there: python -m bench.gpu_build.

The operator libraries of another machine run as they are (stable ABI). The host module belongs to one CPython: it is
built with g++ and pybind11 alone. Libraries that are missing or do not load are built by CMake, where it is there.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dfn_kernels"


def host_module() -> Path:
    return PACKAGE / ("_host" + sysconfig.get_config_var("EXT_SUFFIX"))


def build_host() -> str:
    if host_module().exists():
        return "_host is there"
    if importlib.util.find_spec("pybind11") is None or not shutil.which("g++"):
        return "_host is missing, and so are g++ or pybind11: decoding takes its slower path"
    import pybind11

    include = [pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / "csrc")]
    command = ["g++", "-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
               *(f"-I{folder}" for folder in include), *map(str, sorted((ROOT / "csrc" / "host").glob("*.cpp"))),
               "-o", str(host_module())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"_host does not build: {(done.stderr.strip().splitlines() or ['no message'])[-1][:150]}"
    return "_host is built"


def missing_libraries() -> list[str]:
    """Asked in a process of its own: a library that fails to load stays half loaded."""
    code = "from dfn_kernels import _native as n; print(*(int(x is not None) for x in (n.CPU_MISSING, n.CUDA_MISSING)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    flags = done.stdout.split() if done.returncode == 0 else ["1", "1"]
    return [name for name, flag in zip(("_C_cpu", "_C_cuda"), flags, strict=True) if flag == "1"]


def build_libraries(names: list[str]) -> str:
    if not names:
        return "the libraries load"
    if not shutil.which("cmake") or not shutil.which("ninja"):
        return f"{' and '.join(names)} missing, and so are cmake or ninja: Triton and the reference take over"
    import torch

    configure = ["cmake", "-S", str(ROOT), "-B", str(ROOT / "build" / "gpu"), "-G", "Ninja",
                 f"-DDFN_OUTPUT_DIR={PACKAGE}", f"-DDFN_TORCH_DIR={Path(torch.__file__).parent}",
                 f"-DDFN_CUDA={'ON' if '_C_cuda' in names and shutil.which('nvcc') else 'OFF'}"]  # fmt: skip
    build = ["cmake", "--build", str(ROOT / "build" / "gpu"), "-j", str(os.cpu_count() or 1), "--target", *names]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:])
            return f"{' and '.join(names)} do not build; the log says why"
    return f"{' and '.join(names)} built"


def main() -> int:
    start = time.monotonic()
    print(f"{build_host()}; {build_libraries(missing_libraries())} ({time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
