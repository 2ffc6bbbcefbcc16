"""What gathers over the same neighbours share: orders and transposed lists. From top to bottom: schema, fake, backends,
public."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import compute_dtype, has_shape, is_float_tensor, is_index_tensor, same_device
from ._transforms import OpFunction, call, custom_op

OP = "gather_plan"
# Rows of values that the cache holds need no order, in bytes: those of a batch and head on a CPU, whose cores serve one
# after the other; all of them on a GPU.
CACHE = {"cpu": 2**19, "gpu": 2**25}


class GatherPlan(NamedTuple):
    """Neighbours with what `gaussian_gather` finds out about them; `gather_plan` makes one. Its layout is private."""

    indices: Tensor  # as given
    query_order: Tensor | None = None  # int32 [B, H, M]: queries near each other come near each other
    entity_order: Tensor | None = None  # int32 [B, H, N]; H = 1 where the heads share the neighbours
    starts: Tensor | None = None  # where each entity's list of edges begins, as the backend counts
    edges: Tensor | None = None  # [B, H, M, k], the transposed lists
    backend: str = "reference"


# ---- schema ---------------------------------------------------------------------------------------------------------
@custom_op("dfn::spatial_order")
def _order_op(points: Tensor, backend: str) -> Tensor:  # [B, H, n, D] -> int32 [B, H, n]
    return _launcher(backend, points).spatial_order(points.contiguous())


@custom_op("dfn::transpose_neighbors")
def _lists_op(
    indices: Tensor,  # [B, H, M, k]
    query_order: Tensor,  # [B, H, M]
    entity_order: Tensor,  # [B, H, N]
    backend: str,
) -> tuple[Tensor, Tensor]:  # starts, edges [B, H, M, k]
    return _launcher(backend, indices).transpose_neighbors(
        indices.contiguous(), query_order.contiguous(), entity_order.contiguous()
    )


# ---- fake -----------------------------------------------------------------------------------------------------------
@_order_op.register_fake
def _(points, backend):
    return points.new_empty(points.shape[:-1], dtype=torch.int32)


@_lists_op.register_fake
def _(indices, query_order, entity_order, backend):
    B, H, M, k = indices.shape
    N = entity_order.shape[2]
    if backend == "native" and indices.device.type != "cpu":
        from .cuda.gaussian_gather import lists_shape

        shape, number = lists_shape(B, H, N, M, k)
        return indices.new_empty(shape, dtype=number), indices.new_empty(indices.shape, dtype=number)
    narrow = M * k < (2**32 if backend == "native" else 2**30)
    return (
        indices.new_empty(B, H, N + 1),
        indices.new_empty(indices.shape, dtype=torch.int32 if narrow else torch.int64),
    )


# ---- backends -------------------------------------------------------------------------------------------------------
def _launcher(backend: str, like: Tensor):
    if backend == "triton":
        from .triton import gather_plan

        return gather_plan
    if like.device.type == "cpu":
        return _native.cpu
    from .cuda import gaussian_gather

    return gaussian_gather


class _OrderFunction(OpFunction):
    op = _order_op


class _ListsFunction(OpFunction):
    op = _lists_op


def with_heads(x: Tensor, dims: int = 4) -> Tensor:
    """[N, ..] or [B, N, ..] as [B, H, N, ..], which has so many dimensions: a view."""
    missing = dims - x.ndim
    return x if missing == 0 else x.unsqueeze(1) if missing == 1 else x[None, None]


def without_heads(x: Tensor, dims: int) -> Tensor:
    """The way back, to so many dimensions."""
    missing = x.ndim - dims
    return x if missing == 0 else x.squeeze(1) if missing == 1 else x.squeeze((0, 1))


def shared_heads(x: Tensor) -> bool:
    """Whether all heads of [B, H, ..] are one and the same memory."""
    return x.shape[1] > 1 and x.stride(1) == 0


def spatial_order(points: Tensor, indices: Tensor, row_bytes: int, backend: str) -> Tensor | None:
    """An order of the points [.., n, D] that keeps rows of `row_bytes` in the cache, int32 [B, H, n]; None where it
    does not pay."""
    rows = points.shape[-2] if points.device.type == "cpu" else math.prod(points.shape[:-1])
    if indices.shape[-1] < 2 or rows * row_bytes <= CACHE["cpu" if points.device.type == "cpu" else "gpu"]:
        return None
    points = with_heads(points.detach())
    points = points[:, :1] if shared_heads(with_heads(indices)) else points
    return call(_order_op, _OrderFunction, points, backend)


def fits(op: str, plan: GatherPlan, entities: int) -> None:
    """A plan that was made for other sizes would be found out in the backward pass only."""
    if plan.starts is None:
        return
    made_for, (M, k) = plan.entity_order.shape[-1], plan.edges.shape[-2:]
    if made_for != entities:
        raise ValueError(f"{op}: plan was made for N = {made_for} entities, got {entities}")
    if plan.indices.shape[-2:] != plan.edges.shape[-2:]:
        want = f"[.., M, k] = [.., {M}, {k}]"
        raise ValueError(f"{op}: plan was made for indices of shape {want}, got {list(plan.indices.shape)}")


# ---- public ---------------------------------------------------------------------------------------------------------
def gather_plan(indices: Tensor, positions: Tensor, query_positions: Tensor | None = None) -> GatherPlan:
    """Prepares neighbours that several calls of `gaussian_gather` will use: layers, values, or steps.

    Pass the result where `gaussian_gather` takes indices. The results are the same to the bit or, where the order of a
    sum differs, within rounding; the backward pass of every call saves the transposition of the lists.

    Args:
        indices: int64 ``[.., M, k]``, as for `gaussian_gather`. They must not be changed while the plan is in use.
        positions: ``[.., N, D]``, where the entities are, at least about: they decide how fast the plan is, no more.
        query_positions: ``[.., M, D]``; without it M = N and entity i is query i.

    Raises: ValueError (shapes, devices), TypeError (dtypes).

    >>> import torch
    >>> from dfn_kernels import gather_plan, gaussian_gather, knn
    >>> p, v = torch.rand(100, 3), torch.rand(100, 8)
    >>> plan = gather_plan(knn(p, 4).indices, p)
    >>> for _ in range(3):
    ...     v = gaussian_gather(p, v, plan, sigma=0.1, normalize=True)
    """
    is_index_tensor(OP, "indices", indices)
    is_float_tensor(OP, "positions", positions)
    if positions.ndim not in (2, 3, 4):
        raise ValueError(
            f"{OP}: positions must have shape [N, D], [B, N, D] or [B, H, N, D], got {list(positions.shape)}"
        )
    *lead, N, D = positions.shape
    letters = {0: "[", 1: "[B, ", 2: "[B, H, "}[len(lead)]
    M, k = indices.shape[-2:] if indices.ndim > 1 else (N, 0)
    has_shape(OP, "indices", indices, (*lead, M, k), letters + "M, k]")
    if query_positions is not None:
        is_float_tensor(OP, "query_positions", query_positions)
        has_shape(OP, "query_positions", query_positions, (*lead, M, D), letters + "M, D]")
    elif M != N:
        raise ValueError(
            f"{OP}: indices must have one row per position, got {M} rows for N = {N}; pass query_positions"
        )
    same_device(OP, "positions", positions, indices=indices, query_positions=query_positions)

    backend = _backends.choose("gaussian_gather", positions.device.type)
    if backend == "reference":
        return GatherPlan(indices)
    real = compute_dtype(positions, query_positions)

    rows = with_heads(indices)
    (B, H), shared = rows.shape[:2], shared_heads(rows)

    def order(points: Tensor) -> Tensor:
        points = points.detach().to(real).reshape(B, H, *points.shape[-2:])
        return call(_order_op, _OrderFunction, points[:, :1] if shared else points, backend)

    rows = rows[:, :1] if shared else rows
    entity_order = order(positions)
    query_order = entity_order if query_positions is None else order(query_positions)
    starts, edges = call(_lists_op, _ListsFunction, rows, query_order, entity_order, backend)
    return GatherPlan(indices, query_order, entity_order, starts, edges, backend)
