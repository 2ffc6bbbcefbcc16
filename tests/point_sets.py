"""Point sets that have broken neighbour searches, by name. `points(name, n, D)` gives float32 [n, D]."""

import torch
from torch import Tensor


def _clusters(n: int, D: int) -> Tensor:  # half of the points in 100 tight clusters
    x = torch.rand(n, D, dtype=torch.float64)
    h = n // 2
    x[:h] = torch.rand(100, D, dtype=torch.float64)[torch.randint(100, (h,))] + 1e-4 * torch.randn(h, D)
    return x[torch.randperm(n)]


def _outliers(n: int, D: int) -> Tensor:
    x = torch.rand(n, D)
    x[torch.randint(n, (5,))] = 1e6 * torch.randn(5, D)
    return x


def _line(n: int, D: int, axis: int) -> Tensor:
    x = torch.zeros(n, D)
    x[:, axis] = torch.rand(n)
    return x


def _circle(n: int, D: int) -> Tensor:
    angle = 2 * torch.pi * torch.rand(n)
    x = torch.zeros(n, D)
    x[:, 0] = angle.cos()
    if D > 1:
        x[:, 1] = angle.sin()
    return x


def _lattice(n: int, D: int) -> Tensor:
    side = round(n ** (1 / D) + 0.499)
    x = torch.cartesian_prod(*[torch.arange(side)] * D).reshape(-1, D)[:n]
    return x[torch.randperm(len(x))]


def _half_same(n: int, D: int) -> Tensor:
    x = torch.rand(n, D)
    x[: n // 2] = 0.5
    return x[torch.randperm(n)]


def _zeros(n: int, D: int) -> Tensor:
    x = torch.randint(-2, 3, (n, D)).float()
    return torch.where(x == 0, torch.where(torch.rand(n, D) < 0.5, 0.0, -0.0), x)


def _sorted(n: int, D: int) -> Tensor:
    x = torch.rand(n, D)
    return x[x[:, 0].argsort()]


_SETS = {
    "uniform": torch.rand,
    "normal": torch.randn,
    "clusters": _clusters,
    "outliers": _outliers,
    "line 0": lambda n, D: _line(n, D, 0),
    "line 1": lambda n, D: _line(n, D, 1 % D),
    "line 2": lambda n, D: _line(n, D, 2 % D),
    "diagonal": lambda n, D: torch.rand(n, 1).expand(n, D).clone(),
    "circle": _circle,
    "lattice": _lattice,
    "two rows": lambda n, D: torch.cat([2.0 * torch.randint(2, (n, 1)), torch.rand(n, D - 1)], 1),
    "half identical": _half_same,
    "identical": lambda n, D: torch.full((n, D), 0.3),
    "256 positions": lambda n, D: torch.rand(256, D)[torch.randint(256, (n,))],
    "1e6": lambda n, D: 1e6 * torch.rand(n, D),
    "around 1e6": lambda n, D: 1e6 + torch.rand(n, D),
    "1e18": lambda n, D: 1e18 * torch.randn(n, D),
    "overflowing": lambda n, D: 1e19 * torch.randn(n, D),
    "denormal": lambda n, D: 1e-40 * torch.rand(n, D, dtype=torch.float64),
    "underflowing": lambda n, D: 1e-22 * torch.rand(n, D, dtype=torch.float64),
    "signed zeros": _zeros,
    "sorted": _sorted,
    "reversed": lambda n, D: _sorted(n, D).flip(0),
}
NAMES = tuple(_SETS)


def points(name: str, n: int, D: int) -> Tensor:
    return _SETS[name](n, D).float().contiguous()
