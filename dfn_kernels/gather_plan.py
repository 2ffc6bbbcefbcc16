"""What gathers over the same neighbours share: orders and transposed lists. From top to bottom: schema, fake, backends,
public."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import compute_dtype, has_shape, is_float_tensor, is_index_tensor, same_device
from ._transforms import OpFunction, call

OP = "gather_plan"
# Rows of values that the cache holds need no order, in bytes.
CACHE = {"native": 2**19, "triton": 2**25}


class GatherPlan(NamedTuple):
    """Neighbours with what `gaussian_gather` finds out about them; `gather_plan` makes one. Its layout is private."""

    indices: Tensor  # as given
    query_order: Tensor | None = None  # int32 [B, H, M]: queries near each other come near each other
    entity_order: Tensor | None = None  # int32 [B, H, N]; H = 1 where the heads share the neighbours
    starts: Tensor | None = None  # int64 [B, H, N + 1], the transposed lists
    edges: Tensor | None = None  # [B, H, M, k]
    backend: str = "reference"


# ---- schema ---------------------------------------------------------------------------------------------------------
@torch.library.custom_op("dfn::spatial_order", mutates_args=())
def _order_op(points: Tensor, backend: str) -> Tensor:  # [B, H, n, D] -> int32 [B, H, n]
    return _launcher(backend).spatial_order(points.contiguous())


@torch.library.custom_op("dfn::transpose_neighbors", mutates_args=())
def _lists_op(
    indices: Tensor,  # [B, H, M, k]
    query_order: Tensor,  # [B, H, M]
    entity_order: Tensor,  # [B, H, N]
    backend: str,
) -> tuple[Tensor, Tensor]:  # starts [B, H, N + 1], edges [B, H, M, k]
    return _launcher(backend).transpose_neighbors(
        indices.contiguous(), query_order.contiguous(), entity_order.contiguous()
    )


# ---- fake -----------------------------------------------------------------------------------------------------------
@_order_op.register_fake
def _(points, backend):
    return points.new_empty(points.shape[:-1], dtype=torch.int32)


@_lists_op.register_fake
def _(indices, query_order, entity_order, backend):
    B, H, M, k = indices.shape
    narrow = M * k < (2**32 if backend == "native" else 2**30)
    return (
        indices.new_empty(B, H, entity_order.shape[2] + 1),
        indices.new_empty(indices.shape, dtype=torch.int32 if narrow else torch.int64),
    )


# ---- backends -------------------------------------------------------------------------------------------------------
def _launcher(backend: str):
    if backend == "triton":
        from .triton import gather_plan

        return gather_plan
    return _native.cpu


class _OrderFunction(OpFunction):
    op = _order_op


class _ListsFunction(OpFunction):
    op = _lists_op


def shared_heads(x: Tensor) -> bool:
    """Whether all heads of [B, H, ..] are one and the same memory."""
    return x.shape[1] > 1 and x.stride(1) == 0


def spatial_order(points: Tensor, indices: Tensor, row_bytes: int, backend: str) -> Tensor | None:
    """An order of the points [B, H, n, D] that keeps rows of `row_bytes` in the cache; None where it does not pay."""
    B, H, n, _ = points.shape
    if indices.shape[-1] < 2 or n * row_bytes <= CACHE[backend]:
        return None
    points = points[:, :1] if shared_heads(indices) else points
    return call(_order_op, _OrderFunction, points.detach(), backend)


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

    rows = indices[(None,) * (2 - len(lead))] if len(lead) != 1 else indices.unsqueeze(1)
    (B, H), shared = rows.shape[:2], shared_heads(rows)

    def order(points: Tensor) -> Tensor:
        points = points.detach().to(real).reshape(B, H, *points.shape[-2:])
        return call(_order_op, _OrderFunction, points[:, :1] if shared else points, backend)

    rows = rows[:, :1] if shared else rows
    entity_order = order(positions)
    query_order = entity_order if query_positions is None else order(query_positions)
    starts, edges = call(_lists_op, _ListsFunction, rows, query_order, entity_order, backend)
    return GatherPlan(indices, query_order, entity_order, starts, edges, backend)
