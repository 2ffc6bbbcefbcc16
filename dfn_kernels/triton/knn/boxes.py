"""One query per program searches boxes, nearest first: for lists too long for registers, and for queries that strips
cannot bound.

A box of points has a least possible key: (distance bits of its nearest corner << 32 | its lowest index). Boxes of boxes
have one, too. Whatever is above the k-th best key is skipped, so ties are decided by index early: N points at
distance 0 cost a few boxes, not N.
"""

import triton
import triton.language as tl
from torch import Tensor

from .brute import EXACT, JIT
from .grid import SUPER, Grid, level_of_query

PROGRAMS = 4096  # for a list whose length only the device knows


@triton.jit
def _least_keys(EDGES, FIRST, pitch, at, inside, q, limit, D: tl.constexpr):
    inf = float("inf")
    low = tl.load(EDGES + at, mask=inside, other=inf)
    high = tl.load(EDGES + pitch * D + at, mask=inside, other=-inf)
    off = tl.maximum(tl.maximum(low - q[0], q[0] - high), 0.0)
    d = off * off
    for a in tl.static_range(1, D):
        low = tl.load(EDGES + pitch * a + at, mask=inside, other=inf)
        high = tl.load(EDGES + pitch * (D + a) + at, mask=inside, other=-inf)
        off = tl.maximum(tl.maximum(low - q[a], q[a] - high), 0.0)
        d = d + off * off
    first = tl.load(FIRST + at, mask=inside, other=0x7FFFFFFF)
    key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | first.to(tl.int64)
    return tl.where(inside & (d < inf) & (first <= limit), key, 0x7F800000FFFFFFFF)


@triton.jit(**JIT)
def nearest_kernel(
    Q, LIST, COUNT, LQ,  # inputs: queries, rows to serve, how many rows, how many queries are in use
    POINTS, IDS, STARTS, EDGES, FIRST,  # inputs: the grid and its boxes
    KEYS,  # output: keys [B, M, k], ascending
    M, total, slots, boxes, C, L, cells, k,  # shapes
    causal, include_self,  # 0 or 1
    HAS_LQ: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr, SUPER: tl.constexpr,  # K: points in a box, length of the list, at least k; boxes in a box of boxes
):  # fmt: skip
    slot = tl.arange(0, K)
    lane = tl.arange(0, SUPER)
    for t in range(tl.program_id(0), tl.load(COUNT), tl.num_programs(0)):
        row = tl.load(LIST + t)
        b, i = row // M, row % M
        q = ()
        spoiled = 0.0
        for a in tl.static_range(D):
            x = tl.load(Q + row.to(tl.int64) * D + a)
            q = q + (x,)
            spoiled += x * 0.0
        asks = spoiled == 0.0
        if HAS_LQ:
            asks = asks & (i < tl.load(LQ + b))
        pitch = boxes + boxes // SUPER
        limit = tl.where(causal > 0, i - 1 + include_self, 0x7FFFFFFF)
        skip = tl.where(include_self > 0, -1, i)
        m = level_of_query(i, C, L)
        end = tl.load(STARTS + (b * L + m + 1).to(tl.int64) * (cells + 1) - 1)
        begin_box = (b * slots + 2 * C - ((2 * C) >> m)) // K
        end_box = tl.where(asks, tl.cdiv(end, K), begin_box)
        end_super = tl.cdiv(end_box, SUPER)

        best = tl.zeros((K,), tl.int64) + 0x7F800000FFFFFFFF  # ascending
        worst = tl.max(best, axis=0)  # the k-th
        for s in range(begin_box // SUPER, end_super, SUPER):
            outer = _least_keys(EDGES, FIRST, pitch, boxes + s + lane, s + lane < end_super, q, limit, D)
            nearest = tl.min(outer, axis=0)
            while nearest < worst:
                which = tl.min(tl.where(outer == nearest, lane, SUPER), axis=0)
                outer = tl.where(lane == which, 0x7F800000FFFFFFFF, outer)
                at = (s + which) * SUPER + lane
                inner = _least_keys(EDGES, FIRST, pitch, at, (at >= begin_box) & (at < end_box), q, limit, D)
                closest = tl.min(inner, axis=0)
                while closest < worst:
                    box = tl.min(tl.where(inner == closest, lane, SUPER), axis=0)
                    inner = tl.where(lane == box, 0x7F800000FFFFFFFF, inner)
                    j = ((s + which) * SUPER + box) * K + slot
                    inside = j < end
                    ids = tl.load(IDS + j, mask=inside, other=0x7FFFFFFF)
                    inside = inside & (ids <= limit) & (ids != skip)
                    step = tl.load(POINTS + j, mask=inside, other=float("inf")) - q[0]
                    d = step * step
                    for a in tl.static_range(1, D):
                        step = tl.load(POINTS + total.to(tl.int64) * a + j, mask=inside, other=float("inf")) - q[a]
                        d = d + step * step
                    key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)
                    key = tl.where(d < float("inf"), key, 0x7F800000FFFFFFFF)
                    if tl.min(key, axis=0) < worst:
                        best = tl.bitonic_merge(tl.minimum(best, tl.sort(key, descending=True)))
                        worst = tl.sum(tl.where(slot == k - 1, best, 0), axis=0)
                    closest = tl.min(inner, axis=0)
                nearest = tl.min(outer, axis=0)
        tl.store(KEYS + row.to(tl.int64) * k + slot, best, mask=slot < k)


# ---- launcher -------------------------------------------------------------------------------------------------------
def search(
    queries: Tensor, rows: Tensor, count: Tensor, query_lengths: Tensor | None, grid: Grid, causal: bool,
    include_self: bool, keys: Tensor,
) -> None:  # fmt: skip
    """Writes the keys [B, M, k], ascending, of the first `count` [1] rows of the list `rows`."""
    B, M, D = queries.shape
    layout = grid.layout
    nearest_kernel[(min(len(rows), PROGRAMS),)](
        queries, rows, count, queries if query_lengths is None else query_lengths,
        grid.points, grid.ids, grid.starts, grid.edges, grid.first,
        keys,
        M, B * layout.slots, layout.slots, grid.boxes, layout.C, layout.levels, layout.cells, keys.shape[2],
        int(causal), int(include_self),
        HAS_LQ=query_lengths is not None, D=D, K=layout.box, SUPER=SUPER, num_warps=max(1, layout.box // 256), **EXACT,
    )  # fmt: skip
