"""Fields: what entities are sampled from. Text, images, audio and points, all on the unit cube.

A field is a function from positions in [0, 1]^D to values in R^c, known on a grid. Cell i of an axis of size g covers
[i / g, (i + 1) / g), as in `dfn_kernels.field_sample`; a value belongs to the centre of its cell.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dfn_kernels import gaussian_gather, knn

from .files import read_picture, read_sound


class Field:
    """A batch of fields on one grid.

    A field of your own is a subclass that sets `grid` and `batch` and has `values` and `at`; with values on a grid,
    `GridField` has all of that. Samplers and densities use nothing else. One whose values are made from `centers` sets
    `device`, too. CONTRIBUTING.md has an example.

    Attributes:
        grid: sizes of the axes; D = len(grid). batch: B. channels: c. values: ``[B, *grid, c]``.
        interpolation: "linear" between the centres of cells, or "nearest".
    """

    grid: tuple[int, ...]
    batch: int
    interpolation = "linear"

    @property
    def dim(self) -> int:
        return len(self.grid)

    @property
    def values(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define values")

    @property
    def channels(self) -> int:
        return self.values.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def at(self, positions: Tensor) -> Tensor:
        """The values at ``positions [B, n, D]``: ``[B, n, c]``. Beyond the border the nearest cell counts."""
        raise NotImplementedError(f"{type(self).__name__} must define at")

    def centers(self) -> Tensor:
        """The centres of all cells, in row-major order: ``[1, cells, D]``."""
        axes = [(torch.arange(size, device=self.device) + 0.5) / size for size in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)[None]

    def symbols(self, bins: int = 16) -> tuple[Tensor, int]:
        """The values as symbols 0..S-1, int64 ``[B, *grid]``, and S: what entropies are counted over.

        Here the mean over the channels, cut into ``bins`` equal parts between its least and its largest value.
        """
        level = self.values.detach().float().mean(-1)
        flat = level.flatten(1)
        low, high = (x.view(-1, *[1] * self.dim) for x in (flat.amin(1), flat.amax(1)))
        share = (level - low) / (high - low).where(high > low, 1)
        return (share * bins).long().clamp(0, bins - 1), bins

    def patch(self, positions: Tensor, size: int) -> Tensor:
        """The values around ``positions [B, n, D]``, one cell apart: ``[B, n, size^D * c]``, in row-major order."""
        offsets = torch.tensor(list(itertools.product(range(size), repeat=self.dim)), device=positions.device)
        steps = (offsets - (size - 1) / 2) / torch.tensor(self.grid, device=positions.device)  # [size^D, D]
        around = positions[:, :, None] + steps.to(positions.dtype)
        return self.at(around.flatten(1, 2)).unflatten(1, around.shape[1:3]).flatten(2)

    def _check(self, positions: Tensor) -> None:
        if positions.ndim != 3 or positions.shape[0] != self.batch or positions.shape[2] != self.dim:
            name, got = type(self).__name__, list(positions.shape)
            raise ValueError(f"{name}: positions must have shape [{self.batch}, n, {self.dim}], got {got}")


class GridField(Field):
    """Values on a grid, ``[B, *grid, c]``. Gradients of `at` reach values and, between centres, positions."""

    def __init__(self, values: Tensor):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(f"{type(self).__name__}: values must be a float tensor, got {_kind(values)}")
        if values.ndim < 3 or 0 in values.shape[1:]:
            got = list(values.shape)
            raise ValueError(f"{type(self).__name__}: values must have shape [B, *grid, c], not empty, got {got}")
        self._values = values
        self.batch, self.grid = values.shape[0], tuple(values.shape[1:-1])

    @property
    def values(self) -> Tensor:
        return self._values

    def at(self, positions: Tensor) -> Tensor:
        """Multilinear interpolation: the 2^D surrounding centres, each weighted by ``prod_a (1 - |distance_a|)``."""
        self._check(positions)
        flat = self.values.flatten(1, -2)
        size = torch.tensor(self.grid, device=positions.device)
        if self.interpolation == "nearest":
            return _rows(flat, _ravel((positions * size).floor().long().clamp(min=0).minimum(size - 1), self.grid))
        place = (positions * size - 0.5).clamp(min=0).minimum((size - 1).to(positions.dtype))
        low = place.detach().floor().long()
        share = (place - low)[..., None].to(flat.dtype)  # [B, n, D, 1]
        total: Tensor | float = 0.0
        for corner in itertools.product((0, 1), repeat=self.dim):
            weight = math.prod(share[:, :, a] if c else 1 - share[:, :, a] for a, c in enumerate(corner))
            cell = (low + torch.tensor(corner, device=low.device)).minimum(size - 1)
            total = total + weight * _rows(flat, _ravel(cell, self.grid))
        return total


class ImageField(GridField):
    """Pictures ``[B, H, W, c]``, positions (down, right)."""

    @classmethod
    def load(cls, path: str | Path) -> "ImageField":
        """A picture file of any kind that Pillow reads, values in [0, 1], transparency left out."""
        return cls(read_picture(path)[None])


class WaveField(GridField):
    """Sound over time, ``samples [B, T, c]`` in [-1, 1] with c channels, ``rate`` samples a second."""

    def __init__(self, samples: Tensor, rate: float):
        super().__init__(samples)
        if samples.ndim != 3:
            raise ValueError(f"WaveField: samples must have shape [B, T, c], got {list(samples.shape)}")
        if not rate > 0:
            raise ValueError(f"WaveField: rate must be positive, got {rate}")
        self.rate = rate

    @classmethod
    def load(cls, path: str | Path) -> "WaveField":
        """A WAV file of PCM samples, 8, 16, 24 or 32 bits."""
        samples, rate = read_sound(path)
        return cls(samples[None], rate)


class SpectrogramField(GridField):
    """Loudness over (time, frequency), ``values [B, T, F, 1]`` in [0, 1]."""

    @classmethod
    def of(cls, sound: WaveField, window: int = 512, hop: int = 128, decibels: float = 80.0) -> "SpectrogramField":
        """The magnitudes of a short-time Fourier transform (Hann window, mean of the channels), in decibels.

        1 is the loudest place of each sound, 0 what lies ``decibels`` or more below it. F = window / 2 + 1.
        """
        samples = sound.values.mean(-1)
        if samples.shape[1] < window:
            raise ValueError(f"SpectrogramField: window must be at most the {samples.shape[1]} samples, got {window}")
        shape = torch.hann_window(window, device=samples.device, dtype=samples.dtype)
        spectrum = torch.stft(samples, window, hop, window=shape, return_complex=True).abs()  # [B, F, T]
        peak = spectrum.flatten(1).amax(1)[:, None, None]
        peak = peak.where(peak > 0, 1)
        level = 20 * (spectrum / peak).clamp(min=10 ** (-decibels / 20)).log10() / decibels + 1
        return cls(level.transpose(1, 2)[..., None])


class TextField(GridField):
    """Bytes along time: ``ids [B, N]``, integers 0..255 (or a ``bytes`` object, B = 1).

    A byte has no meaning between two others, so a position takes the byte whose cell it lies in. Its value is the
    row ``table[byte]`` of ``table [256, c]``, an embedding for instance, with gradient; one-hot without it.
    """

    interpolation = "nearest"

    def __init__(self, ids: Tensor | bytes, table: Tensor | None = None):
        if isinstance(ids, bytes):
            ids = torch.tensor([list(ids)], dtype=torch.int64)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"TextField: ids must be bytes or an integer tensor, got {_kind(ids)}")
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"TextField: ids must have shape [B, N] with N > 0, got {list(ids.shape)}")
        table = torch.eye(256, device=ids.device) if table is None else table
        if table.ndim != 2:
            raise ValueError(f"TextField: table must have shape [256, c], got {list(table.shape)}")
        ids = ids.long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            raise ValueError(f"TextField: ids must be between 0 and {len(table) - 1}, got {_range(ids)}")
        self.ids, self.table = ids, table
        self.batch, self.grid = ids.shape[0], (ids.shape[1],)

    @property
    def values(self) -> Tensor:
        return self.table[self.ids]

    @property
    def channels(self) -> int:
        return self.table.shape[1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def at(self, positions: Tensor) -> Tensor:
        return self.table[self.ids_at(positions)]

    def ids_at(self, positions: Tensor) -> Tensor:
        """The bytes at ``positions [B, n, 1]``: int64 ``[B, n]``."""
        self._check(positions)
        N = self.grid[0]
        return self.ids.gather(1, (positions[..., 0] * N).floor().long().clamp(0, N - 1))

    def symbols(self, bins: int = 256) -> tuple[Tensor, int]:
        return self.ids, len(self.table)


class PointField(Field):
    """Scattered points with values: ``points [B, N, D]``, anywhere, and ``values [B, N, c]``.

    The bounding box of each set, the same scale on every axis, becomes the unit cube. Between points the value is the
    mean of the ``k`` nearest, weighted by ``exp(-r^2 / (2 sigma^2))``, with sigma half a cell of the grid. `counts` is
    how many points lie in each cell.
    """

    def __init__(self, points: Tensor, values: Tensor, grid: Sequence[int] = (), k: int = 8):
        if points.ndim != 3 or points.shape[1] == 0:
            raise ValueError(f"PointField: points must have shape [B, N, D] with N > 0, got {list(points.shape)}")
        if values.ndim != 3 or values.shape[:2] != points.shape[:2]:
            want = f"[{points.shape[0]}, {points.shape[1]}, c]"
            raise ValueError(f"PointField: values must have shape {want}, got {list(values.shape)}")
        self.batch, _, D = points.shape
        self.grid = tuple(grid) or (max(2, round(4096 ** (1 / D))),) * D
        if len(self.grid) != D:
            raise ValueError(f"PointField: grid must have {D} axes, as the points, got {list(self.grid)}")
        low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
        scale = (high - low).amax(2, keepdim=True)
        scale = scale.where(scale > 0, 1)
        self.points, self.at_points, self.k = (points - low) / scale, values, k

    @property
    def values(self) -> Tensor:
        return self.at(self.centers().expand(self.batch, -1, -1)).unflatten(1, self.grid)

    @property
    def channels(self) -> int:
        return self.at_points.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.points.device

    def at(self, positions: Tensor) -> Tensor:
        self._check(positions)
        positions = positions.to(self.points.dtype).contiguous()
        near = knn(self.points, min(self.k, self.points.shape[1]), queries=positions)
        sigma = 0.5 / max(self.grid)
        return gaussian_gather(
            self.points, self.at_points, near.indices, sigma, query_positions=positions, normalize=True
        )

    def counts(self) -> Tensor:
        """Points per cell: ``[B, *grid]``."""
        size = torch.tensor(self.grid, device=self.points.device)
        cell = _ravel((self.points * size).floor().long().clamp(min=0).minimum(size - 1), self.grid)
        zeros = self.points.new_zeros(self.batch, math.prod(self.grid))
        return zeros.scatter_add(1, cell, torch.ones_like(cell, dtype=zeros.dtype)).view(-1, *self.grid)


def _ravel(cell: Tensor, grid: Sequence[int]) -> Tensor:
    """``[.., D]`` grid indices to flat cell numbers, row-major."""
    flat = cell[..., 0]
    for axis in range(1, len(grid)):
        flat = flat * grid[axis] + cell[..., axis]
    return flat


def _rows(flat: Tensor, cell: Tensor) -> Tensor:
    """``flat [B, cells, c]`` at ``cell [B, n]``: ``[B, n, c]``."""
    return flat.gather(1, cell[..., None].expand(-1, -1, flat.shape[-1]))


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _range(x: Tensor) -> str:
    return f"{int(x.min())} to {int(x.max())}"
