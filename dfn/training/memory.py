"""The most memory a process held: since it began, and within one call."""

import ctypes
import sys
from collections.abc import Callable

import torch


def peak_memory(device: torch.device) -> float | None:
    """The most memory used so far, in MiB: the GPU's by tensors, else that of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_growth(run: Callable[[], object]) -> float | None:
    """By how many MiB the peak of the resident set exceeds what was held before; None where it cannot be reset.

    Linux lets a process reset it.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
