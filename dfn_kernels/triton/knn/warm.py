"""What neighbours found before tell about a search: nothing farther than the farthest of them is needed.

Only if they are k different points that the query may see. Nobody checks that: a search that finds fewer than k points
within the bound knows that it was wrong.
"""

import triton
import triton.language as tl
from torch import Tensor

from .brute import EXACT
from .tree import JIT


@triton.jit(**JIT)
def warm_kernel(
    P, Q, WARM,  # inputs: points [B, N, D], queries [B, M, D], their supposed neighbours [B, M, k]
    BOUND,  # output [B, M]
    queries, N, M, k,
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The largest distance to the supposed neighbours; inf if one of them is no point."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = row < queries
    at = row.to(tl.int64)
    batch = P + (at // M) * N * D
    bound = tl.zeros((BM,), tl.float32)
    for s in range(0, k):
        j = tl.load(WARM + at * k + s, mask=ok, other=-1)
        known = ok & (j >= 0) & (j < N)
        step = tl.load(batch + j * D, mask=known, other=0.0) - tl.load(Q + at * D, mask=known, other=0.0)
        d = step * step
        for a in tl.static_range(1, D):
            step = tl.load(batch + j * D + a, mask=known, other=0.0) - tl.load(Q + at * D + a, mask=known, other=0.0)
            d = d + step * step
        bound = tl.maximum(bound, tl.where(known & (d < float("inf")), d, float("inf")))
    tl.store(BOUND + row, bound, mask=ok)


# ---- launcher -------------------------------------------------------------------------------------------------------
def bound_by(warm: Tensor, points: Tensor, queries: Tensor) -> Tensor:
    """float32 [B, M]. Whoever has k different points within this distance need not look further."""
    (B, N, D), M = points.shape, queries.shape[1]
    bound = points.new_empty(B, M)
    grid = (triton.cdiv(B * M, 128),)
    warm_kernel[grid](points, queries, warm, bound, B * M, N, M, warm.shape[2], D=D, BM=128, num_warps=4, **EXACT)
    return bound
