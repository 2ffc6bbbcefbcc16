"""Samplers: entities ``[p, s, w]`` from a field, more of them where the field is information-rich."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfn_kernels import field_sample, knn

from .density import curve, gradient_magnitude, local_entropy, occupancy, surprise
from .field import Field, PointField, TextField

DENSITIES: dict[str, Callable[[Field], Tensor]] = {
    "gradient": gradient_magnitude,
    "entropy": local_entropy,
    "surprise": surprise,
    "occupancy": occupancy,
}


class Entities(NamedTuple):
    """n entities per field: where they are, what they know, how much they weigh."""

    positions: Tensor  # [B, n, D], in [0, 1)
    states: Tensor  # [B, n, d]
    influence: Tensor  # [B, n], mean 1


class Sampler(nn.Module):
    """The interface: one method, ``density(field) -> [B, *grid]``, finite and not negative.

    `forward` draws positions in proportion to it. For a sampler of your own write that method; ::

        class Centre(Sampler):
            def density(self, field):  # most entities in the middle
                return torch.exp(-8 * (field.centers() - 0.5).square().sum(-1)).view(1, *field.grid).expand(
                    field.batch, *field.grid)

    or replace `forward` altogether: ``(field, n, generator=None) -> Entities``.

    Args:
        encode: ``(field, positions [B, n, D]) -> states [B, n, d]``; the field's values there without it. A module
            given here is a part of the sampler, and trains with it.
        distinct: at most one entity per cell, which text wants: its positions are then the centres of cells.
    """

    def __init__(self, encode: Callable[[Field, Tensor], Tensor] | None = None, *, distinct: bool | None = None):
        super().__init__()
        self.encode, self.distinct = encode, distinct

    def density(self, field: Field) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define density")

    def forward(self, field: Field, n: int, generator: torch.Generator | None = None) -> Entities:
        """``n`` entities of every field; the same ones for the same state of ``generator``.

        ``P(entity in cell) = density[cell] / sum``; one entity from each of n equal shares of the mass, which follow
        each other along a Hilbert curve. Influence is proportional to ``1 / density`` with mean 1: a mean over the
        entities, weighted by it, estimates the mean over the field.

        Gradients: of states to the field's values and the parameters of ``encode``; of influence to the density's.
        """
        density = self.density(field)
        if density.shape != (field.batch, *field.grid):
            want, got = [field.batch, *field.grid], list(density.shape)
            raise ValueError(f"{type(self).__name__}: density must have shape {want}, got {got}")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{type(self).__name__}: n must be an integer of at least 1, got {n}")
        distinct = isinstance(field, TextField) if self.distinct is None else self.distinct
        if distinct and n > math.prod(field.grid):
            message = f"n must be at most the {math.prod(field.grid)} cells of the field, got {n}"
            raise ValueError(f"{type(self).__name__}: {message}")
        positions, influence = draw(density, n, distinct=distinct, generator=generator)
        states = field.at(positions) if self.encode is None else self.encode(field, positions)
        return Entities(positions, states, influence)


class UniformSampler(Sampler):
    """As many entities everywhere: the density is 1."""

    def density(self, field: Field) -> Tensor:
        return torch.ones(field.batch, *field.grid, device=field.device)


class AdaptiveSampler(Sampler):
    """More entities where there is more to know.

    Args:
        density: ``field -> [B, *grid]``: a function or module (`dfn.fields.LearnedDensity`), or the name of one:
            "gradient", "entropy", "surprise" (text), "occupancy" (points). Without it surprise for text, occupancy
            for points and the gradient for everything else.
        floor: the share of the entities that is spread evenly, so that nothing goes unseen; 0 to 1.
        encode, distinct: as in `Sampler`.
    """

    def __init__(
        self, density: Callable[[Field], Tensor] | str | None = None, *, floor: float = 0.05,
        encode: Callable[[Field, Tensor], Tensor] | None = None, distinct: bool | None = None,
    ):  # fmt: skip
        super().__init__(encode, distinct=distinct)
        if isinstance(density, str) and density not in DENSITIES:
            raise ValueError(f"AdaptiveSampler: density must be one of {sorted(DENSITIES)}, got {density!r}")
        if not 0 <= floor <= 1:
            raise ValueError(f"AdaptiveSampler: floor must be between 0 and 1, got {floor}")
        self.measure, self.floor = density, floor

    def density(self, field: Field) -> Tensor:
        measure = self.measure
        if measure is None:
            text, points = isinstance(field, TextField), isinstance(field, PointField)
            measure = "surprise" if text else "occupancy" if points else "gradient"
        density = (DENSITIES[measure] if isinstance(measure, str) else measure)(field)
        mean = density.flatten(1).mean(1).view(-1, *[1] * field.dim)
        return (1 - self.floor) * density + self.floor * mean

    def budget(self, field: Field, per_entity: float) -> int:
        """How many entities it takes if each stands for ``per_entity`` of the density's unit (bits, with surprise).

        The largest number of any field in the batch: predictable text takes few.
        """
        most = float(self.density(field).detach().double().flatten(1).sum(1).max())
        return max(1, min(math.ceil(most / per_entity), math.prod(field.grid)))

    def extra_repr(self) -> str:
        measure = self.measure if isinstance(self.measure, str) else type(self.measure).__name__
        return f"density={measure}, floor={self.floor:g}"


def draw(
    density: Tensor, n: int, *, distinct: bool = False, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`dfn_kernels.field_sample`, with the strata in Hilbert order: ``(positions [B, n, D], influence [B, n])``.

    ``distinct`` takes every cell at most once: cells that would hold more than one entity hold exactly one, the
    others share what is left; positions are the centres of cells, for text in the order of time.
    """
    B, *grid = density.shape
    cells = math.prod(grid)
    if distinct:
        return _draw_distinct(density, n, generator)
    order = _curve(tuple(grid), str(density.device))
    mass = density.flatten(1)[:, order]
    along, influence = field_sample(mass.double(), n, generator=generator)
    cell = order[(along[..., 0] * cells).long().clamp(max=cells - 1)]
    inside = torch.rand(B, n, len(grid), dtype=torch.float64, device=density.device, generator=generator)
    positions = (_unravel(cell, grid) + inside) / torch.tensor(grid, device=density.device)
    return positions.float().clamp(max=1 - 2**-24), influence.to(torch.promote_types(density.dtype, torch.float32))


def _draw_distinct(density: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Systematic sampling: a cell's chance is n times its share, at most 1, and one random number moves all levels."""
    B, *grid = density.shape
    order = _curve(tuple(grid), str(density.device))
    share = density.flatten(1).double()
    share = share / share.detach().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # n cells must have mass, whatever the density
    share = share + share.detach().mean(1, keepdim=True) * 1e-9 + 1e-30
    mass = share.detach()[:, order]
    cells = mass.shape[1]
    chance = torch.zeros_like(mass)
    free = torch.ones_like(mass, dtype=torch.bool)
    for _ in range(64):  # at most so many rounds, each of which fixes the cells that would overflow
        left = n - (~free).sum(1, keepdim=True)
        part = left * mass / (mass * free).sum(1, keepdim=True).clamp(min=1e-300)
        chance = torch.where(free, part, 1.0)
        over = free & (chance >= 1)
        if not over.any():
            break
        free = free & ~over
    chance = chance.clamp(max=1)
    upper = chance.cumsum(1)
    upper = upper * (n / upper[:, -1:])
    shift = torch.rand(B, 1, dtype=torch.float64, device=density.device, generator=generator)
    levels = torch.arange(n, device=density.device) + shift * (1 - 1e-9)
    cell = torch.searchsorted(upper, levels, right=True).clamp(max=cells - 1)
    # Rounding may name a cell of chance 1 twice: the next free one takes its place.
    cell = (cell - torch.arange(n, device=cell.device)).cummax(1).values + torch.arange(n, device=cell.device)
    last = cells - n + torch.arange(n, device=cell.device)
    cell = order[cell.minimum(last)]
    influence = 1 / share.gather(1, cell)
    positions = (_unravel(cell, grid) + 0.5) / torch.tensor(grid, device=density.device)
    return positions.to(torch.float32), (influence / influence.mean(1, keepdim=True)).float()


@functools.lru_cache(8)
def _curve(grid: tuple[int, ...], device: str) -> Tensor:
    return curve(grid, device)


def _unravel(cell: Tensor, grid: list[int]) -> Tensor:
    index = []
    for size in reversed(grid):
        index.append(cell % size)
        cell = cell // size
    return torch.stack(index[::-1], -1)


def reconstruct(entities: Entities, field: Field, k: int = 6, width: float = 0.35) -> Tensor:
    """The field as the entities tell it: ``[B, *grid, c]`` from states that are values.

    Every cell takes the mean of its ``k`` nearest entities, weighted by ``exp(-r^2 / (2 sigma^2))``, where sigma is
    ``width`` times the distance of the k-th: narrow where entities are dense.
    """
    scale = torch.tensor(field.grid, device=entities.positions.device)  # distances in cells: grids need not be square
    points = entities.positions * scale
    queries = (field.centers() * scale).expand(len(points), -1, -1)
    near = knn(points.contiguous(), min(k, points.shape[1]), queries=queries.contiguous())
    sigma = width * near.sq_dists[..., -1:].clamp(min=1e-6).sqrt()
    weight = (-near.sq_dists / (2 * sigma**2)).softmax(-1)
    total = torch.zeros((), device=points.device)
    for j in range(weight.shape[-1]):
        state = entities.states.gather(1, near.indices[..., j, None].expand(-1, -1, entities.states.shape[-1]))
        total = total + weight[..., j, None] * state
    return total.unflatten(1, field.grid)


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]."""
    return float(-10 * (found.double() - wanted.double()).square().mean().log10())
