"""Gaussian gather, orders and transposed lists in CUDA C++: the launchers beside csrc/cuda/gaussian_gather*.cu.

A list is what heads that share their neighbours share: indices come as [B, H, M, k], or [B, 1, M, k].
"""

import torch
from torch import Tensor

from .. import _native

HUB = 1024  # edges: the gradient of an entity that more point to is summed in pieces
BY_ENTITY = 1 | 4 | 16  # gradients that walk the transposed lists: positions, values, influence


def _near_rows(x: Tensor) -> Tensor:
    """Rows less than 2 GiB apart, as the kernels count."""
    return x if x.stride(2) < 2**28 else x.contiguous()


def gaussian_gather(
    positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor, influence: Tensor | None,
    sq_dists: Tensor | None, query_order: Tensor | None, normalize: bool,
) -> Tensor:  # fmt: skip
    return _native.cuda.gaussian_gather(
        positions, queries, _near_rows(values), indices, sigma, influence, sq_dists, query_order, normalize
    )


def gaussian_gather_backward(
    grad: Tensor, positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor,
    influence: Tensor | None, sq_dists: Tensor | None, query_order: Tensor | None, entity_order: Tensor | None,
    starts: Tensor | None, edges: Tensor | None, normalize: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if starts is None and wanted & BY_ENTITY:
        starts, edges = _native.cuda.gather_lists(indices, positions.shape[2], query_order)
    return _native.cuda.gaussian_gather_backward(
        _near_rows(grad), positions, queries, _near_rows(values), indices, sigma, influence, sq_dists,
        query_order, entity_order, starts, edges, normalize, wanted, HUB,
    )  # fmt: skip


def spatial_order(points: Tensor) -> Tensor:
    """[B, H, n, D] -> int32 [B, H, n]: cells of a grid along a Z-order curve, by up to three of the dimensions."""
    B, H, n, D = points.shape
    if points.numel() == 0:
        return torch.arange(n, dtype=torch.int32, device=points.device).expand(B, H, n).contiguous()
    if B * H * n >= 2**31:
        return torch.cat([spatial_order(x[None, None]) for x in points.flatten(0, 1)]).view(B, H, n)
    return _native.cuda.gather_order(points)


def lists_shape(B: int, H: int, N: int, M: int, k: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Of `starts`; `edges` has the same dtype. Lists follow each other in one count."""
    return (B * H * N + 2,), torch.int32 if B * H * M * k < 2**31 else torch.int64


def transpose_neighbors(indices: Tensor, query_order: Tensor, entity_order: Tensor) -> tuple[Tensor, Tensor]:
    """For every entity the edges (query * k + slot) that point to it, ascending.

    That queries are visited in their order is faster and changes nothing.

    starts[list * N + n] is where those of entity n begin, the length of the longest list comes last.
    """
    return _native.cuda.gather_lists(indices, entity_order.shape[2], query_order)
