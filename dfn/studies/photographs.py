"""How well entities tell a photograph: adaptive against uniform sampling. ``dfn eval photographs``."""

import torch

from ..fields.field import ImageField
from ..fields.sampler import AdaptiveSampler, Entities, UniformSampler, psnr, reconstruct
from ..runs.crops import photographs


def regular(field: ImageField, n: int) -> Entities:
    """At most n entities on a regular lattice: the evenest that uniform sampling can be."""
    H, W = field.grid
    rows = max(1, int((n * H / W) ** 0.5))
    axes = [(torch.arange(m) + 0.5) / m for m in (rows, n // rows)]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)[None]
    return Entities(positions, field.at(positions), torch.ones(positions.shape[:2]))


def compare(field: ImageField, n: int, seeds: int = 3) -> dict[str, float]:
    """PSNR in dB of the photograph rebuilt from ``n`` entities, means over the seeds: uniform, regular, adaptive."""
    found = {"regular": psnr(reconstruct(regular(field, n), field), field.values)}
    for name, sampler in (("uniform", UniformSampler()), ("adaptive", AdaptiveSampler())):
        total = 0.0
        for seed in range(seeds):
            entities = sampler(field, n, torch.Generator().manual_seed(seed))
            total += psnr(reconstruct(entities, field), field.values)
        found[name] = total / seeds
    return found


def table(shares: tuple[int, ...] = (64, 20, 10, 5), seeds: int = 3) -> list[dict]:
    """`compare` for both photographs with one entity for so many pixels."""
    rows = []
    for name, field in photographs().items():
        for share in shares:
            n = field.grid[0] * field.grid[1] // share
            found = compare(field, n, seeds)
            rows.append({"photograph": name, "entities": n, **found, "gain": found["adaptive"] - found["uniform"]})
    return rows
