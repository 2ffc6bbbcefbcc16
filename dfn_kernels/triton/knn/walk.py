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
from .lists import FAR, forget, merge_list, write, write_nothing
from .tree import JIT, Tree, level_of_query


@triton.jit
def least_keys(EDGES, FIRST, pitch, at, inside, low, high, limit, D: tl.constexpr):
    """Of boxes, seen from the box between `low` and `high`; FAR if nothing in it has an index up to `limit`."""
    inf = float("inf")
    d = 0.0
    for a in tl.static_range(D):
        lower = tl.load(EDGES + pitch.to(tl.int64) * a + at, mask=inside, other=inf)
        upper = tl.load(EDGES + pitch.to(tl.int64) * (D + a) + at, mask=inside, other=-inf)
        off = tl.maximum(tl.maximum(lower - high[a], low[a] - upper), 0.0)
        d = d + off * off
    first = tl.load(FIRST + at, mask=inside, other=0x7FFFFFFF)
    key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | first.to(tl.int64)
    return tl.where(inside & (d < inf) & (first <= limit), key, FAR)


@triton.jit(**JIT)
def walk_kernel(
    Q, ROWS, SEATS, LQ, BOUND,  # inputs: queries, the order to serve them in, how many are in use, from the warm start
    POINTS, IDS, EDGES, FIRST,  # inputs: the tree
    MEMORY,  # scratch [programs, CAP + kept, LANES]
    OUT_I, OUT_D,  # outputs [B, M, k]
    queries, M, total, slots, pitch, nodes, branches, C, L, k, kept,  # shapes
    causal, include_self, around,  # 0 or 1, 0 or 1, leaves
    HAS_LQ: tl.constexpr, HAS_BOUND: tl.constexpr, MASKED: tl.constexpr,  # MASKED: causal, or without self
    D: tl.constexpr,
    ONE: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr,  # K = 2^LOG keys are merged at a time; ONE: no more are kept
    LEAF: tl.constexpr, FAN: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
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
            m = segment % L
            begin = ((segment // L) * slots + 2 * C - ((2 * C) >> m)) // LEAF
            end = begin + (C >> m) // LEAF
            low, high = (), ()
            for a in tl.static_range(D):
                low = low + (tl.min(tl.where(active, q[a], float("inf")), axis=0),)
                high = high + (tl.max(tl.where(active, q[a], -float("inf")), axis=0),)
            last = tl.max(tl.where(active, limit, -1), axis=0)

            # The leaves around the seat, and of one node.
            middle = tl.min(tl.where(active, seat, 0x7FFFFFFF), axis=0) // 2
            middle = (middle + tl.max(tl.where(active, seat, 0), axis=0) // 2) // LEAF
            middle = tl.minimum(tl.maximum(middle, begin), end - 1)
            node = middle // FAN
            seeds = tl.minimum(middle - around // 2, node * FAN + FAN - around)
            seeds = tl.maximum(seeds, tl.maximum(node * FAN, begin))
            after_seeds = tl.minimum(tl.minimum(seeds + around, node * FAN + FAN), end)
            here = node * FAN + child
            pending = tl.where((here >= seeds) & (here < after_seeds), child, FAN)  # leaves of this node to look into

            branch, top = node * 0, begin // (FAN * FAN)
            outer = tl.zeros_like(child).to(tl.int64) + FAR  # least keys of the branches from top - FAN on
            inner = outer  # and of the nodes of this branch
            forget(BEST, start, kept, k, LANES)
            found = tl.zeros_like(start) + FAR
            worst = tl.where(active, start, -1)
            worst_of_all = tl.max(worst, axis=0)
            count = tl.zeros_like(row)
            longest = tl.max(count, axis=0)
            going = longest == 0
            while going:
                which = tl.min(pending, axis=0)
                if which < FAN:
                    pending = tl.where(pending == which, FAN, pending)
                    leaf = node * FAN + which
                    near = least_keys(EDGES, FIRST, pitch, leaf, leaf < end, q, q, limit, D) < worst
                    if tl.max(near.to(tl.int32), axis=0) > 0:
                        for c in tl.static_range(LEAF):
                            j = leaf * LEAF + c
                            d = tl.zeros_like(q[0])
                            for a in tl.static_range(D):
                                step = tl.load(POINTS + total.to(tl.int64) * a + j) - q[a]
                                d = d + step * step
                            index = tl.load(IDS + j)
                            key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index.to(tl.int64)
                            wanted = key < worst
                            if MASKED:
                                wanted = wanted & (index <= limit) & (index != skip)
                            tl.store(LIST + count * LANES, key, mask=wanted)
                            count += wanted.to(tl.int32)
                        longest = tl.max(count, axis=0)
                else:
                    nearest = tl.min(inner, axis=0)
                    if nearest < worst_of_all:
                        which = tl.min(tl.where(inner == nearest, child, FAN), axis=0)
                        inner = tl.where(child == which, FAR, inner)
                        node = branch * FAN + which
                        here = node * FAN + child
                        inside = (here >= begin) & (here < end) & ((here < seeds) | (here >= after_seeds))
                        leaves = least_keys(EDGES, FIRST, pitch, here, inside, low, high, last, D)
                        pending = tl.where(leaves < worst_of_all, child, FAN)
                    else:
                        nearest = tl.min(outer, axis=0)
                        if nearest < worst_of_all:
                            which = tl.min(tl.where(outer == nearest, child, FAN), axis=0)
                            outer = tl.where(child == which, FAR, outer)
                            branch = top - FAN + which
                            here = branch * FAN + child
                            inside = (here >= begin // FAN) & (here * FAN < end)
                            inner = least_keys(EDGES, FIRST, pitch, nodes * FAN + here, inside, low, high, last, D)
                        else:
                            going = top * (FAN * FAN) < end
                            here = top + child
                            inside = here * (FAN * FAN) < end
                            here += (nodes + branches) * FAN
                            outer = least_keys(EDGES, FIRST, pitch, here, inside, low, high, last, D)
                            top += FAN
                if (longest > CAP - LEAF) | (going == 0):
                    found = merge_list(LIST, BEST, count, longest, kept, ONE, LANES, K, LOG)
                    count = tl.zeros_like(row)
                    longest = tl.max(count, axis=0)
                    worst = tl.where(active, tl.minimum(found, start), -1)
                    worst_of_all = tl.max(worst, axis=0)

            served = active
            if HAS_BOUND:  # fewer than k within the bound: then it was not the distance to k different points
                served = active & ((found < FAR) | (start == FAR))
                start = tl.where(active, FAR, start)
            write(MEMORY + CAP * LANES, OUT_I, OUT_D, row.to(tl.int64) * k, served, kept, k, LANES)
            todo = todo & (served == 0)


# ---- launcher -------------------------------------------------------------------------------------------------------
def seeds(k: int) -> int:
    """Leaves at a packet's seat that it looks into before anything else."""
    return min(trees.FAN, max(4, triton.cdiv(3 * k, trees.LEAF)))


def registers(D: int) -> int:
    return 152 if D <= 3 else 192 if D <= 6 else 224


def search(
    queries: Tensor, rows: Tensor, seats: Tensor, query_lengths: Tensor | None, bound: Tensor | None, tree: Tree,
    k: int, causal: bool, include_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and squared distances [B, M, k]."""
    B, M, D = queries.shape
    layout = tree.layout
    (K, kept), CAP = lists.sizes(k), 3 * trees.LEAF
    programs = lists.programs(triton.cdiv(B * M, lists.LANES), CAP + kept)
    indices = torch.empty(B, M, k, dtype=torch.int64, device=queries.device)
    sq_dists = torch.empty(B, M, k, device=queries.device)
    memory = torch.empty(programs * (CAP + kept) * lists.LANES, dtype=torch.int64, device=queries.device)
    walk_kernel[(programs,)](
        queries, rows, seats, queries if query_lengths is None else query_lengths, queries if bound is None else bound,
        tree.points, tree.ids, tree.edges, tree.first,
        memory,
        indices, sq_dists,
        B * M, M, layout.total, layout.slots, layout.pitch, layout.nodes, layout.branches, layout.C, layout.levels, k,
        kept,
        int(causal), int(include_self), seeds(k),
        HAS_LQ=query_lengths is not None, HAS_BOUND=bound is not None, MASKED=causal or not include_self,
        D=D, ONE=kept == K, K=K, LOG=K.bit_length() - 1, LEAF=trees.LEAF, FAN=trees.FAN, CAP=CAP, LANES=lists.LANES,
        **lists.options(registers(D)),
    )  # fmt: skip
    return indices, sq_dists
