"""Where the points are cut into strips: at quantiles of a sample, so that strips hold about as many points as others.

Everything happens on the device, in shapes that depend on sizes alone: nothing waits, nothing is copied to the host.
Where the cuts fall decides how fast a search is, never what it finds.

D = 1: one strip. D = 2: strips along the shorter axis. D = 3: slabs along the shortest axis, strips in each of them.
Inside a strip the points are sorted along the longest axis, of those that have many different values. Each segment, a
prefix of one batch, has its own cuts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EARLY = 1024  # causal: prefixes are halved down to about this many points
ROUNDING = 8  # causal: prefixes are multiples of a box, and rounding up adds at most 1 / ROUNDING to a batch
STRIP_DEPTH = {1: 0, 2: 64, 3: 32}  # points in a strip, at least, on average
SLAB_DEPTH = 1024  # points in a slab, at least
SAMPLE = {1: 1 << 10, 2: 1 << 13, 3: 1 << 15}
FEW_VALUES = 64  # different ones in the sample
STRIP_WIDTH = 1.3  # in radii of the ball that holds k points on average


@dataclass(frozen=True)
class Layout:
    """The sizes of a grid, all known on the host.

    A batch has `levels` segments, one after another: the first C, C/2, C/4, .. points, each a multiple of `box` slots.
    """

    B: int
    N: int
    D: int
    k: int  # neighbours for which strips have the best width
    box: int  # points in a bounding box
    levels: int  # 1 unless causal
    C: int  # slots of the first segment, at least N
    slabs: int  # at most
    cells: int  # strips of all slabs, at most

    @property
    def segments(self) -> int:
        return self.B * self.levels

    @property
    def slots(self) -> int:
        """Of one batch."""
        return 2 * self.C - (2 * self.C >> self.levels)

    @staticmethod
    def of(B: int, N: int, D: int, k: int, box: int, causal: bool) -> "Layout":
        levels = max(1, min((N // EARLY).bit_length(), (N // (ROUNDING * box)).bit_length())) if causal else 1
        step = box << (levels - 1)
        C = -(-N // step) * step
        cells = 1 if D == 1 else max(1, C // STRIP_DEPTH[D])
        slabs = 1 if D < 3 else max(1, min(cells, C // SLAB_DEPTH))
        return Layout(B, N, D, k, box, levels, C, slabs, cells)


@dataclass(frozen=True)
class Cuts:
    axes: Tensor  # int32 [G, 3]: the axes sorted by, cut into strips, cut into slabs
    slabs: Tensor  # float32 [G, slabs]: lower edges; the first is -inf, those not in use are inf
    strips: Tensor  # float32 [G, cells]: the same of the strips, slab after slab
    stride: Tensor  # int32 [G]: strips in a slab


def ordered_bits(x: Tensor) -> Tensor:
    """Integers from 0 to 2^32 - 1 that order like these float32 numbers; int64."""
    bits = (x + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31


def from_ordered_bits(x: Tensor) -> Tensor:
    bits = x - 2**31
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def find_cuts(points: Tensor, lengths: Tensor | None, layout: Layout) -> Cuts:
    """`points` [B, N, D] and how many of each batch are in use."""
    G, D = layout.segments, layout.D
    device = points.device
    sample, valid, count = _sample(points, lengths, layout)
    columns = sample.sort(dim=1).values  # [G, s, D]
    lengths_of_axes = _lengths(columns, valid)
    # Sorting along an axis with few values would leave many points in one place: such axes are cut instead.
    coarse = (columns[:, 1:] > columns[:, :-1]).sum(1) < FEW_VALUES
    rank = torch.where(coarse, 1e-9 * lengths_of_axes, lengths_of_axes)
    axes = rank.argsort(dim=1, descending=True, stable=True)
    spans = lengths_of_axes.gather(1, axes)
    slabs, stride = _parts(spans, count, layout)  # [G, 1]

    def along(x: Tensor, a: int) -> Tensor:  # [G, s]
        return x.gather(2, axes[:, None, a : a + 1].expand(-1, x.shape[1], -1)).squeeze(2)

    slab_cuts = torch.full((G, layout.slabs), -torch.inf, device=device)
    strip_cuts = torch.full((G, layout.cells), -torch.inf, device=device)
    slab = torch.zeros_like(valid)  # of each point of the sample
    if layout.slabs > 1:
        slab_cuts[:, 1:] = _slab_cuts(along(columns, 2), valid, slabs, layout)
        slab = torch.searchsorted(slab_cuts[:, 1:].contiguous(), along(sample, 2).contiguous(), right=True)
    if D > 1:
        strip_cuts = _strip_cuts(along(sample, 1), slab, slabs, stride, layout)
    axes = torch.cat([axes, axes, axes], 1)[:, :3].int().contiguous()
    return Cuts(axes, slab_cuts, strip_cuts, stride.view(G).int())


def _sample(points: Tensor, lengths: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Every few points of each segment [G, s, D], inf where one is not finite; how many are finite; the points of all
    the segment, estimated. The last two [G, 1].
    """
    B, N, D, L = layout.B, layout.N, layout.D, layout.levels
    device = points.device
    level = torch.arange(L, device=device)
    size = (torch.full_like(level, layout.C) >> level).clamp(max=N).expand(B, L)
    if lengths is not None:
        size = torch.minimum(size, lengths.clamp(min=0).view(B, 1))
    size = size.reshape(-1, 1)
    s = min(SAMPLE[D], layout.C)
    first = torch.arange(B, device=device).repeat_interleave(L).view(-1, 1) * N
    at = first + torch.arange(s, device=device) * size // s
    x = points.reshape(B * N, D).index_select(0, at.flatten()).view(-1, s, D)
    usable = x.isfinite().all(-1) & (size > 0)
    x = (x + 0.0).masked_fill(usable.logical_not().unsqueeze(-1), torch.inf)
    valid = usable.sum(1, keepdim=True)
    return x, valid, (size * valid / s).double().clamp(min=1)


def _lengths(columns: Tensor, valid: Tensor) -> Tensor:
    """How far the middle 80 % of a sample reach along each axis, [G, D] float64: outliers must not widen strips."""

    def spread(skipped: Tensor) -> Tensor:
        ends = torch.stack([skipped, valid - 1 - skipped], 1).clamp(min=0).expand(-1, -1, columns.shape[2])
        low, high = columns.gather(1, ends).double().unbind(1)
        return (high - low).nan_to_num(0)

    middle = spread(valid // 10)
    return torch.where(middle > 0, middle, spread(torch.zeros_like(valid)))


def _parts(spans: Tensor, count: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Into how many slabs, and each of them into how many strips. An axis flatter than the ball is not cut."""
    one = torch.ones_like(count)
    if layout.D == 1:
        return one.long(), one.long()
    area = spans[:, :1] * spans[:, 1:2]
    width = (layout.k * area / (math.pi * count)).sqrt()
    slabs = one
    if layout.D == 3:
        volume = area * spans[:, 2:3]
        in_space = (layout.k * volume / (math.pi * 4 / 3 * count)).pow(1 / 3)
        deep = spans[:, 2:3] > 2 * in_space
        slabs = torch.where(deep, spans[:, 2:3] / (STRIP_WIDTH * in_space), one)
        slabs = slabs.nan_to_num(1).clamp(1, layout.slabs).floor()
        width = torch.where(deep, in_space, width)
    strips = torch.where(spans[:, 1:2] > 2 * width, spans[:, 1:2] / (STRIP_WIDTH * width), one).nan_to_num(1)
    strips = torch.minimum(strips.clamp(min=1), layout.cells / slabs)
    return slabs.long(), strips.long()


def _slab_cuts(column: Tensor, valid: Tensor, slabs: Tensor, layout: Layout) -> Tensor:
    """Lower edges of slabs 1, 2, ..: distinct, ascending, inf where there is none."""
    i = torch.arange(layout.slabs, device=column.device)
    edge = column.gather(1, (i * valid // slabs).clamp(max=column.shape[1] - 1))
    wanted = (i[1:] < slabs) & (edge[:, 1:] > edge[:, :-1])
    return edge[:, 1:].masked_fill(wanted.logical_not(), torch.inf).sort(dim=1).values


def _strip_cuts(values: Tensor, slab: Tensor, slabs: Tensor, stride: Tensor, layout: Layout) -> Tensor:
    """Quantiles of the sample inside each slab, [G, cells]. `values` [G, s] are inf where a point is not finite."""
    device = values.device
    row = torch.where(values.isinf(), layout.slabs, slab)
    keys = (row << 32 | ordered_bits(values)).sort(dim=1).values
    edges = torch.arange(layout.slabs + 1, device=device) << 32
    first = torch.searchsorted(keys, edges.expand(len(keys), -1).contiguous())  # [G, slabs + 1]
    cell = torch.arange(layout.cells, device=device)
    slab, strip = cell // stride, cell % stride  # [G, cells]
    held = slab.clamp(max=layout.slabs - 1)
    start = first.gather(1, held)
    many = first.gather(1, held + 1) - start
    value = keys.gather(1, (start + strip * many // stride).clamp(max=keys.shape[1] - 1)) & 0xFFFFFFFF
    wanted = (strip > 0) & (slab < slabs) & (strip * many // stride < many) & (value > value.roll(1, 1))
    infinity = ordered_bits(torch.full((), torch.inf, device=device))
    # In each slab: first 0 for -inf, then the distinct quantiles, ascending, then inf.
    value = torch.where(wanted, value, torch.where(strip == 0, 0, infinity))
    value = (slab << 32 | value).sort(dim=1).values & 0xFFFFFFFF
    return from_ordered_bits(value).masked_fill(strip == 0, -torch.inf)
