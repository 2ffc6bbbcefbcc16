import pytest
import torch
from helpers import DEVICE, backends, check_same_bits, same_bits
from test_pattern_route import make, softmax_weights

import dfn_kernels
from dfn_kernels import pattern_route
from dfn_kernels.route_density import density_threshold

BACKENDS = backends("pattern_route_density")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_reference(backend, dtype):
    for sizes in ({}, dict(T=1), dict(P=1), dict(O=1), dict(T=7, I=1), dict(T=67, P=3, O=41, I=67)):
        # the threshold is one of the magnitudes, and rounding must not move another past it: whole numbers
        inputs = make(**sizes, dtype=dtype)
        inputs["patterns"] = torch.randint(-9, 10, inputs["patterns"].shape, device=DEVICE).to(dtype)
        inputs["weights"] = torch.randint(-3, 4, inputs["weights"].shape, device=DEVICE).to(inputs["weights"].dtype)
        results = {}
        for name in (backend, "reference"):
            leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
            with dfn_kernels.use_backend(name):
                y, share = pattern_route(**leaves, density=0.3, return_share=True)
            (y * torch.arange(y.numel(), device=DEVICE).remainder(7).view_as(y)).sum().backward()
            results[name] = [y.detach(), share] + [x.grad for x in leaves.values()]
        for ours, exact in zip(results[backend], results["reference"], strict=True):
            loose = dict(rtol=1e-4, atol=1e-3) if ours.dtype == torch.float32 else {}
            torch.testing.assert_close(ours, exact, **loose)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = make(T=5, P=3, O=4, I=7, dtype=torch.float64)
    x, weights, patterns, bias = (value.requires_grad_() for value in inputs.values())
    threshold = density_threshold(weights.detach(), patterns.detach(), 0.5) * 1.001  # off the entry it was taken from

    def op(*args):
        return torch.ops.dfn.pattern_route_density(*args[:3], threshold, args[3])[0]

    assert torch.autograd.gradcheck(op, (x, weights, patterns, bias), nondet_tol=0.0)
    assert op(x, weights, patterns, bias).ne(bias).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_threshold_on_every_backend(backend):
    weights, patterns = softmax_weights(5, 3), torch.randn(3, 211, 223, device=DEVICE)
    weights[2, 1] = float("nan")
    want = density_threshold(weights, patterns, 0.3)
    got = density_threshold(weights, patterns, 0.3, backend)
    assert want.isnan().sum() == 1 and same_bits(got.nan_to_num(-1), want.nan_to_num(-1))
    want, got = (density_threshold(weights.double(), patterns.double(), 0.3, name) for name in ("reference", backend))
    assert same_bits(got.nan_to_num(-1), want.nan_to_num(-1))


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_keeps_the_largest(backend):
    """Where all entries are looked at, the threshold is the exact quantile of every token."""
    x, _, _, bias = make(T=11, P=3, O=13, I=17).values()
    # Whole numbers, whose sums are exact: rounding would move entries over the threshold.
    weights = torch.randint(1, 1 << 9, (11, 3), device=DEVICE).float()
    patterns = torch.randint(-(1 << 9), 1 << 9, (3, 13, 17), device=DEVICE).float()
    mixed = torch.einsum("tp,poi->toi", weights, patterns).flatten(1)
    keep = round(0.2 * 13 * 17)
    smallest = mixed.abs().topk(keep).values[:, -1:]
    kept = mixed.where(mixed.abs() >= smallest, 0).view(11, 13, 17)
    with dfn_kernels.use_backend(backend):
        y, share = pattern_route(x, weights, patterns, bias, density=0.2, return_share=True)
    torch.testing.assert_close(y, torch.einsum("toi,ti->to", kept, x) + bias)
    assert share.item() == pytest.approx(keep / (13 * 17)) and share.dtype == torch.float32


ENTRIES = {
    "normal": lambda *size: torch.randn(*size),
    "uniform": lambda *size: torch.rand(*size) - 0.5,
    "heavy-tailed": lambda *size: torch.distributions.StudentT(2.0).sample(size),
    "positive": lambda *size: torch.rand(*size),
    "rows of different scale": lambda *size: torch.randn(*size) * torch.logspace(-2, 2, size[1]).view(1, -1, 1),
}


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("entries", ENTRIES)
def test_share_is_within_a_point(entries, density):
    """Measured on the full mixed matrices of tokens with flat, peaked and one-hot mixtures; for every token."""
    P, O, I = 8, 331, 277
    patterns = ENTRIES[entries](P, O, I).to(DEVICE)
    peaked, one_hot = (5 * torch.randn(3, P, device=DEVICE)).softmax(-1), torch.eye(P, device=DEVICE)[:2]
    weights = torch.cat([softmax_weights(3, P), peaked, one_hot])
    threshold = density_threshold(weights, patterns, density)
    share = (torch.einsum("tp,poi->toi", weights, patterns).abs() > threshold.view(-1, 1, 1)).double().mean((1, 2))
    assert (share - density).abs().max() < 0.01
    y, measured = pattern_route(torch.randn(8, I, device=DEVICE), weights, patterns, density=density, return_share=True)
    assert measured.item() == pytest.approx(share.mean().item(), abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_with_top_k_and_everything(backend):
    inputs = make()
    with dfn_kernels.use_backend(backend):
        assert same_bits(pattern_route(**inputs, density=1.0), pattern_route(**inputs))
        weights = inputs["weights"]
        only = weights.where(weights >= weights.topk(2).values[:, -1:], 0)
        both = pattern_route(**inputs, density=0.4, top_k=2)
        torch.testing.assert_close(both, pattern_route(**{**inputs, "weights": only}, density=0.4))


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(T=0), dict(O=0), dict(I=0)], ids=str)
def test_empty(backend, empty):
    inputs = make(**empty)
    with dfn_kernels.use_backend(backend):
        y, share = pattern_route(**inputs, density=0.1, return_share=True)
    assert torch.equal(y, inputs["bias"].expand(y.shape)) and share == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    check_same_bits(pattern_route, {**make(T=97, P=5, O=31, I=67), "density": 0.1}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    i = make(T=7)
    floats = [x.requires_grad_() for x in i.values()]
    bias = floats.pop()
    torch.library.opcheck(torch.ops.dfn.pattern_route_density, (*floats, torch.rand(7, device=DEVICE), bias))
    compiled = torch.compile(lambda x, w, P: pattern_route(x, w, P, density=0.2), fullgraph=True, dynamic=True)
    for T in (7, 19):
        x, weights, patterns, _ = make(T=T).values()
        assert same_bits(compiled(x, weights, patterns), pattern_route(x, weights, patterns, density=0.2))


def test_not_a_number_is_seen():
    inputs = make()
    inputs["weights"][7, 1] = float("nan")
    y = pattern_route(**inputs, density=0.1)
    assert y[7].isnan().all() and y[6].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_weight_is_infinite(backend):
    """A kernel's registers reach beyond I: what infinity makes of the zeros there is neither counted nor added."""
    x, weights, patterns = (torch.rand(shape, device=DEVICE) + 0.1 for shape in ((7, 17), (7, 3), (3, 13, 17)))
    weights[2, 1] = float("inf")
    y, kept = torch.ops.dfn.pattern_route_density(x, weights, patterns, torch.full((7,), 1e-3, device=DEVICE), None)
    assert y[2].isposinf().all() and y[[0, 1, 3, 4, 5, 6]].isfinite().all() and kept.eq(13 * 17).all()


def test_dtype_of_the_output():
    assert pattern_route(**make(dtype=torch.bfloat16), density=0.1).dtype == torch.bfloat16
    assert pattern_route(**make(dtype=torch.bfloat16), density=0.1, out_dtype=torch.float32).dtype == torch.float32
