"""Orders and transposed lists for the gather on a GPU, in PyTorch operations: static shapes, no host synchronisation,
and stable sorts, so that the result is always the same. Not yet run on a GPU."""

import torch
from torch import Tensor

HUB = 1024  # edges; a longer list is cut into pieces of this many

# By the number of dimensions: bits of a coordinate, and the steps that move them apart, so that the others fit between.
SPREAD = {
    1: (30, ()),
    2: (15, ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))),
    3: (10, ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249))),
}


def spatial_order(points: Tensor) -> Tensor:
    """[B, H, n, D] -> int32 [B, H, n]: cells of a grid along a Z-order curve, by up to three of the dimensions.

    The grid spans the bulk of the points; what lies outside belongs to its border. So outliers do no harm.
    """
    B, H, n, D = points.shape
    dims = min(D, 3)
    if n == 0 or dims == 0:
        return torch.arange(n, dtype=torch.int32, device=points.device).expand(B, H, n).contiguous()
    bits, steps = SPREAD[dims]
    x = points[..., :dims].float()
    x = x.where(x.isfinite(), 0)
    low = x.mean(2, keepdim=True)
    deviation = (x - low).square().mean(2, keepdim=True).sqrt()
    cell = (((x - low) / (4.4 * deviation) + 0.5) * 2**bits).nan_to_num(0).clamp(0, 2**bits - 1).int()
    for shift, mask in steps:
        cell = (cell | cell << shift) & mask
    code = cell[..., 0]
    for axis in range(1, dims):
        code = code | cell[..., axis] << axis
    return torch.sort(code, dim=-1, stable=True).indices.int()


def transpose_neighbors(
    indices: Tensor, query_order: Tensor | None, entity_order: Tensor | None, N: int | None = None
) -> tuple[Tensor, Tensor]:
    """For every entity the edges (query * k + slot) that point to it, ascending: starts [B,H,N+1], edges [B,H,M,k].

    Indices outside [0, N) are left out. The orders do not matter here.
    """
    N = entity_order.shape[2] if N is None else N
    flat = indices.flatten(2)
    ends = flat.where((flat >= 0) & (flat < N), N)
    ordered, edges = torch.sort(ends, dim=-1, stable=True)
    wanted = torch.arange(N + 1, device=indices.device).expand(*indices.shape[:2], N + 1).contiguous()
    return torch.searchsorted(ordered, wanted), edges.view(indices.shape)


def hub_pieces(starts: Tensor, edges: int) -> tuple[Tensor, Tensor]:
    """The pieces of all lists longer than HUB: their entities (-1: no such piece) and numbers, [B, H, pieces].

    As many as there can be at most: a list of more than HUB edges makes fewer than 2 / HUB pieces per edge.
    """
    B, H, N = starts.shape[0], starts.shape[1], starts.shape[2] - 1
    counts = starts[..., 1:] - starts[..., :-1]
    each = ((counts + HUB - 1) // HUB).where(counts > HUB, 0)
    ends = each.cumsum(-1)
    place = torch.arange(2 * edges // HUB if edges > HUB else 0, device=starts.device).expand(B, H, -1).contiguous()
    entity = torch.searchsorted(ends, place, right=True)
    number = place - (ends - each).gather(-1, entity.clamp(max=N - 1))
    return entity.where(entity < N, -1), number
