"""Sparse routing: the exact threshold per token behind `pattern_route(density=)`, and `BlockDensity`, the fast one."""

import math

import torch
from torch import Tensor

from . import _backends
from .reference.pattern_route import pattern_route_density as reference

OP = "pattern_route_density"
_backends.register(OP, cpu=False, triton=False)

SAMPLES = 16384  # entries of the mixed matrix that the threshold is calibrated on: 0.25 points of error at 10 %


# ---- threshold ------------------------------------------------------------------------------------------------------
def _sample(patterns: Tensor) -> Tensor:
    """[P, S]: the same entries of every pattern, all of them if they are few, else evenly scattered over the matrix."""
    P, O, I = patterns.shape
    if O * I <= SAMPLES:
        return patterns.reshape(P, O * I)
    # a golden-ratio sequence over the flat index: even over rows and columns alike, and the same in every run
    step = round(O * I * 0.6180339887498949)
    while math.gcd(step, O * I) != 1:
        step += 1
    places = torch.arange(SAMPLES, device=patterns.device) * step % (O * I)
    return patterns.reshape(P, O * I)[:, places]


def density_threshold(weights: Tensor, patterns: Tensor, density: float) -> Tensor:
    """[T, P], [P, O, I] -> [T]: the magnitude that a share `density` of each token's mixed entries exceeds.

    The quantile of |F_t| over a fixed sample of entries; the exact one where there are at most SAMPLES.
    """
    entries = _sample(patterns).to(weights.dtype)
    S = entries.shape[1]
    keep = round(density * S)
    if keep >= S or weights.numel() == 0:
        return weights.new_full((weights.shape[0],), -1.0)
    rows = max(1, 2**22 // S)
    return torch.cat(
        [(part @ entries).abs().kthvalue(S - keep, dim=1).values if keep < S else part for part in weights.split(rows)]
    )


# ---- public ---------------------------------------------------------------------------------------------------------
def route_with_density(
    x: Tensor,  # [T, I]
    weights: Tensor,  # [T, P]
    patterns: Tensor,  # [P, O, I]
    bias: Tensor | None,  # [O]
    density: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:  # [T, O], the share of connections that are active, 0-d float32
    device = x.device.type
    _backends.choose(OP, device)
    with torch.autocast(device, enabled=False):
        threshold = density_threshold(weights.detach(), patterns.detach(), density)
        y, kept = reference(x, weights, patterns, threshold, bias)
    return y, kept.double().mean().div(patterns.shape[1] * patterns.shape[2]).float()
