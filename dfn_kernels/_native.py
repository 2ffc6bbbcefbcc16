"""Loads the compiled operator libraries beside this file and remembers why one is missing."""

import os
import platform
import sys
from pathlib import Path

import torch

_HOW_TO_BUILD = "build it with `make env`, or `pip install --no-build-isolation .` from the source tree"


# Elsewhere for a build with sanitizers, see `make sanitize`.
_FOLDER = Path(os.environ.get("DFN_LIBRARY_DIR") or Path(__file__).parent)
if _FOLDER != Path(__file__).parent:
    sys.modules[__package__].__path__.insert(0, str(_FOLDER))  # so that `_host` is found there, too


def _load(name: str) -> str | None:
    """Loads <name>.so; returns None, or why it is not there."""
    path = _FOLDER / (name + ".so")
    if not path.exists():
        return f"{name} is not built: {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} cannot be loaded: {error}"
    return None


# Why the library is missing; None where it is loaded.
CPU_MISSING = _load("_C_cpu")
if torch.version.cuda is None:
    CUDA_MISSING = "this PyTorch is not built for CUDA"
else:
    CUDA_MISSING = _load("_C_cuda")
if CUDA_MISSING and "not built:" in CUDA_MISSING:
    CUDA_MISSING += " where nvcc is found (DFN_CUDA=1 insists on it)"


class _Overloads:
    """The ops of a library by name, each looked up once, its only overload at that."""

    def __init__(self, library: str):
        self._library = library

    def __getattr__(self, name: str) -> torch._ops.OpOverload:
        found = getattr(getattr(torch.ops, self._library), name).default
        setattr(self, name, found)
        return found


cpu, cuda = _Overloads("dfn_cpu"), _Overloads("dfn_cuda")


def cpu_name() -> str:
    """The processor's model, as a person knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
