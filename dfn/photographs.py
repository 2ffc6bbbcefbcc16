"""How well entities tell a photograph: adaptive against uniform sampling. ``python -m dfn.photographs``."""

import argparse

import torch

from .field import ImageField
from .sampler import AdaptiveSampler, Entities, UniformSampler, psnr, reconstruct


def photographs() -> dict[str, ImageField]:
    """The two photographs that scikit-learn brings along, 427 x 640 x 3, in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise RuntimeError("photographs: needs scikit-learn, which the extra dfn-kernels[models] installs") from error
    files = {"temple": "china.jpg", "flower": "flower.jpg"}
    return {name: ImageField(torch.tensor(load_sample_image(file)).float()[None] / 255) for name, file in files.items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfn.photographs", description=__doc__)
    parser.add_argument("--shares", type=int, nargs="+", default=[64, 20, 10, 5], help="one entity per so many pixels")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(f"{'photograph':12} {'entities':>9} {'uniform':>9} {'regular':>9} {'adaptive':>9} {'gain':>7}   PSNR in dB")
    for name, field in photographs().items():
        for share in args.shares:
            n = field.grid[0] * field.grid[1] // share
            r = compare(field, n, args.seeds)
            gain = r["adaptive"] - r["uniform"]
            print(f"{name:12} {n:9} {r['uniform']:9.2f} {r['regular']:9.2f} {r['adaptive']:9.2f} {gain:+7.2f}")


if __name__ == "__main__":
    main()
