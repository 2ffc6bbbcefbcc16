"""One query per lane walks outward over strips, nearest first, as long as a strip's edge is within its k-th distance.

Two passes. The first finds only tau, the k-th smallest distance: the k best distances live in registers, a candidate
passes through them like a bubble. The second goes the same way again with tau known and writes the keys
(distance bits << 32 | index) of what is nearer; of what is at tau exactly, the lowest indices.

Lanes that would take too long, because many points lie where strips cannot tell them apart, put their query on a list
that boxes.py serves. So do lanes whose warm start was wrong.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .brute import EXACT, JIT
from .grid import Grid, level_of_query, lower_edges_below

VISIT = 16  # steps that a visit to a strip counts for, besides its candidates
LANES = 64 if torch.version.hip else 32


# ---- distances and bounds -------------------------------------------------------------------------------------------
@triton.jit
def _squared(POINTS, total, j, inside, q, D: tl.constexpr):
    """((dx*dx) + dy*dy) + dz*dz; inf outside."""
    step = tl.load(POINTS + j, mask=inside, other=float("inf")) - q[0]
    d = step * step
    for a in tl.static_range(1, D):
        step = tl.load(POINTS + total.to(tl.int64) * a + j, mask=inside, other=float("inf")) - q[a]
        d = d + step * step
    return d


@triton.jit
def _at_least(near, slab, strip, last):
    """The least distance of points whose squared distances along the sort, slab and strip axes are at least these.

    Summed in the order of the dimensions, so that no rounding puts it above the distance of any such point.
    `last`: which axis comes last among the dimensions: 0 the sort axis, 1 the strips', 2 the slabs'.
    """
    first = tl.where(last == 0, slab + strip, tl.where(last == 1, slab, strip))
    return (first + near) + tl.where(last == 0, 0.0, tl.where(last == 1, strip, slab))


@triton.jit
def _window(SORTED, lo, hi, y, slab, strip, last, tau):
    """The part of the slots [lo, hi) of a strip that is within tau: two binary searches side by side."""
    start, start_end = lo, hi
    end, end_end = lo, hi
    width = tl.max(hi - lo, axis=0)
    while width > 0:
        middle = (start + start_end) >> 1
        going = start < start_end
        x = tl.load(SORTED + middle, mask=going, other=0.0)
        skip = (x < y) & (_at_least((x - y) * (x - y), slab, strip, last) > tau)
        start = tl.where(going & skip, middle + 1, start)
        start_end = tl.where(going & (skip == 0), middle, start_end)
        middle = (end + end_end) >> 1
        going = end < end_end
        x = tl.load(SORTED + middle, mask=going, other=0.0)
        keep = (x < y) | (_at_least((x - y) * (x - y), slab, strip, last) <= tau)
        end = tl.where(going & keep, middle + 1, end)
        end_end = tl.where(going & (keep == 0), middle, end_end)
        width = width >> 1
    return start, end


# ---- the walk -------------------------------------------------------------------------------------------------------
# Where a lane is: (walking, part, below, above, slab, base, down, up, slab_down, slab_up). `part`: 0, 1, 2 are the
# surroundings of the query in its own strip, what is below, what is above; 3: other strips. `below` and `above`: how
# many points on either side are done. `slab`: squared distance to the current slab, whose first strip is `base`; `down`
# and `up`: its next strips on either side; then the next slabs.
@triton.jit
def _visit(where, home, tau, SORTED, STARTS, SLABS, STRIPS, slabs, stride, D: tl.constexpr):
    """The slots that a lane scans next, whether there are any within tau, and where it is then."""
    walking, part, below, above, slab, base, down, up, slab_down, slab_up = where
    v_slab, v_strip, y, last, own, place = home
    inf = float("inf")
    strip = tl.zeros_like(y)
    cell = own
    if D > 1:
        away = walking & (part > 2)
        edge = tl.load(STRIPS + base + down + 1, mask=away & (down >= 0) & (down + 1 < stride), other=inf)
        to_down = tl.where(down >= 0, tl.maximum(v_strip - edge, 0.0), inf)
        edge = tl.load(STRIPS + base + up, mask=away & (up < stride), other=inf)
        to_up = tl.maximum(edge - v_strip, 0.0)
        upward = to_up < to_down
        nearest = tl.where(away, tl.minimum(to_up, to_down), 0.0)
        strip = nearest * nearest
        cell = tl.where(away, base + tl.where(upward, up, down), own)
        up += (away & upward).to(tl.int32)
        down -= (away & (upward == 0)).to(tl.int32)
    edge_distance = _at_least(tl.zeros_like(y), slab, strip, last)
    live = walking & (edge_distance <= tau) & (edge_distance < inf)
    lo = tl.load(STARTS + cell, mask=live, other=0)
    hi = tl.load(STARTS + cell + 1, mask=live, other=0)
    # As long as nothing bounds the search, twice as far each time; then as far as the bound reaches.
    far = live & (part < 3) & (tau == inf)
    more_below = far & (place - 2 * below > lo)
    more_above = far & (place + 2 * above < hi)
    first = tl.where(part == 2, place + above, tl.where((part == 0) | more_below, place - (1 + part) * below, lo))
    end = tl.where(part == 1, place - below, tl.where((part == 0) | more_above, place + (1 + part // 2) * above, hi))
    lo = tl.where(part < 3, tl.maximum(lo, first), lo)
    hi = tl.where(part < 3, tl.minimum(hi, end), hi)
    lo, hi = _window(SORTED, lo, tl.maximum(lo, hi), y, slab, strip, last, tau)
    below = tl.where(part == 1, tl.where(more_below, 2 * below, 1 << 29), below)
    above = tl.where(part == 2, tl.where(more_above, 2 * above, 1 << 29), above)
    again = (part == 2) & ((below < 1 << 29) | (above < 1 << 29))
    part = tl.where(again, 1, tl.minimum(part + 1, 3))
    if D == 1:
        walking = live & (part < 3)
    elif D == 2:
        walking = live
    else:
        done = walking & (live == 0)  # with this slab
        if tl.max(done.to(tl.int32), axis=0) > 0:
            edge = tl.load(SLABS + slab_down + 1, mask=done & (slab_down >= 0) & (slab_down + 1 < slabs), other=inf)
            to_down = tl.where(slab_down >= 0, tl.maximum(v_slab - edge, 0.0), inf)
            edge = tl.load(SLABS + slab_up, mask=done & (slab_up < slabs), other=inf)
            to_up = tl.maximum(edge - v_slab, 0.0)
            upward = to_up < to_down
            nearest = tl.minimum(to_up, to_down)
            slab = tl.where(done, nearest * nearest, slab)
            base = tl.where(done, tl.where(upward, slab_up, slab_down) * stride, base)
            slab_up += (done & upward).to(tl.int32)
            slab_down -= (done & (upward == 0)).to(tl.int32)
            edge_distance = _at_least(tl.zeros_like(y), slab, tl.zeros_like(y), last)
            entered = done & (edge_distance <= tau) & (edge_distance < inf)
            middle = lower_edges_below(STRIPS + base, tl.where(entered, stride, 1), v_strip)
            down = tl.where(entered, middle, down)
            up = tl.where(entered, middle + 1, up)
            walking = live | entered
    return lo, hi, live, (walking, part, below, above, slab, base, down, up, slab_down, slab_up)


@triton.jit
def _seen(ids, limit, skip):
    return (ids <= limit) & (ids != skip)


@triton.jit
def _bubble(best, c, K: tl.constexpr):
    """The K smallest of `best`, ascending, and c."""
    bubbled = ()
    for s in tl.static_range(K):
        bubbled = bubbled + (tl.minimum(best[s], c),)
        c = tl.maximum(best[s], c)
    return bubbled


@triton.jit(**JIT)
def strip_kernel(
    Q, ROWS, LQ, BOUND,  # inputs: queries, the order to serve them in, how many are in use, from the warm start
    POINTS, SORTED, IDS, STARTS, AXES, SLABS, STRIPS, STRIDE,  # inputs: the grid
    KEYS, LIST, COUNT,  # outputs: keys [B, M, k] in any order; rows that are left to boxes.py, and how many
    queries, M, total, C, L, slabs, cells, k,  # shapes
    causal, include_self, warm, budget,  # numbers: 0 or 1; steps that a lane may take
    HAS_LQ: tl.constexpr, MASKED: tl.constexpr,  # MASKED: causal, or without self
    D: tl.constexpr, K: tl.constexpr,  # K: length of the lists, at least k
    W: tl.constexpr, VISIT: tl.constexpr, BM: tl.constexpr,  # tunable
):  # fmt: skip
    inf = float("inf")
    lane = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = lane < queries
    row = tl.load(ROWS + lane, mask=ok, other=0)
    b, i = row // M, row % M
    q = ()
    spoiled = tl.zeros((BM,), tl.float32)
    for a in tl.static_range(D):
        x = tl.load(Q + row.to(tl.int64) * D + a, mask=ok, other=0.0)
        q = q + (x,)
        spoiled += x * 0.0
    asks = ok & (spoiled == 0.0)
    if HAS_LQ:
        asks = asks & (i < tl.load(LQ + b, mask=ok, other=0))
    bound = tl.load(BOUND + row, mask=asks & (warm > 0), other=inf)
    limit = tl.where(causal > 0, i - 1 + include_self, 0x7FFFFFFF)
    skip = tl.where(include_self > 0, -1, i)

    g = (b * L + level_of_query(i, C, L)).to(tl.int64)
    SLABS += g * slabs
    STRIPS += g * cells
    STARTS += g * (cells + 1)
    axis = tl.load(AXES + 3 * g, mask=asks, other=0)
    y = tl.load(Q + row.to(tl.int64) * D + axis, mask=asks, other=0.0)
    v_slab, v_strip, last = y, y, tl.zeros_like(i)
    stride = tl.zeros_like(i) + 1
    slab, own = tl.zeros_like(i), tl.zeros_like(i)
    if D > 1:
        stride = tl.load(STRIDE + g, mask=asks, other=1)
        along = tl.load(AXES + 3 * g + 1, mask=asks, other=0)
        v_strip = tl.load(Q + row.to(tl.int64) * D + along, mask=asks, other=0.0)
        last = (along == D - 1).to(tl.int32)
    if D > 2:
        along = tl.load(AXES + 3 * g + 2, mask=asks, other=0)
        v_slab = tl.load(Q + row.to(tl.int64) * D + along, mask=asks, other=0.0)
        last = tl.where(along == D - 1, 2, last)
        slab = lower_edges_below(SLABS, tl.where(asks, slabs, 1), v_slab)
        own = slab * stride
    strip = tl.zeros_like(i)
    if D > 1:
        strip = lower_edges_below(STRIPS + own, stride, v_strip)
    base = own
    own += strip
    # The query's place in its own strip: a window of nothing but y.
    lo = tl.load(STARTS + own, mask=asks, other=0)
    hi = tl.load(STARTS + own + 1, mask=asks, other=0)
    nothing = tl.zeros_like(y)
    place, place_end = _window(SORTED, lo, hi, y, nothing, nothing, last, nothing - 1.0)

    best = ()
    for s in tl.static_range(K):
        best = best + (tl.where(s < K - k, -inf, nothing + inf),)
    used = tl.zeros_like(i)
    late = asks & (used > 0)
    # Near the end of a strip the surroundings are moved inward: they always hold 2 W points, if the strip does.
    place = tl.maximum(tl.minimum(place, hi - W), lo + W)
    home = (v_slab, v_strip, y, last, own, place)
    around = tl.zeros_like(i) + W
    where = (asks, tl.zeros_like(i), around, around, nothing, base, strip - 1, strip + 1, slab - 1, slab + 1)
    while tl.max(where[0].to(tl.int32), axis=0) > 0:
        tau = tl.minimum(best[K - 1], bound)
        lo, hi, live, where = _visit(where, home, tau, SORTED, STARTS, SLABS, STRIPS, slabs, stride, D)
        used += tl.where(live, hi - lo + VISIT, 0)
        late = late | (used > budget)
        hi = tl.where(late, lo, hi)
        where = (where[0] & (late == 0),) + where[1:]
        for t in range(0, tl.max(hi - lo, axis=0)):
            j = lo + t
            inside = j < hi
            if MASKED:
                inside = inside & _seen(tl.load(IDS + j, mask=inside, other=0x7FFFFFFF), limit, skip)
            best = _bubble(best, _squared(POINTS, total, j, inside, q, D), K)
    tau = best[K - 1]
    late = late | (asks & (tau > bound))
    asks = asks & (late == 0)
    nearer = k - K + tl.zeros_like(i)  # how many of the k are at less than tau
    for s in tl.static_range(K):
        nearer += (best[s] < tau).to(tl.int32)

    out = KEYS + row.to(tl.int64) * k
    written, ties = tl.zeros_like(i), tl.zeros_like(i)
    where = (asks, tl.zeros_like(i) + 3, around, around, nothing, base, strip, strip + 1, slab - 1, slab + 1)
    while tl.max(where[0].to(tl.int32), axis=0) > 0:
        lo, hi, live, where = _visit(where, home, tau, SORTED, STARTS, SLABS, STRIPS, slabs, stride, D)
        for t in range(0, tl.max(hi - lo, axis=0)):
            j = lo + t
            inside = j < hi
            ids = tl.load(IDS + j, mask=inside, other=0x7FFFFFFF)
            if MASKED:
                inside = inside & _seen(ids, limit, skip)
            d = _squared(POINTS, total, j, inside, q, D)
            near, tie = d < tau, (d == tau) & (d < inf)
            to = tl.where(near, written, nearer + ties)
            key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)
            tl.store(out + to, key, mask=(near | tie) & (to < k))
            written += near.to(tl.int32)
            ties += tie.to(tl.int32)

    crowded = asks & (ties > k - nearer)
    if tl.max(crowded.to(tl.int32), axis=0) > 0:  # which of the ties have the lowest indices?
        lowest = ()
        for _s in tl.static_range(K):
            lowest = lowest + (tl.zeros_like(i) + 0x7FFFFFFF,)
        where = (crowded, tl.zeros_like(i) + 3, around, around, nothing, base, strip, strip + 1, slab - 1, slab + 1)
        while tl.max(where[0].to(tl.int32), axis=0) > 0:
            lo, hi, live, where = _visit(where, home, tau, SORTED, STARTS, SLABS, STRIPS, slabs, stride, D)
            for t in range(0, tl.max(hi - lo, axis=0)):
                j = lo + t
                inside = j < hi
                ids = tl.load(IDS + j, mask=inside, other=0x7FFFFFFF)
                if MASKED:
                    inside = inside & _seen(ids, limit, skip)
                tie = _squared(POINTS, total, j, inside, q, D) == tau
                lowest = _bubble(lowest, tl.where(inside & tie, ids, 0x7FFFFFFF), K)
        bits = tau.to(tl.int32, bitcast=True).to(tl.int64) << 32
        for s in tl.static_range(K):
            tl.store(out + nearer + s, bits | lowest[s].to(tl.int64), mask=crowded & (s < k - nearer))

    found = tl.where(asks, nearer + tl.minimum(ties, k - nearer), 0)
    served = ok & (late == 0)
    for s in range(tl.min(tl.where(served, found, k), axis=0), k):
        tl.store(out + s, tl.zeros_like(row).to(tl.int64) + 0x7F800000FFFFFFFF, mask=served & (s >= found))
    left = tl.sum(late.to(tl.int32), axis=0)
    if left > 0:
        to = tl.atomic_add(COUNT, left) + tl.cumsum(late.to(tl.int32), axis=0) - 1
        tl.store(LIST + to, row, mask=late)


# ---- launchers ------------------------------------------------------------------------------------------------------
def around(K: int) -> int:
    """How many points on either side of a query are looked at before anything else."""
    return max(2, K // 2)


def budget_of(K: int) -> int:
    return 1024 + 64 * K


def search(
    queries: Tensor, rows: Tensor, query_lengths: Tensor | None, bound: Tensor | None, grid: Grid, k: int, K: int,
    causal: bool, include_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Keys int64 [B, M, k], in any order within a row; the rows int32 [B * M] that are left to do, and how many [1]."""
    B, M, D = queries.shape
    layout, cuts = grid.layout, grid.cuts
    keys = torch.empty(B, M, k, dtype=torch.int64, device=queries.device)
    left, count = torch.empty_like(rows), rows.new_zeros(1)
    strip_kernel[(triton.cdiv(B * M, LANES),)](
        queries, rows, queries if query_lengths is None else query_lengths, queries if bound is None else bound,
        grid.points, grid.sorted, grid.ids, grid.starts, cuts.axes, cuts.slabs, cuts.strips, cuts.stride,
        keys, left, count,
        B * M, M, B * layout.slots, layout.C, layout.levels, layout.slabs, layout.cells, k,
        int(causal), int(include_self), int(bound is not None), budget_of(K),
        HAS_LQ=query_lengths is not None, MASKED=causal or not include_self, D=D, K=K,
        W=around(K), VISIT=VISIT, BM=LANES, num_warps=1, **EXACT,
    )  # fmt: skip
    return keys, left, count
