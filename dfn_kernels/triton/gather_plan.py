"""Orders and transposed lists for the gather on a GPU: static shapes, no host synchronisation, and stable sorts, so
that the result is always the same. Not yet run on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS

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


@triton.jit
def keys_kernel(
    I,  # input: indices, [lists, edges]  # noqa: E741
    KEYS,  # output: entities of all lists, numbered one after another; nobody is entity N of its list
    total, edges, N,  # shapes
    BE: tl.constexpr,  # tunable
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    j = tl.load(I + i, mask=i < total, other=-1)
    key = (i // edges) * (N + 1) + tl.where((j >= 0) & (j < N), j, N)
    tl.store(KEYS + i, key.to(KEYS.dtype.element_ty), mask=i < total)


@triton.jit
def lists_kernel(
    KEYS, PLACES,  # inputs: the keys in order, and where each of them was
    STARTS, EDGES,  # outputs [lists, N + 1] and [lists, edges]
    total, edges, lists, N, k, shift, steps,  # shapes; 2**steps > edges
    BE: tl.constexpr,  # tunable
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    inside = i < total
    place = tl.load(PLACES + i, mask=inside, other=0) % edges
    edge = ((place // k) << shift) + place % k
    tl.store(EDGES + i, edge.to(EDGES.dtype.element_ty), mask=inside)

    first = (i // (N + 1)) * edges  # of the list; i is the key that is looked for
    inside = i < lists * (N + 1)
    low, high = first, first + edges
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(KEYS + middle, mask=inside & (low < high), other=0) < i
        low, high = tl.where(before & (low < high), middle + 1, low), tl.where(before, high, middle)
    tl.store(STARTS + i, low - first, mask=inside)


# ---- launcher -------------------------------------------------------------------------------------------------------
def slot_bits(k: int) -> int:
    """An edge of a transposed list is query << slot_bits(k) | slot."""
    return max(k - 1, 0).bit_length()


def transpose_neighbors(
    indices: Tensor, query_order: Tensor | None, entity_order: Tensor | None, N: int | None = None
) -> tuple[Tensor, Tensor]:
    """For every entity the edges that point to it, ascending: starts int64 [B, H, N + 1] and edges [B, H, M, k], int32
    below 2^30 edges, else int64. What follows after starts[.., N] has no meaning.

    Indices outside [0, N) are left out. The orders do not matter here.
    """
    N = entity_order.shape[2] if N is None else N
    B, H, M, k = indices.shape
    lists, edges, total = B * H, M * k, indices.numel()
    if total == 0:
        starts = torch.zeros(B, H, N + 1, dtype=torch.int64, device=indices.device)
        return starts, torch.zeros_like(indices, dtype=torch.int32)
    keys = indices.new_empty(total, dtype=torch.int32 if lists * (N + 1) < 2**31 else torch.int64)
    keys_kernel[(triton.cdiv(total, 1024),)](indices, keys, total, edges, N, BE=1024, num_warps=4)
    keys, places = torch.sort(keys, stable=True)
    starts = indices.new_empty(B, H, N + 1)
    out = indices.new_empty(indices.shape, dtype=torch.int32 if edges < 2**30 else torch.int64)
    grid = (triton.cdiv(max(total, starts.numel()), 1024),)
    lists_kernel[grid](
        keys, places,
        starts, out,
        total, edges, lists, N, k, slot_bits(k), edges.bit_length(),
        BE=1024, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    return starts, out
