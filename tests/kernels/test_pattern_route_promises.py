"""What the op promises beside its values: same bits, no wrong second derivative, torch.compile, autocast, memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    DEVICE,
    INTERPRETED,
    backends,
    check_compiled,
    check_same_bits,
    check_second_derivative_raises,
    same_bits,
)
from test_pattern_route import make

import dfn_kernels
from dfn_kernels import PatternRouteFunction, pattern_route

BACKENDS = backends("pattern_route")


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    for dtype, top_k in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 2)):
        sizes = dict(T=29, P=3, O=37, I=29) if INTERPRETED else dict(T=701, P=5, O=149, I=67)
        check_same_bits(pattern_route, {**make(**sizes, dtype=dtype), "top_k": top_k}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_and_second_derivative(backend):
    inputs = make(T=4, P=2, O=3, I=5, dtype=torch.float64)
    x, weights, patterns, bias = (value.requires_grad_() for value in inputs.values())
    y = PatternRouteFunction.apply(x, weights, patterns, bias, None, None, False, backend)
    with dfn_kernels.use_backend(backend):
        assert same_bits(y, pattern_route(**inputs))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum(), (x, weights, patterns, bias)))
    check_second_derivative_raises(pattern_route, inputs, "x", "x", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for dtype, wide in ((torch.float32, False), (torch.bfloat16, True), (torch.float64, True)):
        i = make(T=7, dtype=dtype)
        floats = [x.requires_grad_() for x in i.values()]
        chosen = torch.arange(14, device=DEVICE).view(7, 2) % 5
        for choice in (None, chosen):
            torch.library.opcheck(torch.ops.dfn.pattern_route, (*floats, choice, None, wide, backend))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
def test_compile(backend):
    def layer(x, selector, patterns, bias):
        y, share = pattern_route(x.tanh(), (x @ selector).softmax(-1), patterns, bias, top_k=3, return_share=True)
        return y.relu() * share

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    i = make(lead=(2, 11))
    selector = torch.randn(29, 5, device=DEVICE)
    for N in (11, 31):
        x = torch.randn(2, N, 29, device=DEVICE)
        check_compiled(layer, compiled, [x, selector, i["patterns"], i["bias"]], backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_autocast(backend):
    inputs = make()
    half = {**inputs, "x": inputs["x"].bfloat16(), "patterns": inputs["patterns"].bfloat16()}
    with dfn_kernels.use_backend(backend):
        with torch.autocast(DEVICE, torch.bfloat16):
            y, mixed = pattern_route(**inputs), pattern_route(**{**inputs, "x": half["x"]})
            exact = pattern_route(**{name: x.double() for name, x in inputs.items()})
        assert y.dtype == torch.bfloat16 and exact.dtype == torch.float64
        assert same_bits(y, pattern_route(**half)) and same_bits(mixed, y)


MEMORY = """
import sys, torch
from bench.timing import peak_growth_mib
from dfn_kernels import pattern_route
dtype, top_k = getattr(torch, sys.argv[1]), int(sys.argv[2]) or None
T, P, d = 8192, 8, 512
x, patterns, g = (torch.randn(shape).to(dtype) for shape in ((T, d), (P, d, d), (T, d)))
weights = torch.randn(T, P).softmax(-1)
leaves = [x.requires_grad_() for x in (x, weights, patterns)]
def run(n=T):
    global y
    y = pattern_route(x[:n], weights[:n], patterns, top_k=top_k)
    y.backward(g[:n])
run(64)
for leaf in leaves:
    leaf.grad = None
results = sum(x.numel() * x.element_size() for x in (*leaves, g))
print(peak_growth_mib(run, "cpu") - results / 2**20)
einsum = lambda: torch.einsum("tp,poi->toi", weights[:256].to(dtype), patterns)
print(peak_growth_mib(einsum, "cpu"), 256 * d * d * x.element_size() / 2**20)
"""


def extra_memory(dtype: str, top_k: int) -> float:
    """MiB beyond the results (output and gradients) of forward + backward in a process that does only this."""
    command = [sys.executable, "-c", MEMORY, dtype, str(top_k)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    extra, seen, size = map(float, done.stdout.split())
    assert seen > 0.9 * size, f"a tensor of {size} MiB was measured as {seen} MiB"
    return extra


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="measures the memory of a process")
def test_memory():
    """Less than 64 MiB at T=8192, P=8, 512->512: [T,O,I] has 8 GiB, [T,P,O] and [T,P*I] 128 MiB."""
    assert extra_memory("float32", 0) < 64


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="measures the memory of a process")
@pytest.mark.parametrize("dtype, top_k, limit", [("bfloat16", 0, 48), ("float16", 0, 48), ("float32", 2, 64)])
def test_memory_of_other_paths(dtype, top_k, limit):
    """In half precision [T,P,O] and [T,P*I] have 64 MiB."""
    assert extra_memory(dtype, top_k) < limit
