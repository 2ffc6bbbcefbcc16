"""What the op takes (broadcast weights, strides, no elements, what is not a number) and what it refuses."""

import subprocess
import sys

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits
from helpers import check_against_reference as check
from test_pattern_route import make

import dfn_kernels
from dfn_kernels import BlockDensity, pattern_route

BACKENDS = backends("pattern_route")
CPU_ONLY = pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dims_and_broadcast_weights(backend):
    B, N, P = 3, 7, 5
    full = make(lead=(B, N), P=P)
    with dfn_kernels.use_backend(backend):
        flat = {**full, "x": full["x"].flatten(0, 1), "weights": full["weights"].flatten(0, 1)}
        assert same_bits(pattern_route(**full).flatten(0, 1), pattern_route(**flat))
        one = {**full, "x": full["x"][0, 0], "weights": full["weights"][0, 0]}
        assert pattern_route(**one).shape == (37,)
    for shape in [(B, 1, P), (1, N, P), (N, P), (P,), (1, 1, P)]:
        weights = torch.randn(shape, device=DEVICE)
        check(pattern_route, {**full, "weights": weights}, backend)
        spread = weights.expand(B, N, P).clone()
        with dfn_kernels.use_backend(backend):
            narrow, full_size = (pattern_route(**{**full, "weights": w}) for w in (weights, spread))
            assert same_bits(narrow, full_size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(dtype=dtype)
        transposed = {name: x.mT.contiguous().mT if x.ndim > 1 else x for name, x in inputs.items()}
        spaced = {name: torch.stack([x, x], dim=-2)[..., 0, :] if x.ndim > 1 else x for name, x in inputs.items()}
        swapped = {**inputs, "patterns": inputs["patterns"].transpose(0, 1).contiguous().transpose(0, 1)}
        expanded = {**inputs, "x": inputs["x"][:1].expand(23, -1), "weights": inputs["weights"][:1].expand(23, -1)}
        dense = {name: x.contiguous() for name, x in expanded.items()}
        assert not transposed["patterns"].is_contiguous() and not spaced["x"].is_contiguous()
        with dfn_kernels.use_backend(backend):
            want = pattern_route(**inputs)
            for strided in (transposed, spaced, swapped):
                assert same_bits(pattern_route(**strided), want)
            assert same_bits(pattern_route(**expanded), pattern_route(**dense))
        check(pattern_route, transposed, backend)
        x = inputs["x"].clone().requires_grad_()
        with dfn_kernels.use_backend(backend):  # a gradient that is expanded, or transposed
            (from_sum,) = torch.autograd.grad(pattern_route(x, inputs["weights"], inputs["patterns"]).sum(), x)
            y = pattern_route(x, inputs["weights"], inputs["patterns"])
            (from_ones,) = torch.autograd.grad(y, x, torch.ones_like(y).T.contiguous().T)
        assert same_bits(from_sum, from_ones)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(T=0), dict(O=0), dict(I=0), dict(P=0), dict(T=0, I=0)], ids=str)
def test_empty(backend, empty):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(**empty, dtype=dtype)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        with dfn_kernels.use_backend(backend):
            y = pattern_route(**leaves)
            assert same_bits(y, inputs["bias"].to(dtype).expand(y.shape))
            y.sum().backward()
        for name, x in leaves.items():
            want = inputs["x"].shape[0] if name == "bias" else 0
            assert x.grad is None or x.grad.eq(want).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend):
    inputs = make()
    inputs["x"][3, 4] = float("nan")
    inputs["x"][5, 6] = float("inf")
    inputs["weights"][7, 1] = float("nan")
    with dfn_kernels.use_backend(backend):
        y = pattern_route(**inputs)
    bad = [3, 5, 7]
    assert not y[bad].isfinite().any()
    assert y[[t for t in range(23) if t not in bad]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_what_is_infinite_in_a_dropped_block_does_not_count(backend):
    """Neither an infinite pattern there nor, in the backward pass, infinite gradients of it."""
    patterns = torch.rand(1, 128, 128, device=DEVICE) + 1
    patterns[:, :, :64] /= 100
    sparse = BlockDensity(patterns, 0.5)
    x, weights = torch.rand(2, 128, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    results = []
    for extreme in (False, True):
        if extreme:
            patterns[0, 0, 0] = float("inf")
            x[0, 3] = float("inf")
        leaf = patterns.clone().requires_grad_()
        with dfn_kernels.use_backend(backend):
            y = sparse(x, weights, leaf)[1]
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    assert sparse.blocks.tolist() == [[[False, True]]]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif("triton" not in BACKENDS, reason="asks Triton's launcher")
@pytest.mark.parametrize("switch, on, off", [("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")])
def test_switches_of_tf32(switch, on, off):
    """PyTorch 2.9 has a new one; once it was set, reading the old one may raise an error."""
    if switch == "fp32_precision" and not hasattr(torch.backends.cuda.matmul, switch):
        pytest.skip("this PyTorch has only the old switch")
    done = subprocess.run([sys.executable, "-c", SWITCHES, switch, repr(on), repr(off)], capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "tf32", "ieee", "ieee"], done.stdout + done.stderr


# A process of its own: PyTorch remembers which of the two switches was set.
SWITCHES = """
import sys, torch
from dfn_kernels.triton.pattern_route import _precision
switch, *values = sys.argv[1], *map(eval, sys.argv[2:])
print(_precision(torch.float32))
for value in values:
    setattr(torch.backends.cuda.matmul, switch, value)
    print(_precision(torch.float32))
print(_precision(torch.bfloat16))
"""


@pytest.mark.slow  # gigabytes, of which a page a row is ever touched
@pytest.mark.skipif(not INTERPRETED or DEVICE != "cpu", reason="wants memory that is not there until it is used")
@pytest.mark.parametrize("far", ["x", "grad"])
def test_rows_far_apart_in_triton(far, monkeypatch):
    """As hidden[:, -1] of a large tensor: 32 rows, a tile of float32, reach beyond 2^31 elements."""
    from dfn_kernels.triton import pattern_route as launcher

    T, stride = 32, 70_000_000
    inputs = make(T=T, P=2, O=7, I=5, bias=False)
    x, weights, patterns = inputs.values()
    grad = torch.randn(T, 7)
    want = launcher.pattern_route(x, weights, patterns, None, None, False)
    grads = launcher.pattern_route_backward(grad, x, weights, patterns, None, True, True, False)
    near = x if far == "x" else grad
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    spread = torch.empty(T * stride).as_strided(near.shape, (stride, 1)).copy_(near)
    x, grad = (spread, grad) if far == "x" else (x, spread)
    assert same_bits(launcher.pattern_route(x, weights, patterns, None, None, False), want)
    ours = launcher.pattern_route_backward(grad, x, weights, patterns, None, True, True, False)
    assert all(same_bits(a, b) for a, b in zip(ours, grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_overflow_is_infinite(backend):
    x = torch.full((3, 40), 100.0, dtype=torch.float16, device=DEVICE)
    patterns = torch.full((2, 5, 40), 100.0, dtype=torch.float16, device=DEVICE)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.01], [0.1, 0.05]], device=DEVICE)
    with dfn_kernels.use_backend(backend):
        y = pattern_route(x, weights, patterns)
    assert y[0].isinf().all() and y[1].eq(4e3).all() and y[2].eq(6e4).all()


BAD = {
    "x: not a tensor": (dict(x=[[0.0]]), TypeError, "x must be a tensor, got list"),
    "x: integers": (dict(x=torch.zeros(23, 29, dtype=torch.int64)), TypeError, "x must be float.*got torch.int64"),
    "x: size": (dict(x=torch.zeros(23, 28)), ValueError, r"x must have shape .* with I = 29, got \[23, 28\]"),
    "x: scalar": (dict(x=torch.zeros(())), ValueError, r"x must have shape .* got \[\]"),
    "weights: not a tensor": (dict(weights=None), TypeError, "weights must be a tensor, got NoneType"),
    "weights: dtype": (dict(weights=torch.zeros(23, 5, dtype=torch.bool)), TypeError, "weights must be float"),
    "weights: size": (dict(weights=torch.zeros(23, 4)), ValueError, r"weights must have shape .* with P = 5"),
    "weights: lead": (dict(weights=torch.zeros(22, 5)), ValueError, r"broadcast to \[23\], those of x, got \[22, 5\]"),
    "weights: more dims": (dict(weights=torch.zeros(2, 23, 5)), ValueError, "weights must have leading dimensions"),
    "weights: scalar": (dict(weights=torch.zeros(())), ValueError, "weights must have shape"),
    "patterns: not a tensor": (dict(patterns=0.0), TypeError, "patterns must be a tensor, got float"),
    "patterns: dims": (dict(patterns=torch.zeros(37, 29)), ValueError, r"patterns must have .* got \[37, 29\]"),
    "patterns: dtype": (dict(patterns=torch.zeros(5, 37, 29).bfloat16()), TypeError, "patterns must have the dtype"),
    "bias: size": (dict(bias=torch.zeros(36)), ValueError, r"bias must have shape \[O\] = \[37\], got \[36\]"),
    "bias: dtype": (dict(bias=torch.zeros(37, dtype=torch.int32)), TypeError, "bias must be float"),
    "top_k: zero": (dict(top_k=0), ValueError, "top_k must be between 1 and 5, got 0"),
    "top_k: above P": (dict(top_k=6), ValueError, "top_k must be between 1 and 5, got 6"),
    "top_k: float": (dict(top_k=2.0), TypeError, "top_k must be an integer, got float"),
    "top_k: bool": (dict(top_k=True), TypeError, "top_k must be an integer, got bool"),
    "density: zero": (dict(density=0.0), ValueError, "density must be above 0 and at most 1, got 0.0"),
    "density: above 1": (dict(density=1.5), ValueError, "density must be above 0 and at most 1, got 1.5"),
    "density: NaN": (dict(density=float("nan")), ValueError, "density must be above 0"),
    "density: text": (dict(density="0.1"), TypeError, "density must be a number, got str"),
    "out_dtype: integer": (dict(out_dtype=torch.int32), TypeError, "out_dtype must be float.* got torch.int32"),
    "return_share: number": (dict(return_share=1), TypeError, "return_share must be True or False, got int"),
    "device": (dict(weights=torch.zeros(23, 5, device="meta")), ValueError, "weights must be on cpu like x"),
    "device of patterns": (dict(patterns=torch.zeros(5, 37, 29, device="meta")), ValueError, "patterns must be on cpu"),
}  # fmt: skip


@CPU_ONLY
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match="^pattern_route: .*" + message):
        pattern_route(**{**make(), **change})
