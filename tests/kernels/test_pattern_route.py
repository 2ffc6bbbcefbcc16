"""Values and gradients against the reference.

test_pattern_route_inputs.py asks what the op takes and refuses, test_pattern_route_promises.py what else
it promises.
"""

import itertools

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, backends, distance, same_bits
from helpers import check_against_reference as check

import dfn_kernels
from dfn_kernels import pattern_route

BACKENDS = backends("pattern_route")


def make(T=23, P=5, O=37, I=29, *, dtype=torch.float32, bias=True, lead=None, weights=None):
    """Inputs with every size different; weights of both signs that do not sum to 1."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (T,) if lead is None else lead
    inputs = {
        "x": torch.randn(*lead, I, device=DEVICE).to(dtype),
        "weights": torch.randn(*lead, P, device=DEVICE).to(dtype).to(real) if weights is None else weights.to(real),
        "patterns": torch.randn(P, O, I, device=DEVICE).div(max(I, 1) ** 0.5).to(dtype),
    }
    if bias:
        inputs["bias"] = torch.randn(O, device=DEVICE).to(dtype).to(real)
    return inputs


def softmax_weights(T, P):
    return torch.randn(T, P, device=DEVICE).softmax(-1)


# ---- values and gradients -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(backend, dtype):
    for bias, out_dtype in itertools.product([True, False], [None, torch.float32]):
        check(pattern_route, {**make(dtype=dtype, bias=bias), "out_dtype": out_dtype}, backend)


SIZES = [
    dict(T=1), dict(P=1), dict(O=1), dict(I=1), dict(T=1, P=1, O=1, I=1), dict(T=2), dict(T=7),
    dict(T=16, P=3, O=32, I=64),
    dict(T=131, P=2, O=67, I=61), dict(T=257, P=3, O=19, I=521), dict(T=17, P=7, O=587, I=13),
    dict(T=601, P=2, O=31, I=37),
    dict(T=13, P=2, O=11, I=1031), dict(T=61, P=2, O=1031, I=11), dict(T=3, P=67, O=5, I=7),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES[:9] if INTERPRETED else SIZES, ids=str)
def test_sizes(backend, sizes):
    for dtype in (torch.float32, torch.bfloat16):
        check(pattern_route, make(**sizes, dtype=dtype), backend)


@pytest.mark.skipif(INTERPRETED, reason="hours in the interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens(backend):
    for dtype in (torch.float32, torch.bfloat16):
        check(pattern_route, make(T=100_003, P=3, O=7, I=5, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = make(T=5, P=3, O=4, I=7, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in inputs.values()]
    for top_k in (2,) if INTERPRETED else (None, 2):
        with dfn_kernels.use_backend(backend):
            assert torch.autograd.gradcheck(lambda *args: pattern_route(*args, top_k=top_k), tensors, nondet_tol=0.0)  # noqa: B023


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend):
    inputs = make()
    want = {}
    for wanted in [list(inputs)] + [[name] for name in inputs]:
        leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.items()}
        with dfn_kernels.use_backend(backend):
            pattern_route(**leaves).square().sum().backward()
        want = want or {name: x.grad for name, x in leaves.items()}
        for name, x in leaves.items():
            assert same_bits(x.grad, want[name]) if name in wanted else x.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero", "negative", "one-hot", "large"])
def test_weights(backend, kind):
    T, P = 23, 5
    weights = {
        "zero": torch.zeros(T, P),
        "negative": -torch.rand(T, P),
        "one-hot": torch.eye(P)[torch.arange(T) % P],
        "large": torch.randn(T, P) * 1e4,
    }[kind].to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(weights=weights, dtype=dtype)
        check(pattern_route, inputs, backend)
        if kind == "zero":
            with dfn_kernels.use_backend(backend):
                assert same_bits(pattern_route(**inputs), inputs["bias"].to(dtype).expand(T, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_numbers_are_exact(backend):
    """Sums of small whole numbers have no rounding error in any order."""
    T, P, O, I = 37, 3, 41, 53
    x, patterns = (torch.randint(-2, 3, size, device=DEVICE).float() for size in ((T, I), (P, O, I)))
    weights = torch.randint(-2, 3, (T, P), device=DEVICE).float()
    want = torch.einsum("tp,poi,ti->to", *(v.double() for v in (weights, patterns, x)))
    for dtype in DTYPES:
        with dfn_kernels.use_backend(backend):
            got = pattern_route(x.to(dtype), weights, patterns.to(dtype), out_dtype=torch.float64)
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_output_keeps_float32_sums(backend, dtype):
    """Below 1e-5 of the exact result: out of reach for anything that rounds w into x, or F, to half precision."""
    T, P, d = (16, 2, 48) if INTERPRETED else (131, 8, 512)
    inputs = make(T, P, d, d, dtype=dtype, weights=softmax_weights(T, P))
    exact = pattern_route(**{name: x.double() for name, x in inputs.items()})
    with dfn_kernels.use_backend(backend):
        ours = pattern_route(**inputs, out_dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).norm() < 1e-5 * exact.norm()
    rounded = torch.einsum("tp,poi->toi", inputs["weights"].to(dtype), inputs["patterns"])
    plain = torch.einsum("toi,ti->to", rounded.float(), inputs["x"].float())
    assert (plain.double() - exact).norm() > 1e-4 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_against_published_code(backend):
    """At most twice the error of the published einsums in the same dtype, values and gradients."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make(19, 4, 43, 59, dtype=dtype, bias=False, weights=softmax_weights(19, 4))

        def published(x, weights, patterns):
            return torch.einsum("toi,ti->to", torch.einsum("tp,poi->toi", weights.to(x.dtype), patterns), x)

        results = {}
        for name, op in (("exact", published), ("plain", published), ("ours", pattern_route)):
            leaves = [(x.double() if name == "exact" else x.clone()).requires_grad_() for x in inputs.values()]
            with dfn_kernels.use_backend(backend):
                y = op(*leaves)
            y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).to(dtype).view_as(y).to(y.dtype))
            results[name] = [y.detach()] + [leaf.grad for leaf in leaves]
        for ours, exact, plain in zip(results["ours"], results["exact"], results["plain"], strict=True):
            assert_accurate(ours, exact, max(distance(plain, exact), torch.finfo(ours.dtype).eps * exact.norm().item()))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_long_sums_have_two_levels(backend):
    """Behind 2^28, single ones are lost in float32, a sum of 64 is not: here all but the first such sum count."""
    for T, d in ((2, 256), (1024, 2)):
        x, grad, patterns = (torch.ones(shape, device=DEVICE) for shape in ((T, d), (T, d), (1, d, d)))
        if T == 2:
            x[:, 0] = grad[:, 0] = patterns[:, :, 0] = patterns[:, 0] = 2.0**14
        else:
            x[0] = grad[0] = 2.0**14
        leaves = [tensor.requires_grad_() for tensor in (x, torch.ones(T, 1, device=DEVICE), patterns)]
        with dfn_kernels.use_backend(backend):
            y = pattern_route(*leaves)
        dx, _, dp = torch.autograd.grad(y, leaves, grad)
        if T == 2:
            assert (y[:, 1:] >= 2**28 + d - 64).all() and (dx[:, 1:] >= 2**28 + d - 64).all()
        else:
            assert (dp >= 2**28 + T - 256).all()


# ---- top_k, share ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_top_k(backend, top_k):
    many = 3 if INTERPRETED else 1201
    for dtype, T in ((torch.float32, 23), (torch.bfloat16, 17), (torch.float64, 5), (torch.float32, many)):
        check(pattern_route, {**make(T=T, dtype=dtype), "top_k": top_k}, backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_top_k_choice(backend):
    """Ties go to the lower pattern, negative weights can be chosen, what is not chosen gets no gradient."""
    patterns = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=DEVICE).view(4, 1, 1)
    x = torch.ones(4, 1, device=DEVICE)
    rows = [[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0], [-3.0, -1.0, -2.0, -4.0], [0.0, 0.0, 1.0, 0.0]]
    weights = torch.tensor(rows, device=DEVICE, requires_grad=True)
    with dfn_kernels.use_backend(backend):
        y, share = pattern_route(x, weights, patterns, top_k=2, return_share=True)
    y.sum().backward()
    assert y.flatten().tolist() == [11, 2020, -210, 100]
    assert weights.grad.tolist() == [[1, 10, 0, 0], [0, 10, 0, 1000], [0, 10, 100, 0], [1, 0, 100, 0]]
    assert share.dtype == torch.float32 and share.shape == () and share == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_of_everything_is_dense(backend):
    inputs = make()
    with dfn_kernels.use_backend(backend):
        y, share = pattern_route(**inputs, top_k=5, return_share=True)
        assert same_bits(y, pattern_route(**inputs)) and share == 1
