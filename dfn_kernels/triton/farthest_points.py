"""Farthest point sampling in Triton: one program per set, a pass over its points for every choice.

Not yet run on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False}


@triton.jit
def farthest_kernel(
    P, PTR, OUT_PTR, START,  # inputs: points [N, D], offsets [S + 1], [S + 1], first choices [S]
    DISTS,  # work [N]
    OUT,  # output [total], filled with -1
    N, D, total,  # shapes
    HAS_START: tl.constexpr,
    BN: tl.constexpr,  # tunable
):  # fmt: skip
    s = tl.program_id(0)
    first = tl.minimum(tl.maximum(tl.load(PTR + s), 0), N)
    n = tl.minimum(tl.maximum(tl.load(PTR + s + 1), first), N) - first
    out = tl.minimum(tl.maximum(tl.load(OUT_PTR + s), 0), total)
    count = tl.minimum(tl.minimum(tl.load(OUT_PTR + s + 1), total) - out, n)
    P += first * D
    DISTS += first
    chosen = tl.zeros((), tl.int64)
    if HAS_START:
        chosen = tl.minimum(tl.maximum(tl.load(START + s), 0), n - 1)
    lane = tl.arange(0, BN).to(tl.int64)
    inf = float("inf")
    for step in range(0, count):
        tl.store(OUT + out + step, first + chosen)
        farthest = tl.zeros((), DISTS.dtype.element_ty) - 2
        next = n
        # A thread meets the same points in every pass, so nobody waits for another's distances.
        for start in range(0, n, BN):
            i = start + lane
            inside = i < n
            far = tl.zeros((BN,), DISTS.dtype.element_ty)
            odd = far
            for a in range(0, D):
                x = tl.load(P + i * D + a, mask=inside, other=0.0)
                gap = x - tl.load(P + chosen * D + a)
                far = far + gap * gap
                odd += x - x  # not 0 where x is not finite
            d = tl.load(DISTS + i, mask=inside & (step > 0), other=inf)
            d = tl.where((step == 0) & (odd != 0), 0.0, d)
            d = tl.where(far < d, far, d)
            d = tl.where(i == chosen, -1.0, d)
            tl.store(DISTS + i, d, mask=inside)
            d = tl.where(inside, d, -2.0)
            best = tl.max(d, axis=0)
            place = tl.min(tl.where(d == best, i, n), axis=0)
            next = tl.where(best > farthest, place, next)
            farthest = tl.maximum(farthest, best)
        chosen = next


# ---- launcher -------------------------------------------------------------------------------------------------------
def farthest_points(points: Tensor, ptr: Tensor, out_ptr: Tensor, start: Tensor | None, total: int) -> Tensor:
    out = ptr.new_full((total,), -1)
    S = len(ptr) - 1
    if total and len(points) and S:
        work = points.new_empty(len(points))
        farthest_kernel[(S,)](
            points, ptr, out_ptr, ptr if start is None else start, work, out, *points.shape, total,
            HAS_START=start is not None, BN=1024, num_warps=4, **EXACT,
        )  # fmt: skip
    return out
