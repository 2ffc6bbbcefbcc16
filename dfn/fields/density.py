"""Information densities: how much there is to know at each place of a field, ``field -> [B, *grid]``, not negative.

Any such function serves an `AdaptiveSampler`; so does a module, which then learns through the influence weights.
"""

import itertools

import torch
from torch import Tensor, nn

from dfn_kernels._checks import are_sizes

from .field import Field, PointField, TextField


def gradient_magnitude(field: Field, smooth: int = 5) -> Tensor:
    """``sqrt(sum over axes and channels of (dv / dx)^2)``, averaged over a box of ``smooth`` cells a side.

    Differences between the two neighbouring cells, in units of the cell. With ``n`` entities of density rho, each
    standing for the values around it, the squared error in the plane is about ``|gradient|^2 / rho``; its integral is
    least where rho is proportional to the gradient's magnitude.
    """
    v = field.values.float()
    total = torch.zeros((), device=v.device)
    for axis in range(1, v.ndim - 1):
        size = v.shape[axis]
        index = torch.arange(size, device=v.device)
        step = v.index_select(axis, (index + 1).clamp(max=size - 1)) - v.index_select(axis, (index - 1).clamp(min=0))
        total = total + (step / 2).square().sum(-1)
    return box_mean((total + 1e-24).sqrt(), smooth)


def local_entropy(field: Field, window: int = 7, bins: int = 16) -> Tensor:
    """Entropy, in bits, of the symbols (`Field.symbols`) in a window around every cell: ``-sum_s p_s log2 p_s``."""
    symbols, count = field.symbols(bins)
    entropy = torch.zeros(symbols.shape, device=symbols.device)
    for s in symbols.unique().tolist():  # one symbol at a time: [B, *grid, S] would be 256 times a text
        p = box_mean((symbols == s).float(), window)
        entropy = entropy - torch.special.xlogy(p, p) / 0.6931471805599453
    return entropy.clamp(min=0)


def surprise(field: TextField, smooth: int = 1, backoff: float = 2.0) -> Tensor:
    """What each byte tells beyond the text before it, in bits: ``-log2 p(b_i | b_<i)``, ``[B, N]``.

    p is a byte bigram that learns as it reads, so it knows nothing of what follows:
    ``p = (count(b_{i-1} b_i) + m u(b_i)) / (count(b_{i-1}) + m)`` with ``u(b) = (count(b) + 1) / (i + 256)`` and
    counts over what came before. m is ``backoff``.
    """
    if not isinstance(field, TextField):
        raise TypeError(f"surprise: field must be a TextField, got {type(field).__name__}")
    ids, S = field.ids, len(field.table)
    N = ids.shape[1]
    before = torch.cat([torch.full_like(ids[:, :1], S), ids[:, :-1]], 1)
    seen = torch.arange(N, device=ids.device)
    unigram = (_earlier(ids) + 1) / (seen + S)
    p = (_earlier(before * S + ids) + backoff * unigram) / (_earlier(before) + backoff)
    return box_mean(-p.log2(), smooth)


def occupancy(field: PointField) -> Tensor:
    """How many points lie in each cell, slightly blurred."""
    if not isinstance(field, PointField):
        raise TypeError(f"occupancy: field must be a PointField, got {type(field).__name__}")
    return box_mean(field.counts(), 3)


class LearnedDensity(nn.Module):
    """A density of two convolutions, ``softplus(conv(gelu(conv(values))))``: ``field -> [B, *grid]``, positive.

    ``channels`` is the field's c, ``dim`` its D, 1 to 3. It starts out as uniform, and learns through influence.
    """

    def __init__(self, channels: int, dim: int, hidden: int = 16, width: int = 3):
        super().__init__()
        are_sizes("LearnedDensity", channels=channels, hidden=hidden, width=width)
        if dim not in (1, 2, 3):
            raise ValueError(f"LearnedDensity: dim must be 1, 2 or 3, got {dim}")
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        self.dim, self.channels = dim, channels
        self.first = conv(channels, hidden, width, padding="same", padding_mode="replicate")
        self.second = conv(hidden, 1, width, padding="same", padding_mode="replicate")
        nn.init.zeros_(self.second.weight)
        nn.init.ones_(self.second.bias)

    def forward(self, field: Field) -> Tensor:
        v = field.values
        if (field.dim, v.shape[-1]) != (self.dim, self.channels):
            want, got = f"{self.dim} axes and {self.channels} channels", f"{field.dim} and {v.shape[-1]}"
            raise ValueError(f"LearnedDensity: field must have {want}, got {got}")
        x = self.first(v.to(next(self.parameters()).dtype).movedim(-1, 1))
        return nn.functional.softplus(self.second(nn.functional.gelu(x)))[:, 0]


def box_mean(x: Tensor, width: int) -> Tensor:
    """The mean over a box of ``width`` (odd) cells a side around every cell of ``x [B, *grid]``, inside the grid."""
    if width % 2 == 0 or width < 1:
        raise ValueError(f"box_mean: width must be odd and positive, got {width}")
    reach = width // 2
    for axis in range(1, x.ndim):
        if width > 1:
            size = x.shape[axis]
            total = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1), dtype=torch.float64), x.double().cumsum(axis)],
                              axis)  # fmt: skip
            index = torch.arange(size, device=x.device)
            low, high = (index - reach).clamp(min=0), (index + reach + 1).clamp(max=size)
            shape = [size if a == axis else 1 for a in range(x.ndim)]
            window = total.index_select(axis, high) - total.index_select(axis, low)
            x = (window / (high - low).view(shape)).to(x.dtype)
    return x


def _earlier(keys: Tensor) -> Tensor:
    """How often the same key stands earlier in the row: float ``[B, N]``."""
    order = keys.argsort(dim=1, stable=True)
    ordered = keys.gather(1, order)
    place = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    start = torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]], 1)
    first = (place * start).cummax(1).values
    return torch.empty_like(place).scatter(1, order, place - first).float()


def curve(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """All cells along a Hilbert curve: int64 ``[cells]``, flat row-major numbers.

    Neighbours on the curve are neighbours in space, so equal shares of the mass along it are compact pieces of the
    field; in row-major order they are strips.

    Source: J. Skilling, Programming the Hilbert curve, AIP Conference Proceedings 707 (2004).
    """
    if len(grid) == 1:
        return torch.arange(grid[0], device=device)
    D, b = len(grid), max(1, max(size - 1 for size in grid).bit_length())
    axes = torch.meshgrid(*[torch.arange(size, device=device) for size in grid], indexing="ij")
    x = [a.flatten() for a in axes]
    for q in (1 << i for i in range(b - 1, 0, -1)):
        for i in range(D):
            t = (x[0] ^ x[i]) & (q - 1)
            set_ = (x[i] & q) != 0
            first = torch.where(set_, x[0] ^ (q - 1), x[0] ^ t)
            x[i] = x[i] if i == 0 else torch.where(set_, x[i], x[i] ^ t)
            x[0] = first if i else torch.where(set_, x[0] ^ (q - 1), x[0])
    for i in range(1, D):
        x[i] = x[i] ^ x[i - 1]
    t = torch.zeros_like(x[0])
    for q in (1 << i for i in range(b - 1, 0, -1)):
        t = torch.where((x[D - 1] & q) != 0, t ^ (q - 1), t)
    x = [a ^ t for a in x]
    key = torch.zeros_like(x[0])
    for bit, i in itertools.product(range(b - 1, -1, -1), range(D)):
        key = key * 2 + ((x[i] >> bit) & 1)
    return key.argsort(stable=True)
