"""Packed sets: S sets of rows laid one after another, given by their offsets ``ptr``, int64 ``[S + 1]``.

Set s is the rows ``ptr[s] .. ptr[s + 1]``; ``ptr`` ascends from 0 to N, and a set may be empty. These are PyG's ``ptr``
and the ``cu_seqlens`` of attention packages. Nothing here waits for a GPU.
"""

import torch
from torch import Tensor

from ._checks import is_index_tensor, same_device


def check_offsets(op: str, name: str, ptr: object) -> None:
    is_index_tensor(op, name, ptr)
    if ptr.ndim != 1 or len(ptr) == 0:
        raise ValueError(f"{op}: {name} must have shape [S + 1], got {list(ptr.shape)}")


def check_offset_values(op: str, name: str, ptr: Tensor | None, n: int) -> None:
    """What only the values tell. CPU only: on a GPU it would wait for the device. Compilers and vmap have no values."""
    if ptr is None or ptr.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(ptr):
        return
    falls = ptr[1:] < ptr[:-1]
    if falls.any():
        s = int(falls.nonzero()[0])
        raise ValueError(f"{op}: {name} must ascend, got {int(ptr[s])} before {int(ptr[s + 1])} in place {s}")
    if int(ptr[0]) != 0 or int(ptr[-1]) != n:
        raise ValueError(f"{op}: {name} must go from 0 to the number of rows, {n}, got {int(ptr[0])} to {int(ptr[-1])}")


def check_sets(op: str, ptr: Tensor | None, query_ptr: Tensor | None, queries: Tensor | None, **lengths) -> None:
    """Which of `ptr` and its companions go together, and their shapes."""
    for name, value in (("ptr", ptr), ("query_ptr", query_ptr)):
        if value is not None:
            check_offsets(op, name, value)
    if ptr is None:
        if query_ptr is not None:
            raise ValueError(f"{op}: query_ptr must be None without ptr")
        return
    for name, value in lengths.items():
        if value is not None:
            raise ValueError(f"{op}: {name} must be None with ptr: every row belongs to a set")
    if queries is None:
        if query_ptr is not None:
            raise ValueError(f"{op}: query_ptr must be None without queries: ptr counts both")
    elif query_ptr is None:
        raise ValueError(f"{op}: query_ptr must be given with queries and ptr")
    elif query_ptr.shape != ptr.shape:
        raise ValueError(
            f"{op}: query_ptr must have as many offsets as ptr, [S + 1] = {list(ptr.shape)}, "
            f"got {list(query_ptr.shape)}"
        )
    same_device(op, "ptr", ptr, query_ptr=query_ptr)


def set_of_rows(ptr: Tensor, n: int) -> Tensor:
    """The set of each of the n rows: int64 ``[n]``, ascending.

    >>> set_of_rows(torch.tensor([0, 2, 2, 5]), 5)
    tensor([0, 0, 2, 2, 2])
    """
    return _sets(ptr, torch.arange(n, device=ptr.device))


def _sets(ptr: Tensor, rows: Tensor) -> Tensor:
    # Offsets that are wrong, which on a GPU nobody looks at, still name a set that exists.
    return torch.searchsorted(ptr[1:].contiguous(), rows, right=True).clamp_(max=max(0, len(ptr) - 2))


def place_in_set(ptr: Tensor, n: int) -> Tensor:
    """How many rows of the same set come before each of the n rows: int64 ``[n]``.

    >>> place_in_set(torch.tensor([0, 2, 2, 5]), 5)
    tensor([0, 1, 0, 1, 2])
    """
    rows = torch.arange(n, device=ptr.device)
    return rows - ptr[_sets(ptr, rows)] if len(ptr) > 1 else rows


def offsets_of_batch(batch: Tensor, size: int) -> Tensor:
    """The offsets of ``size`` sets whose rows carry ascending numbers: ``batch [N]``, int64, as PyG's.

    >>> offsets_of_batch(torch.tensor([0, 0, 2]), 4)
    tensor([0, 2, 2, 3, 3])
    """
    return torch.searchsorted(batch, torch.arange(size + 1, device=batch.device))
