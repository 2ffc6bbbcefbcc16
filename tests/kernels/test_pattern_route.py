import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, backends, bits, check_compiled, distance, same_bits
from helpers import check_against_reference as check

import dfn_kernels
from dfn_kernels import PatternRouteFunction, pattern_route

BACKENDS = backends("pattern_route")
CPU_ONLY = pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")


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


# ---- shapes and strides ---------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_overflow_is_infinite(backend):
    x = torch.full((3, 40), 100.0, dtype=torch.float16, device=DEVICE)
    patterns = torch.full((2, 5, 40), 100.0, dtype=torch.float16, device=DEVICE)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.01], [0.1, 0.05]], device=DEVICE)
    with dfn_kernels.use_backend(backend):
        y = pattern_route(x, weights, patterns)
    assert y[0].isinf().all() and y[1].eq(4e3).all() and y[2].eq(6e4).all()


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


# ---- promises -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    for dtype, top_k in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 2)):
        sizes = dict(T=29, P=3, O=37, I=29) if INTERPRETED else dict(T=701, P=5, O=149, I=67)
        inputs = make(**sizes, dtype=dtype)
        before = copy.deepcopy(inputs)

        def run():
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}  # noqa: B023
            with dfn_kernels.use_backend(backend):
                y = pattern_route(**leaves, top_k=top_k)  # noqa: B023
            y.square().sum().backward()
            return [y.detach()] + [x.grad for x in leaves.values()]

        first = run()
        threads = torch.get_num_threads()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for ours, theirs in zip(run(), first, strict=True):
                assert same_bits(ours, theirs)
        torch.set_num_threads(threads)
        for name, x in inputs.items():
            assert torch.equal(bits(x), bits(before[name])), f"{name} was changed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_and_second_derivative(backend):
    inputs = make(T=4, P=2, O=3, I=5, dtype=torch.float64)
    x, weights, patterns, bias = (value.requires_grad_() for value in inputs.values())
    y = PatternRouteFunction.apply(x, weights, patterns, bias, None, None, False, backend)
    with dfn_kernels.use_backend(backend):
        assert same_bits(y, pattern_route(**inputs))
        (grad,) = torch.autograd.grad(pattern_route(**inputs).square().sum(), x, create_graph=True)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum(), (x, weights, patterns, bias)))
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with dfn_kernels.use_backend("reference"):
        (grad,) = torch.autograd.grad(pattern_route(**inputs).square().sum(), x, create_graph=True)
        grad.sum().backward()
    assert x.grad.abs().sum() > 0


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


# ---- bad input ------------------------------------------------------------------------------------------------------
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
