"""What a call may cost beside its kernels: what every op starts on the device, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from every_op import rand
from helpers import DEVICE, backends, leaves
from launches import started_by
from torch import Tensor

import dfn_kernels as dk

B, H, N, d, D, k, c = 2, 3, 11, 7, 2, 4, 5


def drift() -> tuple[Callable, dict]:
    return dk.flow_drift, dict(states=rand(B, N, d), positions=rand(B, N, D), weight=rand(D, d), bias=rand(D))


def drift_heads() -> tuple[Callable, dict]:
    return dk.flow_drift, dict(states=rand(B, N, d), positions=rand(B, H, N, D), weight=rand(H, D, d),
                               bias=rand(H, D), alpha=rand(H))  # fmt: skip


def norm(mode: str, lengths: bool = False) -> Callable:
    def make() -> tuple[Callable, dict]:
        rows = torch.tensor([N, 3], device=DEVICE) if lengths else None
        return dk.flow_norm, dict(states=rand(B, N, d), energy=rand(B, N), mode=mode, lengths=rows)

    return make


def convolution() -> tuple[Callable, dict]:
    return dk.short_convolution, dict(x=rand(B, N, d), weight=rand(4, d))


def packed_convolution() -> tuple[Callable, dict]:
    call, inputs = convolution()
    return call, {**inputs, "ptr": torch.tensor([0, 4, N], device=DEVICE)}


def gather() -> tuple[Callable, dict]:
    positions = rand(B, N, D)
    plan = dk.gather_plan(dk.knn(positions, k).indices, positions)
    return dk.gaussian_gather, dict(positions=positions, values=rand(B, N, c), indices=plan, sigma=0.5)


def gather_heads() -> tuple[Callable, dict]:
    positions = rand(B, H, N, D)
    plan = dk.gather_plan(dk.knn(positions, k).indices, positions)
    inputs = dict(positions=positions, values=rand(B, H, N, c), indices=plan, sigma=rand(H), influence=rand(B, H, N))
    return dk.gaussian_gather, {**inputs, "normalize": True}


def route() -> tuple[Callable, dict]:
    inputs = dict(x=rand(B, N, d), weights=rand(B, N, 4), patterns=rand(4, c, d), bias=rand(c))
    return dk.pattern_route, inputs


CHECKED = 5 if DEVICE == "cpu" else 0  # to look at the values of ptr
CASES = {  # name: op, what makes its inputs, most that the forward and the backward pass may start
    "flow_drift": ("flow_drift", drift, 1, 3),
    "flow_drift, heads": ("flow_drift", drift_heads, 1, 3),
    "flow_norm, mean": ("flow_norm", norm("mean"), 3, 4),
    "flow_norm, causal": ("flow_norm", norm("causal"), 3, 4),
    "flow_norm, lengths": ("flow_norm", norm("mean", lengths=True), 3, 4),
    "short_convolution": ("short_convolution", convolution, 1, 2),
    "short_convolution, packed": ("short_convolution", packed_convolution, 6 + CHECKED, 2),
    "gaussian_gather": ("gaussian_gather", gather, 2, 5),
    "gaussian_gather, heads": ("gaussian_gather", gather_heads, 2, 5),
    "pattern_route": ("pattern_route", route, 2, 6),
}


def differentiable(out: object) -> tuple[Tensor, ...]:
    return tuple(x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad)


def budgets() -> list:
    runs = []
    for name, (op, make, *most) in CASES.items():
        for backend in backends(op):
            for which, allowed in zip(("forward", "backward"), most, strict=True):
                key = f"{name}-{backend}-{which}"
                runs.append(pytest.param(make, backend, which, allowed, id=key))
    return runs


@pytest.mark.parametrize("make, backend, which, allowed", budgets())
def test_budget(make, backend, which, allowed):
    with dk.use_backend(backend):
        function, inputs = make()
        inputs = leaves(inputs)
        wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        outputs = differentiable(function(**inputs))  # a number as alpha or sigma becomes a tensor once in a process
        grads = [torch.randn_like(x) for x in outputs]
        started = started_by(lambda: function(**inputs) if which == "forward" else
                             torch.autograd.grad(outputs, wanted, grads))  # fmt: skip
    assert 0 < len(started) <= allowed, started


@pytest.mark.skipif("triton" not in backends("flow_norm"), reason="no Triton here")
def test_budget_of_long_norms(monkeypatch):
    """Beyond what a block reads by itself there is a kernel for the sums of blocks."""
    from dfn_kernels.triton import flow_norm as op

    states, energy = rand(2, 5, d).requires_grad_(), rand(2, 5).square().requires_grad_()
    with dk.use_backend("triton"):
        assert len(started_by(lambda: dk.flow_norm(states, energy))) == 2
        monkeypatch.setattr(op, "DIRECT", 4)
        out = dk.flow_norm(states, energy)
        assert len(started_by(lambda: dk.flow_norm(states, energy))) == 3
        assert len(started_by(lambda: torch.autograd.grad(out, (states, energy), states.detach()))) == 4


@pytest.mark.parametrize("backend", backends("knn"))
def test_budget_of_brute_force(backend):
    points, queries = rand(B, N, D), rand(B, 5, D)
    with dk.use_backend(backend):
        if DEVICE == "cpu" and backend == "native":  # the check of values is two of them
            assert 0 < len(started_by(lambda: dk.knn(points, k))) <= 3
        assert 0 < len(started_by(lambda: dk.knn(points, k, check=False))) <= 3
        assert 0 < len(started_by(lambda: dk.knn(points, k, queries=queries, check=False))) <= 3


@pytest.mark.skipif("triton" not in backends("knn"), reason="no Triton here")
@pytest.mark.parametrize("causal", [False, True])
def test_budget_of_a_triton_tree(causal, monkeypatch):
    from dfn_kernels.triton import knn

    monkeypatch.setattr(knn, "use_tree", lambda *sizes: True)
    points = rand(1, 67, D)
    with dk.use_backend("triton"):
        assert 3 < len(started_by(lambda: dk.knn(points, k, causal=causal, check=False))) <= 25


def test_counts_work_and_nothing_else():
    x = rand(3, 5)

    def run():
        y = torch.empty_like(x).view(5, 3).t().expand(2, 3, 5)[0]
        y.copy_(x)  # 1
        return (x.reshape(15) + y.reshape(-1)).sum()  # 2, 3; the reshape of y is a copy, 4

    assert len(started_by(run)) == 4
    values, indices = rand(1, 3, 2).requires_grad_(), torch.zeros(1, 3, 1, dtype=torch.int64, device=DEVICE)
    with dk.use_backend("reference"):
        many = started_by(lambda: dk.gaussian_gather(rand(1, 3, 2), values, indices, 0.5))
    assert len(many) > 5
