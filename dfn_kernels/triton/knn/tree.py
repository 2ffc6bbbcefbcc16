"""Points in the order of a Hilbert curve, in boxes: LEAF points a leaf, FAN leaves a node, FAN nodes a branch.

1. A frame for each batch: where the middle 80 % of a sample lie, with one scale for all axes.
2. Every point gets a key: segment | is it usable? | its place on the curve; from three dimensions on a second word
   tells places apart that the first cannot. A radix sort for each word. Points of one key stay in the order of their
   indices.
3. Points are packed in this order, and every box gets its edges and the lowest index in it.

The order decides how fast a search is, never what it finds. Shapes depend on sizes alone; nothing waits for the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import NO_SPILLS
from .rows import rows_at, wide

LEAF = 16
FAN = 32
SAMPLE = 1024
EARLY = 1024  # causal: prefixes are halved down to about this many points
MIDDLE = 2.0  # the frame's scale as far as this many half widths of the sample's middle; beyond it logarithms
REACH = 16.0  # where the frame ends
FIRST = 4096  # so many points of a batch are kept in the order of their indices, too
JIT = {"do_not_specialize": [
    "N", "M", "k", "B", "rows", "queries", "total", "slots", "pitch", "nodes", "branches", "C", "L", "bits", "items",
    "slices", "size", "causal", "include_self", "kept", "around", "fine", "firsts",
]}  # fmt: skip  # One compilation serves all sizes: without this there would be others for 1 and for multiples of 16.


@dataclass(frozen=True)
class Layout:
    """The sizes of a tree, all known on the host.

    A batch has `levels` segments, one after another: the first C, C/2, C/4, .. points, each of them whole leaves.
    """

    B: int
    N: int
    D: int
    levels: int  # 1 unless causal
    C: int  # slots of the first segment, at least N

    @property
    def slots(self) -> int:
        """Of one batch."""
        return 2 * self.C - (2 * self.C >> self.levels)

    @property
    def total(self) -> int:
        return self.B * self.slots

    @property
    def nodes(self) -> int:
        return triton.cdiv(self.total, LEAF * FAN)

    @property
    def branches(self) -> int:
        return triton.cdiv(self.nodes, FAN)

    @property
    def pitch(self) -> int:
        """Boxes of every kind: leaves, then nodes, then branches."""
        return (self.nodes + self.branches) * FAN + self.branches

    @property
    def bits(self) -> int:
        """Of an axis, in the first word of a key."""
        return min(30, (61 - (self.B * self.levels - 1).bit_length()) // self.D)

    @property
    def fine(self) -> int:
        """And in the second."""
        return min(30 - self.bits, 31 // self.D) if self.D > 2 else 0

    @property
    def firsts(self) -> int:
        return min(FIRST, self.N)

    @staticmethod
    def of(B: int, N: int, D: int, causal: bool) -> "Layout":
        levels = max(1, (N // EARLY).bit_length()) if causal else 1
        step = LEAF << (levels - 1)
        return Layout(B, N, D, levels, triton.cdiv(N, step) * step)


@dataclass(frozen=True)
class Tree:
    layout: Layout
    frame: Tensor  # float32 [B, D + 1]: the middle, then the scale
    keys: Tensor  # int64 [total], ascending
    points: Tensor  # int32 [total, wide(D + 1)]: the bits of a position, its index
    firsts: Tensor  # int32 [B, firsts, wide(D + 1)]: the first points again, in the order of their indices
    rows: Tensor  # int32 [B N]: the points as queries, neighbours side by side, segment by segment
    seats: Tensor  # int32 [B N]: their slots
    boxes: Tensor  # int32 [pitch, wide(2 D + 1)]: bits of lower edges, upper ones, the lowest index in it; of an empty
    # one inf, -inf and 2^31 - 1


# ---- kernels --------------------------------------------------------------------------------------------------------
@triton.jit
def level_of_slot(u, C, L):
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


@triton.jit(**JIT)
def frame_kernel(
    X, LX,  # inputs: points [B, N, D], how many are in use
    FRAME,  # output
    N,
    HAS_L: tl.constexpr, D: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = N
    if HAS_L:
        n = tl.minimum(tl.maximum(tl.load(LX + b), 0).to(tl.int32), N)
    s = tl.arange(0, SAMPLE)
    row = X + (b * N + s.to(tl.int64) * n // SAMPLE) * D
    spoiled = tl.zeros((SAMPLE,), tl.float32)  # 0 * x is 0 for finite x, NaN otherwise
    for a in tl.static_range(D):
        spoiled += tl.load(row + a, mask=(s < SAMPLE) & (n > 0), other=float("inf")) * 0.0
    usable = spoiled == 0.0
    count = tl.sum(usable.to(tl.int32), axis=0)
    narrow = count.to(tl.float32) * 0.0
    wide = narrow
    for a in range(0, D):  # not unrolled: a sort takes seconds to compile
        x = tl.sort(tl.where(usable, tl.load(row + a, mask=usable, other=0.0), float("inf")))
        last = tl.maximum(count - 1, 0)
        low = tl.sum(tl.where(s == count // 10, x, 0.0), axis=0)
        high = tl.sum(tl.where(s == last - count // 10, x, 0.0), axis=0)
        tl.store(FRAME + b * (D + 1) + a, tl.where(count > 0, low * 0.5 + high * 0.5, 0.0))
        narrow = tl.maximum(narrow, high * 0.5 - low * 0.5)
        high = tl.sum(tl.where(s == last, x, 0.0), axis=0)
        wide = tl.maximum(wide, high * 0.5 - tl.min(x, axis=0) * 0.5)
    scale = tl.where(narrow > 0.0, narrow, wide)
    tl.store(FRAME + b * (D + 1) + D, tl.where((scale > 0.0) & (count > 0), scale, 1.0))


@triton.jit
def _hilbert(x, bits, fine, D: tl.constexpr):
    """The place on the curve of cells x, D numbers below 2^(bits + fine), in two words
    (J. Skilling, AIP Conference Proceedings 707, 2004).
    """
    bits += fine
    for s in range(1, bits):
        bit = 1 << (bits - s)
        for a in tl.static_range(D):
            swap = tl.where((x[a] & bit) == 0, (x[0] ^ x[a]) & (bit - 1), 0)
            flip = tl.where((x[a] & bit) == 0, 0, bit - 1)
            y = ()
            for e in tl.static_range(D):
                if e == 0:
                    y = y + (x[0] ^ swap ^ flip,)
                elif e == a:
                    y = y + (x[a] ^ swap,)
                else:
                    y = y + (x[e],)
            x = y
    y = (x[0],)
    for a in tl.static_range(1, D):
        y = y + (x[a] ^ y[a - 1],)
    turn = tl.zeros_like(x[0])
    for s in range(1, bits):
        bit = 1 << (bits - s)
        turn = turn ^ tl.where((y[D - 1] & bit) == 0, 0, bit - 1)
    key = tl.zeros_like(x[0]).to(tl.int64)
    for s in range(0, bits - fine):
        for a in tl.static_range(D):
            key = (key << 1) | (((y[a] ^ turn) >> (bits - 1 - s)) & 1).to(tl.int64)
    rest = tl.zeros_like(x[0])
    if D > 2:
        for s in range(0, fine):
            for a in tl.static_range(D):
                rest = (rest << 1) | (((y[a] ^ turn) >> (fine - 1 - s)) & 1)
    return key, rest


@triton.jit(**JIT)
def key_kernel(
    X, LX, FRAME,  # inputs: points or queries, how many are in use
    KEYS, RESTS,  # outputs; RESTS: the second words, from three dimensions on
    total, rows, slots, C, L, bits, fine,  # shapes
    MIDDLE: tl.constexpr, REACH: tl.constexpr,
    HAS_L: tl.constexpr, QUERIES: tl.constexpr,  # QUERIES: one slot a row; else one slot for each prefix it is in
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    if QUERIES:
        b, i = t // rows, t % rows
        m = level_of_query(i, C, L)
    else:
        b = t // slots
        m, offset = level_of_slot(t % slots, C, L)
        i = t % slots - offset
    here = (t < total) & (i < rows)
    ok = here
    if HAS_L:
        ok = ok & (i < tl.load(LX + b, mask=here, other=0))
    row = X + (b.to(tl.int64) * rows + i) * D
    spoiled = tl.zeros((BM,), tl.float32)
    scale = tl.load(FRAME + b * (D + 1) + D, mask=ok, other=1.0)
    cells = ()
    for a in tl.static_range(D):
        x = tl.load(row + a, mask=ok, other=0.0)
        spoiled += x * 0.0
        if D == 1:
            bits_of_x = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
            cells = cells + (tl.where(bits_of_x < 0, bits_of_x ^ 0x7FFFFFFF, bits_of_x),)
        else:
            x = (x - tl.load(FRAME + b * (D + 1) + a, mask=ok, other=0.0)) / scale
            far = tl.abs(x)
            far = tl.where(far > MIDDLE, MIDDLE + MIDDLE * 0.25 * tl.log2(tl.maximum(far / MIDDLE, 1.0)), far)
            far = tl.where(far < REACH, far, REACH)
            half = 1 << (bits + fine - 1)
            cell = (tl.where(x < 0.0, -far, far) * (half.to(tl.float32) / REACH)).to(tl.int32)
            cells = cells + (tl.minimum(tl.maximum(cell, -half), half - 1) + half,)
    ok = ok & (spoiled == 0.0)
    if D == 1:
        key = cells[0].to(tl.int64) + 2147483648
        width = 32
    else:
        key, rest = _hilbert(cells, bits, fine, D)
        width = bits * D
        if D > 2:
            tl.store(RESTS + t, tl.where(ok, rest, 0), mask=t < total)
    # What is not in use comes last in its segment, and slots without a point come after that.
    kind = tl.where(ok, 0, tl.where(here, 1, 2))
    key = tl.where(ok, key, 0) | (((b * L + m).to(tl.int64) * 4 + kind) << width)
    tl.store(KEYS + t, key, mask=t < total)


@triton.jit(**JIT)
def asks_kernel(
    ORDER,  # input: the slots in the order of their keys
    ASKS,  # output int32 [total]: 1 where a row is a query of this segment
    total, rows, slots, C, L,
    BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    u = tl.load(ORDER + t, mask=t < total, other=0).to(tl.int32) % slots
    m, offset = level_of_slot(u, C, L)
    i = u - offset
    tl.store(ASKS + t, ((i < rows) & (level_of_query(i, C, L) == m)).to(tl.int32), mask=t < total)


@triton.jit
def _put_box(lower, upper, BOXES, at, a, D: tl.constexpr):
    at = at.to(tl.int64) * wide(2 * D + 1) + a
    tl.store(BOXES + at, lower.to(tl.int32, bitcast=True))
    tl.store(BOXES + at + D, upper.to(tl.int32, bitcast=True))


@triton.jit
def _put_first(first, BOXES, at, D: tl.constexpr):
    tl.store(BOXES + at.to(tl.int64) * wide(2 * D + 1) + 2 * D, first)


@triton.jit(**JIT)
def pack_kernel(
    X, LX, ORDER, ASKED,  # inputs; ASKED: running sums of what asks_kernel writes
    POINTS, FIRSTS, ROWS, SEATS, BOXES,  # outputs
    total, rows, slots, nodes, C, L, firsts,  # shapes
    HAS_L: tl.constexpr, HAS_ASKED: tl.constexpr, D: tl.constexpr, LEAF: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """One node a program."""
    pid = tl.program_id(0)
    leaf = pid * FAN + tl.arange(0, FAN)
    t = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    here = t < total
    slot = tl.load(ORDER + t, mask=here, other=0).to(tl.int32)
    b = slot // slots
    m, offset = level_of_slot(slot % slots, C, L)
    i = slot % slots - offset
    here = here & (i < rows)
    if HAS_ASKED:
        asks = here & (level_of_query(i, C, L) == m)
        to = tl.load(ASKED + t, mask=asks, other=1) - 1
    else:
        asks = here
        to = t - b * (slots - rows)
    tl.store(ROWS + to, b * rows + i, mask=asks)
    tl.store(SEATS + to, t, mask=asks)
    usable = here
    if HAS_L:
        usable = usable & (i < tl.load(LX + b, mask=here, other=0))
    row = X + (b.to(tl.int64) * rows + i) * D
    spoiled = tl.zeros((FAN, LEAF), tl.float32)
    for a in tl.static_range(D):
        spoiled += tl.load(row + a, mask=usable, other=0.0) * 0.0
    usable = usable & (spoiled == 0.0)
    ids = tl.where(usable, i, 0x7FFFFFFF)
    POINT = POINTS + t.to(tl.int64) * wide(D + 1)
    AGAIN = FIRSTS + (b.to(tl.int64) * firsts + i) * wide(D + 1)
    again = here & (m == 0) & (i < firsts)
    tl.store(POINT + D, ids, mask=t < total)
    tl.store(AGAIN + D, ids, mask=again)
    first = tl.min(ids, axis=1)
    at = nodes * FAN + pid
    _put_first(first, BOXES, leaf, D)
    _put_first(tl.min(first, axis=0), BOXES, at, D)
    for a in tl.static_range(D):
        x = tl.load(row + a, mask=usable, other=float("inf"))
        tl.store(POINT + a, x.to(tl.int32, bitcast=True), mask=t < total)
        tl.store(AGAIN + a, x.to(tl.int32, bitcast=True), mask=again)
        lower = tl.min(x, axis=1)
        upper = tl.max(tl.where(usable, x, -float("inf")), axis=1)
        _put_box(lower, upper, BOXES, leaf, a, D)
        _put_box(tl.min(lower, axis=0), tl.max(upper, axis=0), BOXES, at, a, D)


@triton.jit(**JIT)
def branch_kernel(
    BOXES,  # input and output
    nodes, branches,  # shapes
    D: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """One branch a program."""
    pid = tl.program_id(0)
    node = pid * FAN + tl.arange(0, FAN)
    here = node < nodes
    box = rows_at(BOXES, nodes * FAN + node, here, FAN, wide(2 * D + 1))
    to = (nodes + branches) * FAN + pid
    _put_first(tl.min(tl.where(here, box[2 * D], 0x7FFFFFFF), axis=0), BOXES, to, D)
    for a in tl.static_range(D):
        lower = tl.where(here, box[a].to(tl.float32, bitcast=True), float("inf"))
        upper = tl.where(here, box[D + a].to(tl.float32, bitcast=True), -float("inf"))
        _put_box(tl.min(lower, axis=0), tl.max(upper, axis=0), BOXES, to, a, D)


# ---- launchers ------------------------------------------------------------------------------------------------------
BM = 256


def _sorted(x: Tensor, lengths: Tensor | None, layout: Layout, frame: Tensor, queries: bool) -> tuple[Tensor, Tensor]:
    """Keys in ascending order, first words, and where they come from."""
    B, rows, D = x.shape
    total = B * rows if queries else layout.total
    keys = torch.empty(total, dtype=torch.int64, device=x.device)
    rests = torch.empty(total, dtype=torch.int32, device=x.device) if D > 2 else keys
    key_kernel[(triton.cdiv(total, BM),)](
        x, x if lengths is None else lengths, frame,
        keys, rests,
        total, rows, layout.slots, layout.C, layout.levels, layout.bits, layout.fine,
        MIDDLE=MIDDLE, REACH=REACH, HAS_L=lengths is not None, QUERIES=queries, D=D, BM=BM, num_warps=4,
        **NO_SPILLS,
    )  # fmt: skip
    if D <= 2:
        return keys.sort(stable=True)
    order = rests.sort(stable=True).indices  # the least word first
    keys, second = keys[order].sort(stable=True)
    return keys, order[second]


def build(points: Tensor, lengths: Tensor | None, causal: bool) -> Tree:
    """`points` float32 [B, N, D], contiguous, and how many of each batch are in use."""
    B, N, D = points.shape
    layout = Layout.of(B, N, D, causal)
    total = layout.total
    counts = points if lengths is None else lengths
    frame = points.new_empty(B, D + 1)
    frame_kernel[(B,)](
        points, counts, frame, N, HAS_L=lengths is not None, D=D, SAMPLE=SAMPLE, num_warps=4,
        **NO_SPILLS,
    )  # fmt: skip
    keys, order = _sorted(points, lengths, layout, frame, False)
    sizes = layout.slots, layout.C, layout.levels
    asked = order
    if layout.levels > 1:
        asks = torch.empty(total, dtype=torch.int32, device=points.device)
        asks_kernel[(triton.cdiv(total, BM),)](order, asks, total, N, *sizes, BM=BM, num_warps=4)
        asked = asks.cumsum(0, dtype=torch.int32)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=points.device)

    tree = Tree(
        layout, frame, keys, integers(total, wide(D + 1)), integers(B, layout.firsts, wide(D + 1)),
        integers(B * N), integers(B * N), integers(layout.pitch, wide(2 * D + 1)),
    )  # fmt: skip
    pack_kernel[(layout.nodes,)](
        points, counts, order, asked,
        tree.points, tree.firsts, tree.rows, tree.seats, tree.boxes,
        total, N, layout.slots, layout.nodes, layout.C, layout.levels, layout.firsts,
        HAS_L=lengths is not None, HAS_ASKED=layout.levels > 1, D=D, LEAF=LEAF, FAN=FAN, num_warps=4,
        **NO_SPILLS,
    )  # fmt: skip
    branch_kernel[(layout.branches,)](tree.boxes, layout.nodes, layout.branches, D=D, FAN=FAN, num_warps=1)
    return tree


def in_order(queries: Tensor, lengths: Tensor | None, tree: Tree) -> tuple[Tensor, Tensor]:
    """Rows of other queries [B, M, D], neighbours side by side, and the slots that they are next to: int32 [B M]."""
    keys, rows = _sorted(queries, lengths, tree.layout, tree.frame, True)
    return rows.int(), torch.searchsorted(tree.keys, keys, out_int32=True)
