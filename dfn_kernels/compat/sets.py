"""What the functions that know batches as vectors share: their arguments as packed sets, and results as edges."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import is_float_tensor, is_index_tensor, is_integer, same_device
from ..knn import MOST_NEIGHBORS, Neighbors
from ..knn import _search as search
from ..packed import check_offset_values, check_offsets, offsets_of_batch


class Side(NamedTuple):
    """Points and what says which set each belongs to, with the names that the user gave them under."""

    name: str
    points: Tensor  # [N, D]
    batch_name: str
    batch: Tensor | None  # [N]
    ptr_name: str
    ptr: Tensor | None  # [S + 1]


def side(op: str, name: str, points: object, batch: Tensor | None, ptr: Tensor | None) -> Side:
    """`name` is x, y, pos_x, pos_y, or src: with it go batch_x, batch_y or batch."""
    is_float_tensor(op, name, points)
    points = points.view(-1, 1) if points.ndim == 1 else points
    if points.ndim != 2:
        raise ValueError(f"{op}: {name} must have shape [N, D] or [N], got {list(points.shape)}")
    end = name[name.rfind("_") :] if "_" in name else "_" + name
    return Side(name, points, "batch" + end, batch, "ptr" + end, ptr)


def alone(one: Side) -> Side:
    """Of a function with one set of points, whose arguments are called batch and ptr."""
    return one._replace(batch_name="batch", ptr_name="ptr")


def offsets(op: str, sides: list[Side], batch_size: int | None) -> list[Tensor | None]:
    """The offsets of each side's sets, as many on all of them; None where all points are one set."""
    first = sides[0]
    for one in sides:
        N = len(one.points)
        if one.points.shape[1] != first.points.shape[1]:
            want, got = [N, first.points.shape[1]], list(one.points.shape)
            raise ValueError(f"{op}: {one.name} must have shape [M, D] = {want} like {first.name}, got {got}")
        if one.batch is not None and one.ptr is not None:
            raise ValueError(f"{op}: {one.batch_name} and {one.ptr_name} must not be given both")
        if one.batch is not None:
            is_index_tensor(op, one.batch_name, one.batch)
            if one.batch.shape != (N,):
                raise ValueError(f"{op}: {one.batch_name} must have shape [{N}], a number for each row of {one.name}, "
                                 f"got {list(one.batch.shape)}")  # fmt: skip
        if one.ptr is not None:
            check_offsets(op, one.ptr_name, one.ptr)
            if not torch.compiler.is_compiling():
                check_offset_values(op, one.ptr_name, one.ptr, N)
        same_device(op, first.name, first.points, **{one.name: one.points, one.batch_name: one.batch,
                                                     one.ptr_name: one.ptr})  # fmt: skip
    if batch_size is not None:
        is_integer(op, "batch_size", batch_size, 0, 2**31)
    if any(one.ptr is not None for one in sides):
        return _given(op, sides)
    return _from_batches(op, sides, batch_size)


def _given(op: str, sides: list[Side]) -> list[Tensor | None]:
    for one in sides:
        if one.ptr is None:
            raise ValueError(f"{op}: {one.ptr_name} must be given with the other offsets")
        if len(one.ptr) != len(sides[0].ptr):
            raise ValueError(f"{op}: {one.ptr_name} must have {len(sides[0].ptr)} offsets like {sides[0].ptr_name}, "
                             f"got {len(one.ptr)}")  # fmt: skip
    return [one.ptr for one in sides]


def _from_batches(op: str, sides: list[Side], batch_size: int | None) -> list[Tensor | None]:
    size = batch_size
    if not (torch.compiler.is_compiling() and size is not None):
        found = max(_count(op, one) for one in sides)
        if size is None:
            size = max(found, 1)
        elif found > size:
            name = next(one.batch_name for one in sides if _count(op, one) > size)
            raise ValueError(f"{op}: {name} must be below batch_size, {size}, got {found - 1}")
    if size <= 1:
        return [None] * len(sides)
    missing = [one.batch_name for one in sides if one.batch is None]
    if missing:
        raise ValueError(f"{op}: {missing[0]} must be given where there are {size} batches, got None")
    return [offsets_of_batch(one.batch, size) for one in sides]


def _count(op: str, one: Side) -> int:
    """How many batches a vector speaks of; checks that it can be one."""
    batch = one.batch
    if batch is None or len(batch) == 0:
        return 0
    if (batch[1:] < batch[:-1]).any():
        raise ValueError(f"{op}: {one.batch_name} must ascend, got {int((batch[1:] < batch[:-1]).nonzero()[0]) + 1} "
                         "as the first row of a lower batch")  # fmt: skip
    if int(batch[0]) < 0:
        raise ValueError(f"{op}: {one.batch_name} must not be negative, got {int(batch[0])}")
    return int(batch[-1]) + 1


def neighbors(
    op: str, x: Side, y: Side | None, k: int, batch_size: int | None, *, loop: bool = True, within: float | None = None,
    k_name: str = "k",
) -> Neighbors:  # fmt: skip
    """Of each point of y the k nearest of x in its set; without y, of each x: indices and squared distances [M, k]."""
    is_integer(op, k_name, k, 1, MOST_NEIGHBORS)
    ptr_x, *ptr_y = offsets(op, [x] if y is None else [x, y], batch_size)
    points = x.points.detach()
    queries = None if y is None else y.points.detach()
    return search(points, k, queries, False, loop, None, None, False, None, ptr=ptr_x,
                  query_ptr=ptr_y[0] if ptr_y else None, within=within)  # fmt: skip


def edges(found: Tensor, to_query: bool = False) -> Tensor:
    """Lists [M, k] as pairs: int64 ``[2, E]``, (query, neighbour), or (neighbour, query) if they lead `to_query`."""
    listed = found >= 0
    if listed.all():  # twice as fast where it is so
        query, neighbor = torch.arange(len(found), device=found.device).unsqueeze(1).expand_as(found), found
    else:
        query, slot = listed.nonzero(as_tuple=True)
        neighbor = found[query, slot]
    return torch.stack([neighbor, query] if to_query else [query, neighbor]).flatten(1)
