"""Sorts points into strips and drops what no query needs. Shapes depend on sizes alone; nothing waits for the device.

1. Every point gets a key: segment | strip | coordinate along the sort axis | hash of the position. One radix sort.
2. Of points at one place only the first `copies` by index can be neighbours of anything: the others are dropped, so
   that N points at 256 places cost no more than 256 places do. The hash brings equal positions together; where two
   positions share a hash, fewer are dropped.
3. What is kept is packed, segment by segment, and gets bounding boxes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .brute import JIT
from .cuts import Cuts, Layout, find_cuts

LOW_HALF = 0xFFFFFFFF
HASH_BITS = 24  # at most; fewer if there are many strips
SUPER = 64  # boxes in a box of boxes


@dataclass(frozen=True)
class Grid:
    layout: Layout
    cuts: Cuts
    hash_bits: int
    copies: int  # of points at one place
    points: Tensor  # float32 [D, slots of all batches]
    sorted: Tensor  # float32 [slots]: the coordinate along the sort axis
    ids: Tensor  # int32 [slots]
    starts: Tensor  # int32 [G, cells + 1]: first slot of each strip; the last is the end of the segment's points
    rows: Tensor  # int32 [B * N]: the points as queries, neighbours side by side
    edges: Tensor  # float32 [2, D, boxes + boxes / SUPER]: lower and upper ones of each box, then of SUPER boxes each
    first: Tensor  # int32 [boxes + boxes / SUPER]: the lowest index in it

    @property
    def boxes(self) -> int:
        return len(self.first) // (SUPER + 1) * SUPER


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def _level_of_slot(u, C, L):
    """Which prefix the slots u of a batch belong to, and its first slot."""
    m = u * 0
    for s in range(1, L):
        m += (u >= 2 * C - ((2 * C) >> s)).to(tl.int32)
    return m, 2 * C - ((2 * C) >> m)


@triton.jit
def level_of_query(i, C, L):
    """The shortest prefix that holds all that query i may see."""
    m = i * 0
    for s in range(1, L):
        m += (i < (C >> s)).to(tl.int32)
    return m


@triton.jit
def lower_edges_below(edges, n, v):
    """How many of edges[1], .., edges[n - 1], which ascend, are at most v."""
    lo = tl.zeros_like(n)
    hi = n - 1
    width = tl.max(hi, axis=0)
    while width > 0:
        middle = (lo + hi) >> 1
        going = lo < hi
        below = tl.load(edges + 1 + middle, mask=going, other=0.0) <= v
        lo = tl.where(going & below, middle + 1, lo)
        hi = tl.where(going & (below == 0), middle, hi)
        width = width >> 1
    return lo


@triton.jit(**JIT)
def cell_kernel(
    X, LX, AXES, SLABS, STRIPS, STRIDE,  # inputs: points or queries, how many are in use, the cuts
    KEYS,  # output
    total, rows, slots, C, L, slabs, cells, hash_bits,  # shapes
    HAS_L: tl.constexpr, QUERIES: tl.constexpr,  # QUERIES: one slot a row; else one slot for each prefix it is in
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    if QUERIES:
        b, i = t // rows, t % rows
        m = level_of_query(i, C, L)
    else:
        b = t // slots
        m, offset = _level_of_slot(t % slots, C, L)
        i = t % slots - offset
    ok = (t < total) & (i < rows)
    if HAS_L:
        ok = ok & (i < tl.load(LX + b, mask=ok, other=0))
    g = b * L + m
    row = X + (b.to(tl.int64) * rows + i) * D
    spoiled = tl.zeros((BM,), tl.float32)  # 0 * x is 0 for finite x, NaN otherwise
    mixed = tl.zeros((BM,), tl.uint32)
    for a in tl.static_range(D):
        x = tl.load(row + a, mask=ok, other=0.0) + 0.0  # -0.0 becomes 0.0
        spoiled += x * 0.0
        mixed = (mixed ^ x.to(tl.uint32, bitcast=True)) * 0x9E3779B1
        mixed = mixed ^ (mixed >> 15)
    ok = ok & (spoiled == 0.0)
    cell = tl.zeros((BM,), tl.int32)
    if D > 1:
        stride = tl.load(STRIDE + g, mask=ok, other=1)
        if D > 2:
            v = tl.load(row + tl.load(AXES + 3 * g + 2, mask=ok, other=0), mask=ok, other=0.0)
            cell = lower_edges_below(SLABS + g.to(tl.int64) * slabs, tl.where(ok, slabs, 1), v) * stride
        v = tl.load(row + tl.load(AXES + 3 * g + 1, mask=ok, other=0), mask=ok, other=0.0)
        cell += lower_edges_below(STRIPS + g.to(tl.int64) * cells + cell, stride, v)
    y = tl.load(row + tl.load(AXES + 3 * g, mask=ok, other=0), mask=ok, other=0.0) + 0.0
    bits = y.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    key = g.to(tl.int64) * (cells + 1) + tl.where(ok, cell, cells)  # what is not in use comes last in its segment
    key = (key << 32) | tl.where(ok, ordered, 0)
    key = (key << hash_bits) | (mixed >> (32 - hash_bits)).to(tl.int64)
    tl.store(KEYS + t, key, mask=t < total)


@triton.jit(**JIT)
def place_kernel(
    X, KEYS, ORDER,  # inputs: points, sorted keys, the slots they come from
    NEW,  # output: 1 where a place begins
    total, rows, slots, C, L,  # shapes
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < total
    again = here & (t > 0)
    again = again & (tl.load(KEYS + t, mask=here, other=0) == tl.load(KEYS + t - 1, mask=again, other=-1))
    slot = tl.load(ORDER + t, mask=here, other=0).to(tl.int32)
    before = tl.load(ORDER + t - 1, mask=again, other=0).to(tl.int32)
    _, offset = _level_of_slot(slot % slots, C, L)  # equal keys: both slots are in one segment
    batch = X + (slot // slots).to(tl.int64) * rows * D
    i, j = slot % slots - offset, before % slots - offset
    again = again & (i < rows) & (j < rows)
    for a in tl.static_range(D):
        x = tl.load(batch + i.to(tl.int64) * D + a, mask=again, other=0.0)
        again = again & (x == tl.load(batch + j.to(tl.int64) * D + a, mask=again, other=0.0))
    tl.store(NEW + t, (again == 0).to(tl.int32), mask=here)


@triton.jit(**JIT)
def mark_kernel(
    KEYS, ORDER, PLACE,  # inputs; PLACE: number of the place
    MARKS,  # output [total + 1]: after a 0, 1 where a point is kept, and 2^32 where it is a query of this segment
    total, rows, slots, C, L, cells, hash_bits, copies,
    BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < total
    usable = here & ((tl.load(KEYS + t, mask=here, other=0) >> (32 + hash_bits)) % (cells + 1) < cells)
    earlier = usable & (t >= copies)
    place = tl.load(PLACE + t, mask=here, other=0)
    kept = usable & ((earlier == 0) | (tl.load(PLACE + t - copies, mask=earlier, other=-1) != place))
    slot = tl.load(ORDER + t, mask=here, other=0).to(tl.int32)
    m, offset = _level_of_slot(slot % slots, C, L)
    i = slot % slots - offset
    asks = here & (i < rows) & (level_of_query(i, C, L) == m)
    tl.store(MARKS + 1 + t, kept.to(tl.int64) | (asks.to(tl.int64) << 32), mask=here)
    tl.store(MARKS + t, tl.zeros((BM,), tl.int64), mask=t == 0)


@triton.jit(**JIT)
def pack_kernel(
    X, ORDER, BEFORE, AXES,  # inputs; BEFORE: running sums of the marks
    POINTS, SORTED, IDS, ROWS,  # outputs
    total, rows, slots, C, L,  # shapes
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < total
    slot = tl.load(ORDER + t, mask=here, other=0).to(tl.int32)
    b = slot // slots
    m, offset = _level_of_slot(slot % slots, C, L)
    i = slot % slots - offset
    start = tl.load(BEFORE + t, mask=here, other=0)
    marks = tl.load(BEFORE + t + 1, mask=here, other=0) - start
    segment = b * slots + offset
    kept = here & ((marks & 1) == 1)
    to = segment + (start - tl.load(BEFORE + segment, mask=here, other=0)).to(tl.int32)  # the low 32 bits
    row = X + (b.to(tl.int64) * rows + i) * D
    for a in tl.static_range(D):
        tl.store(POINTS + total.to(tl.int64) * a + to, tl.load(row + a, mask=kept, other=0.0), mask=kept)
    axis = tl.load(AXES + 3 * (b * L + m), mask=kept, other=0)
    tl.store(SORTED + to, tl.load(row + axis, mask=kept, other=0.0), mask=kept)
    tl.store(IDS + to, i, mask=kept)
    tl.store(ROWS + (start >> 32), b * rows + i, mask=here & ((marks >> 32) == 1))


@triton.jit(**JIT)
def box_kernel(
    POINTS, IDS, STARTS,  # inputs
    EDGES, FIRST,  # outputs [2, D, pitch], [pitch]
    total, slots, pitch, C, L, cells,  # shapes
    D: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t = pid * BOX + tl.arange(0, BOX)
    m, _ = _level_of_slot(t % slots, C, L)
    g = (t // slots) * L + m
    inside = t < total
    inside = inside & (t < tl.load(STARTS + g.to(tl.int64) * (cells + 1) + cells, mask=inside, other=0))
    for a in tl.static_range(D):
        at = POINTS + total.to(tl.int64) * a + t
        tl.store(EDGES + pitch * a + pid, tl.min(tl.load(at, mask=inside, other=float("inf")), axis=0))
        tl.store(EDGES + pitch * (D + a) + pid, tl.max(tl.load(at, mask=inside, other=float("-inf")), axis=0))
    tl.store(FIRST + pid, tl.min(tl.load(IDS + t, mask=inside, other=0x7FFFFFFF), axis=0))


# ---- launchers ------------------------------------------------------------------------------------------------------
BM = 256


def box_warps(box: int) -> int:
    return max(1, box // 256)  # one for 1,024 points spills on sm_100


def _keys(x: Tensor, lengths: Tensor | None, layout: Layout, cuts: Cuts, hash_bits: int, queries: bool) -> Tensor:
    B, rows, D = x.shape
    total = B * (rows if queries else layout.slots)
    keys = torch.empty(total, dtype=torch.int64, device=x.device)
    cell_kernel[(triton.cdiv(total, BM),)](
        x, x if lengths is None else lengths, cuts.axes, cuts.slabs, cuts.strips, cuts.stride,
        keys,
        total, rows, layout.slots, layout.C, layout.levels, layout.slabs, layout.cells, hash_bits,
        HAS_L=lengths is not None, QUERIES=queries, D=D, BM=BM, num_warps=4,
    )  # fmt: skip
    return keys


def build(points: Tensor, lengths: Tensor | None, layout: Layout, copies: int) -> Grid:
    """`points` float32 [B, N, D], contiguous. `copies`: how many points of one place are kept."""
    B, N, D = points.shape
    device = points.device
    cuts = find_cuts(points, lengths, layout)
    G, total = layout.segments, B * layout.slots
    sizes = N, layout.slots, layout.C, layout.levels
    hash_bits = min(HASH_BITS, 31 - (G * (layout.cells + 1)).bit_length())
    keys, order = _keys(points, lengths, layout, cuts, hash_bits, False).sort(stable=True)
    blocks = (triton.cdiv(total, BM),)
    new = torch.empty(total, dtype=torch.int32, device=device)
    place_kernel[blocks](points, keys, order, new, total, *sizes, D=D, BM=BM, num_warps=4)
    place = new.cumsum(0, dtype=torch.int32)
    marks = torch.empty(total + 1, dtype=torch.int64, device=device)
    mark_kernel[blocks](keys, order, place, marks, total, *sizes, layout.cells, hash_bits, copies, BM=BM, num_warps=4)
    before = marks.cumsum(0)

    level = torch.arange(layout.levels, device=device)
    twice = torch.full_like(level, 2 * layout.C)
    offset = torch.arange(B, device=device).view(B, 1) * layout.slots + twice - (twice >> level)
    offset = offset.view(G, 1)
    edges = torch.arange(G * (layout.cells + 1), device=device) << 32 + hash_bits
    at = torch.searchsorted(keys, edges).view(G, -1)
    starts = (offset + (before[at] & LOW_HALF) - (before[offset] & LOW_HALF)).int()

    boxes = triton.cdiv(total // layout.box, SUPER) * SUPER
    pitch = boxes + boxes // SUPER
    grid = Grid(
        layout, cuts, hash_bits, copies,
        points.new_empty(D, total), points.new_empty(total), new.new_empty(total), starts, new.new_empty(B * N),
        points.new_empty(2, D, pitch), new.new_empty(pitch),
    )  # fmt: skip
    pack_kernel[blocks](
        points, order, before, cuts.axes,
        grid.points, grid.sorted, grid.ids, grid.rows,
        total, *sizes, D=D, BM=BM, num_warps=4,
    )  # fmt: skip
    box_kernel[(boxes,)](
        grid.points, grid.ids, starts,
        grid.edges, grid.first,
        total, layout.slots, pitch, layout.C, layout.levels, layout.cells, D=D, BOX=layout.box,
        num_warps=box_warps(layout.box),
    )  # fmt: skip
    low, high = grid.edges[:, :, :boxes].reshape(2, D, -1, SUPER)
    grid.edges[0, :, boxes:] = low.amin(2)
    grid.edges[1, :, boxes:] = high.amax(2)
    grid.first[boxes:] = grid.first[:boxes].view(-1, SUPER).amin(1)
    return grid


def in_order(queries: Tensor, lengths: Tensor | None, grid: Grid) -> Tensor:
    """Rows of other queries [B, M, D], neighbours side by side: int32 [B * M]."""
    keys = _keys(queries, lengths, grid.layout, grid.cuts, grid.hash_bits, True)
    return keys.sort().indices.int()
