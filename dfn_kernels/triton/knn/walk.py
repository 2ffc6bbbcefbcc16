"""A packet of neighbouring queries, one a lane, walks over the tree and looks into every leaf that any of them needs.

The packet starts at its own seat. Then branches and nodes in the order of their least possible keys, (distance bits of
the nearest corner << 32 | lowest index), as long as one is below the worst key of any lane; then a node's leaves, each
tested by every lane for itself. All lanes load the same box and the same point at the same time.

A least possible key is never above the key of a point in the box (docs/search.md), so where thousands of points tie,
the boxes with the lowest indices come first and the others are left out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lists
from . import tree as trees
from .lists import FAR, forget, merge_list, nearest_of_nothing, thin, write, write_nothing
from .rows import rows_at, same_row, wide
from .tree import JIT, Tree, level_of_query


@triton.jit
def key_of(d, index):
    """Of a distance and an index, neither of them negative: without a sign to extend it takes two instructions less."""
    return (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def least_keys(box, low, high, D: tl.constexpr):
    """Of boxes, seen from the box between `low` and `high`. Of an empty one: not below FAR."""
    for a in tl.static_range(D):
        lower, upper = box[a].to(tl.float32, bitcast=True), box[D + a].to(tl.float32, bitcast=True)
        off = tl.maximum(tl.maximum(lower - high[a], low[a] - upper), 0.0)
        if a == 0:
            d = off * off
        else:
            d = d + off * off
    return key_of(d, box[2 * D])


@triton.jit
def any_needs(ROW, q, worst, limit, D: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr):
    """Whether a lane may find in the box at ROW what is below the worst that it keeps."""
    box = same_row(ROW, LANES, wide(2 * D + 1))
    needed = least_keys(box, q, q, D) < worst
    if MASKED:
        needed = needed & (box[2 * D] <= limit)
    return tl.max(needed.to(tl.int32), axis=0) > 0


@triton.jit
def least_of(keys, child, FAN: tl.constexpr):
    """The least of FAN keys, and which it is. By 32 bits at a time: the hardware has that in one instruction."""
    d, low = (keys >> 32).to(tl.int32), keys.to(tl.int32)
    nearest = tl.min(d, axis=0)
    first = tl.min(tl.where(d == nearest, low, 0x7FFFFFFF), axis=0)
    which = tl.min(tl.where((d == nearest) & (low == first), child, FAN), axis=0)
    return (nearest.to(tl.int64) << 32) | first.to(tl.int64), which


@triton.jit
def sq_dist(point, q, D: tl.constexpr):
    step = point[0].to(tl.float32, bitcast=True) - q[0]
    d = step * step
    for a in tl.static_range(1, D):
        step = point[a].to(tl.float32, bitcast=True) - q[a]
        d = d + step * step
    return d


@triton.jit
def zeros_first(
    FIRSTS, BEST, q, limit, skip, lacking, scale, k, kept, firsts,
    D: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Where squares of differences round to zero for any two points of a large share of all pairs, the neighbours are
    the first points at distance zero. Those of each lane among the first points; the lanes that have k of them.
    """
    expected = k + 0.0  # how many points it takes to find them
    for _ in tl.static_range(D):
        expected *= tl.maximum(tl.minimum(scale, 1e-19) * 4.7e22, 1.0)  # 1.25 / 2^-75, whose square rounds to zero
    count = tl.zeros_like(limit)
    start = tl.where(expected * 2.0 < firsts, 0, firsts)
    while (start < firsts) & (tl.max(lacking.to(tl.int32), axis=0) > 0):
        for c in tl.static_range(GROUP):
            j = tl.minimum(start + c, firsts - 1)
            d = sq_dist(same_row(FIRSTS + j * wide(D + 1), LANES, wide(D + 1)), q, D)
            wanted = lacking & (d == 0.0) & (start + c < firsts) & (j <= limit) & (j != skip) & (count < k)
            tl.store(BEST + (kept - k + count) * LANES, count.to(tl.int64) * 0 + j, mask=wanted)
            count += wanted.to(tl.int32)
        lacking = lacking & (count < k)
        start += GROUP
    few = count < k  # these walk, and meet the same points again
    for s in range(0, tl.max(tl.where(few, count, 0), axis=0)):
        tl.store(BEST + (kept - k + s) * LANES, count.to(tl.int64) * 0 + FAR, mask=few)
    return count == k


@triton.jit(**JIT)
def walk_kernel(
    Q, ROWS, SEATS, LQ, BOUND,  # inputs: queries, the order to serve them in, how many are in use, from the warm start
    POINTS, FIRSTS, BOXES, FRAME,  # inputs: the tree
    MEMORY,  # scratch [programs, CAP + kept, LANES]
    OUT_I, OUT_D,  # outputs [B, M, k]
    queries, M, slots, nodes, branches, C, L, k, kept, firsts,  # shapes
    causal, include_self, around,  # 0 or 1, 0 or 1, leaves
    HAS_LQ: tl.constexpr, HAS_BOUND: tl.constexpr, MASKED: tl.constexpr,  # MASKED: causal, or without self
    D: tl.constexpr,
    ONE: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr,  # K = 2^LOG keys are merged at a time; ONE: no more are kept
    NEAR: tl.constexpr, LOG_NEAR: tl.constexpr,  # lists are thinned by so many distances, 2^LOG_NEAR; 0: they are not
    JUMP: tl.constexpr,
    LEAF: tl.constexpr, FAN: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    POINT: tl.constexpr = wide(D + 1)
    BOX: tl.constexpr = wide(2 * D + 1)
    lane = tl.arange(0, LANES)
    child = tl.arange(0, FAN)
    MEMORY += tl.program_id(0).to(tl.int64) * ((CAP + kept) * LANES)
    LIST = MEMORY + lane
    BEST = LIST + CAP * LANES
    for packet in range(tl.program_id(0), tl.cdiv(queries, LANES), tl.num_programs(0)):
        at = packet * LANES + lane
        ok = at < queries
        row = tl.load(ROWS + at, mask=ok, other=0)
        seat = tl.load(SEATS + at, mask=ok, other=0)
        b, i = row // M, row % M
        q = ()
        spoiled = tl.zeros_like(row).to(tl.float32)  # 0 * x is 0 for finite x, NaN otherwise
        for a in tl.static_range(D):
            x = tl.load(Q + row.to(tl.int64) * D + a, mask=ok, other=0.0)
            q = q + (x,)
            spoiled += x * 0.0
        todo = ok & (spoiled == 0.0)
        follows = ok & (lane > 0)
        before = tl.load(ROWS + at - 1, mask=follows, other=0).to(tl.int64)
        gap = spoiled * 0.0
        for a in tl.static_range(D):
            gap = tl.maximum(gap, tl.abs(q[a] - tl.load(Q + before * D + a, mask=follows, other=0.0)))
        gap = tl.minimum(gap, 1e37)
        if HAS_LQ:
            todo = todo & (i < tl.load(LQ + b, mask=ok, other=0))
        place = b * L + level_of_query(i, C, L)
        limit = tl.where(causal > 0, i - 1 + include_self, 0x7FFFFFFF)
        skip = tl.where(include_self > 0, -1, i)
        start = tl.zeros_like(row).to(tl.int64) + FAR  # no key from here on is wanted
        if HAS_BOUND:
            bound = tl.load(BOUND + row, mask=todo, other=float("inf"))
            start = tl.minimum(start, (bound.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 0xFFFFFFFF)
        write_nothing(OUT_I, OUT_D, row.to(tl.int64) * k, ok & (todo == 0), k)

        while tl.max(todo.to(tl.int32), axis=0) > 0:  # a segment at a time; again, if a warm start was wrong
            segment = tl.min(tl.where(todo, place, 0x7FFFFFFF), axis=0)
            active = todo & (place == segment)
            # Where the order jumps, queries are no neighbours: what lies behind the jump walks by itself.
            jump = tl.where(active & (lane > tl.min(tl.where(active, lane, LANES), axis=0)), gap, 0.0)
            widest = tl.max(jump, axis=0)
            behind = tl.min(tl.where(jump == widest, lane, LANES), axis=0)
            active = active & (lane < tl.where(widest * JUMP > tl.sum(jump, axis=0), behind, LANES))
            m = segment % L
            begin = ((segment // L) * slots + 2 * C - ((2 * C) >> m)) // LEAF
            end = begin + (C >> m) // LEAF
            batch = (segment // L).to(tl.int64)
            scale = tl.load(FRAME + batch * (D + 1) + D)
            forget(BEST, start, kept, k, LANES)
            among = FIRSTS + batch * firsts * POINT
            done = zeros_first(among, BEST, q, limit, skip, active, scale, k, kept, firsts, D, GROUP, LANES)
            walks = active & (done == 0)
            low, high = (), ()
            for a in tl.static_range(D):
                low = low + (tl.min(tl.where(walks, q[a], float("inf")), axis=0),)
                high = high + (tl.max(tl.where(walks, q[a], -float("inf")), axis=0),)
            last = tl.max(tl.where(walks, limit, -1), axis=0)

            # The leaves around the seat, and of one node.
            middle = tl.min(tl.where(active, seat, 0x7FFFFFFF), axis=0) // 2
            middle = (middle + tl.max(tl.where(active, seat, 0), axis=0) // 2) // LEAF
            middle = tl.minimum(tl.maximum(middle, begin), end - 1)
            node = middle // FAN
            seeds = tl.minimum(middle - around // 2, node * FAN + FAN - around)
            seeds = tl.maximum(seeds, tl.maximum(node * FAN, begin))
            after_seeds = tl.minimum(tl.minimum(seeds + around, node * FAN + FAN), end)
            here = node * FAN + child
            # The least keys of the leaves of this node that are still to be looked into; those around the seat first.
            pending = tl.where((here >= seeds) & (here < after_seeds), tl.zeros_like(child).to(tl.int64) - 1, FAR)

            branch, top = node * 0, begin // (FAN * FAN)
            outer = tl.zeros_like(child).to(tl.int64) + FAR  # of the branches from top - FAN on
            inner = outer  # and of the nodes of this branch
            if NEAR > 0:
                near = nearest_of_nothing(row, kept, k, NEAR)
            worst = tl.where(walks, start, -1)
            worst_of_all = tl.max(worst, axis=0)
            old = tl.zeros_like(row)
            to = old  # the end of each lane's list, in keys of all lanes
            longest = tl.max(old, axis=0)
            going = longest == 0
            while going:
                # Nearest first, but for the last bits of the distance: they make room for which it is.
                code = ((pending >> 32).to(tl.int32) & -FAN) | child
                which = tl.min(tl.where(pending < worst_of_all, code, 0x7FFFFFFF), axis=0)
                full = longest < 0
                if which < 0x7FFFFFFF:
                    which = which & (FAN - 1)
                    pending = tl.where(child == which, FAR, pending)
                    leaf = node * FAN + which
                    if any_needs(BOXES + leaf.to(tl.int64) * BOX, q, worst, limit, D, LANES, MASKED):
                        FROM = POINTS + leaf.to(tl.int64) * (LEAF * POINT)
                        for g in tl.static_range(0, LEAF, GROUP):
                            points = ()
                            for c in tl.static_range(GROUP):
                                points = points + (same_row(FROM + (g + c) * POINT, LANES, POINT),)
                            for c in tl.static_range(GROUP):
                                d = sq_dist(points[c], q, D)
                                index = points[c][D]
                                key = key_of(d, index)
                                wanted = key < worst
                                if MASKED:
                                    wanted = wanted & (index <= limit) & (index != skip)
                                tl.store(LIST + to, key, mask=wanted)
                                to = tl.where(wanted, to + LANES, to)
                        longest = tl.max(to, axis=0) // LANES
                        full = longest > CAP - LEAF
                else:
                    full = (worst_of_all >= FAR) & (longest > 0)  # any bound is better than none
                    nearest, which = least_of(inner, child, FAN)
                    if nearest < worst_of_all:
                        inner = tl.where(child == which, FAR, inner)
                        at_node = (nodes * FAN + branch * FAN + which).to(tl.int64)
                        if any_needs(BOXES + at_node * BOX, q, worst, limit, D, LANES, MASKED):
                            node = branch * FAN + which
                            here = node * FAN + child
                            inside = (here >= begin) & (here < end) & ((here < seeds) | (here >= after_seeds))
                            box = rows_at(BOXES, here, inside, FAN, BOX)
                            pending = tl.where(inside & (box[2 * D] <= last), least_keys(box, low, high, D), FAR)
                    else:
                        nearest, which = least_of(outer, child, FAN)
                        if nearest < worst_of_all:
                            outer = tl.where(child == which, FAR, outer)
                            at_branch = ((nodes + branches) * FAN + top - FAN + which).to(tl.int64)
                            if any_needs(BOXES + at_branch * BOX, q, worst, limit, D, LANES, MASKED):
                                branch = top - FAN + which
                                here = branch * FAN + child
                                inside = (here >= begin // FAN) & (here * FAN < end)
                                box = rows_at(BOXES, nodes * FAN + here, inside, FAN, BOX)
                                inner = tl.where(inside & (box[2 * D] <= last), least_keys(box, low, high, D), FAR)
                        else:
                            going = top * (FAN * FAN) < end
                            here = top + child
                            inside = here * (FAN * FAN) < end
                            box = rows_at(BOXES, (nodes + branches) * FAN + here, inside, FAN, BOX)
                            outer = tl.where(inside & (box[2 * D] <= last), least_keys(box, low, high, D), FAR)
                            top += FAN
                if full | (going == 0):
                    count = to // LANES
                    if NEAR > 0:
                        near, worst, count = thin(LIST, near, worst, count, old, longest, LANES, NEAR, LOG_NEAR)
                        longest = tl.max(count, axis=0)
                    if (NEAR == 0) | (longest > CAP - LEAF) | (going == 0):
                        found = merge_list(LIST, BEST, count, longest, kept, ONE, LANES, K, LOG)
                        worst = tl.minimum(worst, found)
                        count = tl.zeros_like(row)
                        longest = tl.max(count, axis=0)
                    old = count
                    to = count * LANES
                    worst_of_all = tl.max(worst, axis=0)

            found = tl.load(BEST + (kept - 1) * LANES)
            served = active
            if HAS_BOUND:  # fewer than k within the bound: then it was not the distance to k different points
                served = active & ((found < FAR) | (start == FAR))
                start = tl.where(active, FAR, start)
            write(MEMORY + CAP * LANES, OUT_I, OUT_D, row.to(tl.int64) * k, served, kept, k, LANES)
            todo = todo & (served == 0)


# ---- launcher -------------------------------------------------------------------------------------------------------
# The order jumps where one gap is longer than half of all others of the packet: cut there, it walks two short ways
# instead of testing all that lies between.
JUMP = 3.0
BATCH = 8  # of keys that are merged at the end: more would take the most registers of all, and fewer programs fit


def seeds(k: int) -> int:
    """Leaves at a packet's seat that it looks into before anything else."""
    return min(trees.FAN, max(3, triton.cdiv(3 * k, trees.LEAF)))


def registers(D: int, k: int) -> int:
    """Few, and nothing spills in what the tests compile: ptxas spills a few bytes at some limits in between."""
    return 232 if D > 3 else 160 if k <= lists.THINNED else 184


def group(D: int) -> int:
    """Points that are loaded before any is looked at: as many as leave registers for the rest."""
    return min(trees.LEAF, 8 if D <= 3 else 2)


def search(
    queries: Tensor, rows: Tensor, seats: Tensor, query_lengths: Tensor | None, bound: Tensor | None, tree: Tree,
    k: int, causal: bool, include_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and squared distances [B, M, k]."""
    B, M, D = queries.shape
    layout = tree.layout
    (near, kept), CAP = lists.sizes(k), 3 * trees.LEAF
    K, near = min(near, BATCH), near if near == kept else 0
    most = lists.resident(queries.device, registers(D, k))
    programs = lists.programs(triton.cdiv(B * M, lists.LANES), CAP + kept, most)
    indices = torch.empty(B, M, k, dtype=torch.int64, device=queries.device)
    sq_dists = torch.empty(B, M, k, device=queries.device)
    memory = torch.empty(programs * (CAP + kept) * lists.LANES, dtype=torch.int64, device=queries.device)
    walk_kernel[(programs,)](
        queries, rows, seats, queries if query_lengths is None else query_lengths, queries if bound is None else bound,
        tree.points, tree.firsts, tree.boxes, tree.frame,
        memory,
        indices, sq_dists,
        B * M, M, layout.slots, layout.nodes, layout.branches, layout.C, layout.levels, k, kept, layout.firsts,
        int(causal), int(include_self), seeds(k),
        HAS_LQ=query_lengths is not None, HAS_BOUND=bound is not None, MASKED=causal or not include_self,
        D=D, ONE=kept == K, K=K, LOG=K.bit_length() - 1, NEAR=near, LOG_NEAR=near.bit_length() - 1,
        JUMP=JUMP, LEAF=trees.LEAF, FAN=trees.FAN, GROUP=group(D), CAP=CAP, LANES=lists.LANES,
        **lists.options(registers(D, k)),
    )  # fmt: skip
    return indices, sq_dists
