"""The ops, each with everything that has a gradient: what the tests across ops share."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits
from torch import Tensor

import dfn_kernels as dk


@dataclass(frozen=True)
class Op:
    name: str
    make: Callable[[torch.dtype], dict]
    call: Callable[..., Tensor]  # (**inputs) -> one float tensor

    def backends(self) -> list[str]:
        if self.name in ("low_rank_route", "field_sample"):
            return [] if INTERPRETED else ["reference"]
        return backends(self.name)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=dtype, device=DEVICE) + 0.1


def joined(drift: dk.Drift) -> Tensor:
    return torch.cat([drift.positions, drift.flow, drift.energy[..., None]], -1)


def make_gather(dtype):
    positions = rand(3, 11, 2, dtype=dtype)
    return dict(positions=positions, values=rand(3, 11, 5, dtype=dtype), influence=rand(3, 11, dtype=dtype),
                indices=torch.randint(-1, 11, (3, 11, 4), device=DEVICE))  # fmt: skip


def make_attention(dtype):
    return dict(states=rand(3, 11, 7, dtype=dtype), positions=rand(3, 11, 2, dtype=dtype),
                values=rand(3, 11, 5, dtype=dtype), flow_weight=rand(2, 7, dtype=dtype))  # fmt: skip


OPS = [
    Op("flow_drift", lambda t: dict(states=rand(3, 11, 7, dtype=t), positions=rand(3, 11, 2, dtype=t),
                                    weight=rand(2, 7, dtype=t), bias=rand(2, dtype=t)),
       lambda **x: joined(dk.flow_drift(**x))),
    Op("flow_norm", lambda t: dict(states=rand(3, 11, 7, dtype=t), energy=rand(3, 11, dtype=t)),
       lambda **x: dk.flow_norm(**x, mode="causal")),
    Op("short_convolution", lambda t: dict(x=rand(3, 11, 7, dtype=t), weight=rand(4, 7, dtype=t)),
       lambda **x: dk.short_convolution(**x)),
    Op("knn", lambda t: dict(positions=rand(3, 11, 2, dtype=t)), lambda **x: dk.knn(**x, k=4).sq_dists),
    Op("gaussian_gather", make_gather, lambda **x: dk.gaussian_gather(**x, sigma=0.5, normalize=True)),
    Op("flow_attention", make_attention, lambda **x: dk.flow_attention(**x, sigma=0.5, k=4, causal=True)[0]),
    Op("pattern_route", lambda t: dict(x=rand(3, 11, 7, dtype=t), weights=rand(3, 11, 4, dtype=t),
                                       patterns=rand(4, 5, 7, dtype=t), bias=rand(5, dtype=t)),
       lambda **x: dk.pattern_route(**x, top_k=3)),
    Op("low_rank_route", lambda t: dict(x=rand(3, 11, 7, dtype=t), weights=rand(3, 11, 4, dtype=t),
                                        up=rand(4, 5, 2, dtype=t), down=rand(4, 2, 7, dtype=t)),
       lambda **x: dk.low_rank_route(**x)),
]  # fmt: skip
PARAMETERS = ("weight", "bias", "flow_weight", "patterns", "up", "down")  # what a batch shares
CASES = [pytest.param(op, b, id=f"{op.name}-{b}") for op in OPS for b in op.backends()]


def run(op: Op, backend: str, inputs: dict) -> list[Tensor]:
    """Output, and the gradient of each float input."""
    mine = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    with dk.use_backend(backend):
        out = op.call(**mine)
    wanted = [x for x in mine.values() if x.requires_grad]
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, weight)]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        assert same_bits(a, b), f"result {number} differs"
