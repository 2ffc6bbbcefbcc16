"""Which implementation of an op runs: `use_backend`, `backends`, and the rule behind the default."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import _native

try:
    import triton  # noqa: F401

    TRITON_MISSING = None
except ImportError:
    TRITON_MISSING = "triton is not installed: pip install triton (GPU builds of PyTorch bring it along)"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("native", "triton", "reference")
OLDEST = (8, 0)  # the compute capability that csrc/cuda is compiled for

# Per op: where it has native code, whether it has Triton kernels, and what a GPU tensor takes by default.
_OPS: dict[str, dict] = {}
# Process-wide, like torch's own backend switches: torch.compile guards on a global, but cannot read a ContextVar and
# does not see changes of a threading.local.
_override: dict[str, str | None] = {"name": None}


def register(
    op: str, *, cpu: bool = True, cuda: bool = False, triton: bool = True,
    cuda_first: Callable[[tuple[int, int]], bool] = lambda capability: True,
) -> None:  # fmt: skip
    """Says which backends `op` has besides the reference, and where a GPU's tensor takes CUDA C++ before Triton: asked
    with its compute capability. Each op file calls it once.
    """
    _OPS[op] = {"cpu": cpu, "cuda": cuda, "triton": triton, "cuda_first": cuda_first}


@torch.compiler.assume_constant_result
def capability(index: int | None = None) -> tuple[int, int]:
    """The compute capability of a CUDA GPU, of the current one without an index. A constant in compiled code."""
    return torch.cuda.get_device_capability(index)


def missing(op: str, backend: str, device: str, index: int | None = None) -> str | None:
    """Why `backend` cannot run `op` on tensors of this device here; None if it can."""
    has = _OPS[op]
    if backend == "reference":
        return None
    if backend == "native":
        if device == "cpu":
            return _native.CPU_MISSING if has["cpu"] else "composed of PyTorch ops, no kernel of ours"
        if device == "cuda":
            if not has["cuda"]:
                return "no CUDA C++ kernels for this op, Triton ones at most"
            if _native.CUDA_MISSING is None and capability(index) < OLDEST:
                return f"compiled for compute capability {OLDEST[0]}.{OLDEST[1]} and later"
            return _native.CUDA_MISSING
        return f"no native kernels for {device} tensors"
    if not has["triton"]:
        return "composed of PyTorch ops, no kernel of ours"
    if TRITON_MISSING:
        return TRITON_MISSING
    if device == "cpu" and not INTERPRETED:
        return "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before the import"
    if device not in ("cpu", "cuda", "xpu"):  # ROCm devices are called cuda
        return f"no Triton kernels for {device} tensors"
    return None


def choose(op: str, device: str, index: int | None = None) -> str:
    """The backend that runs `op` on tensors of this device now."""
    name = _override["name"]
    if name is not None:
        reason = missing(op, name, device, index)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {name!r} is not available for {device} tensors: {reason}")
        return name
    native = missing(op, "native", device, index) is None
    if native and (device != "cuda" or _OPS[op]["cuda_first"](capability(index))):
        return "native"
    if device != "cpu" and missing(op, "triton", device) is None:
        return "triton"
    return "native" if native else "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op in the `with` block on one backend: "native", "triton" or "reference".

    An op that cannot run on it raises RuntimeError and says why. The choice is made when the op is called: a backward
    pass runs on the backend of its forward pass, wherever it runs. The switch is process-wide, not per thread.

    >>> import torch, dfn_kernels
    >>> with dfn_kernels.use_backend("reference"):
    ...     found = dfn_kernels.knn(torch.tensor([[0.0], [1.0], [5.0]]), 1)
    >>> found.indices.tolist()
    [[0], [1], [2]]
    """
    if name not in NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, got {name!r}")
    before = _override["name"]
    _override["name"] = name
    try:
        yield
    finally:
        _override["name"] = before


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """For every op, device type and backend: "default", "available", or why it is not.

    The devices are "cpu" and, where PyTorch has one, "cuda" (ROCm included) or "xpu".
    """
    devices = ["cpu"] + [d for d in ("cuda", "xpu") if getattr(torch, d).is_available()]
    table: dict[str, dict[str, dict[str, str]]] = {}
    for op in _OPS:
        table[op] = {}
        for device in devices:
            default = choose(op, device) if _override["name"] is None else None
            table[op][device] = {
                name: "default" if name == default else missing(op, name, device) or "available" for name in NAMES
            }
    return table
