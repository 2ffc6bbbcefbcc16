"""Positions drawn from a density on a grid: where a field is information-rich, more entities.

Composed of PyTorch ops on every device: the work is one prefix sum and one binary search per sample.
"""

import torch
from torch import Tensor

from . import _backends
from ._checks import is_float_tensor, is_integer

OP = "field_sample"
_backends.register(OP, cpu=False, triton=False)


def _check(density, n, method, generator) -> None:
    is_float_tensor(OP, "density", density)
    if density.ndim < 2 or 0 in density.shape[1:]:
        raise ValueError(
            f"{OP}: density must have shape [B, *grid] with a grid that is not empty, got {list(density.shape)}"
        )
    is_integer(OP, "n", n, 0, 2**31 - 1)
    if method not in ("stratified", "random"):
        raise ValueError(f"{OP}: method must be 'stratified' or 'random', got {method!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{OP}: generator must be a torch.Generator, got {type(generator).__name__}")
    # Looking at the values would make a GPU wait, and cannot be traced.
    if density.device.type == "cpu" and not torch.compiler.is_compiling():
        if not (fine := density.isfinite() & (density >= 0)).all():
            raise ValueError(f"{OP}: density must be finite and not negative, got {density[~fine][0].item():g}")


def field_sample(
    density: Tensor,
    n: int,
    *,
    method: str = "stratified",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws n positions per field, with a probability proportional to the density of the grid cell they fall into.

    ``P(position in cell) = density[cell] / density.sum()``, uniform inside a cell. "random" draws independently;
    "stratified" draws one sample from each of n equal shares of the total mass, the cells taken in row-major order, so
    that a cell holding the share m of the mass receives between floor(m n) - 1 and ceil(m n) + 1 samples.

    Args:
        density: ``[B, *grid]``, finite and not negative (on a GPU, and while compiling, negative and non-finite cells
            count as 0). A field whose density is 0 everywhere counts as uniform. Any float dtype.
        n: samples per field.
        method: "stratified" or "random".
        generator: source of the random numbers, on density's device.

    Returns:
        positions: ``[B, n, D]`` in [0, 1), D the number of grid axes, in the grid's axis order: cell i of an axis of
            size g covers [i / g, (i + 1) / g). float32 (float64 for a float64 density).
        influence: ``[B, n]``, proportional to ``1 / density[cell]`` with mean 1: the weights that make a weighted mean
            over the samples an estimate of the mean over the field.

    Gradients: of influence to density; positions have none.

    Raises: ValueError, TypeError.

    >>> import torch
    >>> positions, influence = field_sample(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), 4)
    >>> (positions[..., 0] * 4).long().tolist(), influence.tolist()
    ([[1, 1, 1, 3]], [[0.6666666865348816, 0.6666666865348816, 0.6666666865348816, 2.0]])
    """
    _check(density, n, method, generator)
    real = torch.float64 if density.dtype == torch.float64 else torch.float32
    B, *grid = density.shape
    device = density.device
    mass = density.flatten(1).double()
    mass = mass.where(mass.isfinite() & (mass > 0), 0)
    most = mass.detach().amax(1, keepdim=True)  # sums of what is left can neither overflow nor vanish
    mass = (mass / most.where(most > 0, 1)).where(most > 0, 1)

    upper = mass.detach().cumsum(1)  # float64: a float32 prefix sum loses small cells of a large grid
    total = upper[:, -1:]
    # torch.compile refuses generator=None with sizes that vary
    source = {} if generator is None else {"generator": generator}
    uniform = torch.rand(B, n, dtype=torch.float64, device=device, **source)
    if method == "stratified":
        uniform = (torch.arange(n, device=device) + uniform) / max(n, 1)
    level = uniform * total
    # The first cell whose upper bound exceeds the level has mass; rounding may push the level past the last such cell.
    last = (mass > 0).long().cumsum(1).argmax(1, keepdim=True)
    cell = torch.searchsorted(upper, level, right=True).minimum(last)
    picked = mass.gather(1, cell)
    inside = ((level - (upper.gather(1, cell) - picked.detach())) / picked.detach()).clamp(0, 1)

    coordinates = []
    rest = cell
    for axis in reversed(range(len(grid))):
        index, rest = rest % grid[axis], rest // grid[axis]
        if axis != len(grid) - 1:  # along the last axis the level itself says where in the cell; elsewhere chance does
            inside = torch.rand(B, n, dtype=torch.float64, device=device, **source)
        coordinates.append((index + inside) / grid[axis])
    # Rounding to float32 must not reach 1, which would be a cell of its own.
    below_one = 1 - torch.finfo(real).eps
    positions = torch.stack(coordinates[::-1], -1).to(real).clamp(max=below_one)

    influence = 1 / picked
    influence = influence / influence.mean(1, keepdim=True)
    return positions, influence.to(real)
