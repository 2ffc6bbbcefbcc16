import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    backends,
    check_against_reference,
    check_compiled,
    check_same_bits,
    leaves,
    pairs,
    same_bits,
)

import dfn_kernels
from dfn_kernels import Drift, flow_attention
from dfn_kernels.knn import Neighbors, knn

BACKENDS = backends("flow_attention")
# Every option, off and on. Each test of pairs draws on this one table.
OPTIONS = {
    "flow_bias": (False, True),
    "receiver": (None, "weight", "bias", "both"),
    "influence": (None, "shared", "head"),
    "causal": (False, True),
    "include_self": (True, False),
    "lengths": (False, True),
    "normalize": (False, True),
    "extra": (None, "shared", "head"),
    "alpha": ("float", "one", "head"),
    "positions": ("head", "shared"),
    "k": (1, 4, 40),
}


def make(B=2, H=3, N=23, D=2, d=11, c=7, E=5, *, dtype=torch.float32, **chosen):
    chosen = {name: chosen.get(name, choices[0]) for name, choices in OPTIONS.items()} | chosen
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, dtype=real, device=DEVICE)

    inputs = {
        "states": normal(B, N, d).to(dtype),
        "positions": normal(B, N, D) if chosen["positions"] == "shared" else normal(B, H, N, D),
        "flow_weight": normal(H, D, d),
        "values": normal(B, H, N, c).to(dtype),
        "sigma": torch.rand(H, dtype=real, device=DEVICE) + 0.5,
        "k": chosen["k"],
        "alpha": {"float": 0.1, "one": normal(1)[0], "head": normal(H)}[chosen["alpha"]],
        **{name: chosen[name] for name in ("causal", "include_self", "normalize")},
    }
    if chosen["flow_bias"]:
        inputs["flow_bias"] = normal(H, D)
    if chosen["receiver"] in ("weight", "both"):
        inputs["query_weight"] = normal(H, D, d)
    if chosen["receiver"] in ("bias", "both"):
        inputs["query_bias"] = normal(H, D)
    if chosen["influence"]:
        shape = (B, N) if chosen["influence"] == "shared" else (B, H, N)
        inputs["influence"] = torch.rand(shape, dtype=real, device=DEVICE)
    if chosen["lengths"]:
        inputs["lengths"] = torch.tensor([N - 4, 0, N], device=DEVICE)[:B]
    if chosen["extra"]:
        lead = (B, E) if chosen["extra"] == "shared" else (B, H, E)
        inputs |= {"extra_positions": normal(*lead, D), "extra_values": normal(*lead, c).to(dtype)}
        if chosen["influence"]:
            inputs["extra_influence"] = torch.rand(lead, dtype=real, device=DEVICE)
    return inputs


PAIRS = pairs(OPTIONS)
# The interpreter takes seconds for each; all of them in `make check`.
SOME_PAIRS = [pytest.param(row, id=str(i), marks=[pytest.mark.slow] if INTERPRETED and i % 8 else [])
              for i, row in enumerate(PAIRS)]  # fmt: skip


def outputs(**inputs):
    """All differentiable outputs in one tensor."""
    context, drift, found = flow_attention(**inputs)
    near = found.sq_dists.where(found.sq_dists.isfinite(), 0)
    return torch.cat([x.flatten().to(context.dtype) for x in (context, *drift, near)])


def everything(result):
    return (result[0], *result[1], *result[2])


def run(inputs, backend):
    with dfn_kernels.use_backend(backend):
        return flow_attention(**inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", SOME_PAIRS)
def test_every_pair_of_options(backend, row):
    """In float64 the neighbours are those of the reference, so values and gradients can be held against it."""
    inputs = make(dtype=torch.float64, **row)
    ours, reference = run(inputs, backend), run(inputs, "reference")
    assert torch.equal(ours[2].indices, reference[2].indices)
    check_against_reference(outputs, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dtypes(backend, dtype):
    inputs = make(dtype=dtype, extra="head", causal=True, receiver="both", normalize=True, influence="head", k=4)
    ours, reference = run(inputs, backend), run(inputs, "reference")
    assert ours[0].dtype == dtype and all(x.dtype == torch.float32 for x in (*ours[1], ours[2].sq_dists))
    assert (ours[2].indices == reference[2].indices).float().mean() > 0.99
    torch.testing.assert_close(ours[0].float(), reference[0].float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_composition(backend):
    i = make(causal=True, k=4)
    context, drift, found = run(i, backend)
    with dfn_kernels.use_backend(backend):
        moved = dfn_kernels.flow_drift(i["states"], i["positions"], i["flow_weight"])
        neighbors = knn(moved.positions, 4, causal=True)
        y = dfn_kernels.gaussian_gather(moved.positions, i["values"], neighbors.indices, i["sigma"])
    assert isinstance(drift, Drift) and isinstance(found, Neighbors)
    for ours, theirs in zip((context, *drift, *found), (y, *moved, *neighbors), strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("receiver", ["weight", "bias"])
@pytest.mark.parametrize("causal", [True, False])
def test_large_search_with_receivers(backend, receiver, causal):
    """Large enough for the search to work by cells; the truth is the comparison of all pairs."""
    N = 3001 if backend == "native" else 300
    i = make(B=1, H=1, N=N, D=3, c=2, receiver=receiver, causal=causal, include_self=False, k=4, dtype=torch.float64)
    i["lengths"] = torch.tensor([N - 7], device=DEVICE)
    assert torch.equal(run(i, backend)[2].indices, run(i, "reference")[2].indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_between_own_and_extra_entities(backend):
    """Everything in one place: the lower index wins, so own entities come before the memory."""
    i = make(causal=True, extra="head", k=4)
    for name in ("positions", "extra_positions", "flow_weight"):
        i[name].zero_()
    indices = run(i, backend)[2].indices
    assert indices[0, 0, 0].tolist() == [0, 23, 24, 25] and indices[0, 0, 9].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("receiver", OPTIONS["receiver"])
def test_causal_to_the_bit(backend, receiver):
    N = 1700 if backend == "native" else 40
    i = make(N=N, causal=True, receiver=receiver, extra="head", k=4, normalize=True)
    first = run(i, backend)
    for cut in (1, N // 2, N - 1):
        other = {n: x.clone() if torch.is_tensor(x) else x for n, x in i.items()}
        for name in ("states", "positions", "values"):
            rows = other[name].narrow(other[name].ndim - 2, cut, N - cut)
            rows.copy_(torch.randn_like(rows) * 100)
        for ours, theirs in zip(everything(first), everything(run(other, backend)), strict=True):
            assert same_bits(ours[:, :, :cut], theirs[:, :, :cut])


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_never_changes_the_result(backend):
    i = make(N=900 if backend == "native" else 30, causal=True, k=4, extra="head")
    want = run(i, backend)
    wrong = Neighbors(torch.zeros_like(want[2].indices), want[2].sq_dists)
    for warm in (want[2], wrong):
        got = run({**i, "warm": warm}, backend)
        assert same_bits(got[0], want[0]) and torch.equal(got[2].indices, want[2].indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_heads_and_batch(backend):
    i = make(B=1, H=1, extra="head", influence="head", receiver="both", flow_bias=True, causal=True, lengths=True, k=4)
    want = run(i, backend)
    per_head = ("flow_weight", "flow_bias", "query_weight", "query_bias")
    rest = [n for n in i if torch.is_tensor(i[n]) and n not in (*per_head, "sigma", "states", "lengths")]
    flat = {**i, **{n: i[n][0] for n in per_head}, **{n: i[n][:, 0] for n in rest}}
    single = {**flat, **{n: flat[n][0] for n in (*rest, "states", "lengths")}}
    for inputs, there in ((flat, lambda x: x[:, 0]), (single, lambda x: x[0, 0])):
        got = run(inputs, backend)
        for ours, theirs in zip(everything(got), everything(want), strict=True):
            assert same_bits(ours, there(theirs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    i = make(extra="head", influence="head", receiver="both", flow_bias=True, k=4)
    strided = {
        n: x.transpose(0, -1).contiguous().transpose(0, -1) if torch.is_tensor(x) and x.ndim > 1 else x
        for n, x in i.items()
    }
    assert not strided["values"].is_contiguous()
    assert same_bits(run(strided, backend)[0], run(i, backend)[0])


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(B=0), dict(N=0), dict(c=0), dict(E=0), dict(d=0), dict(N=0, E=0)])
def test_empty(backend, empty):
    i = leaves(make(**empty, extra="head", k=4, normalize=True))
    context, drift, found = run(i, backend)
    B, H, N, c = i["values"].shape
    assert context.shape == (B, H, N, c) and found.indices.shape == (B, H, N, 4) and drift.flow.shape == (B, H, N, 2)
    context.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_to_see(backend):
    """The first entity of a causal search without itself sees nobody: 0, and finite gradients."""
    i = leaves(make(causal=True, include_self=False, normalize=True, k=4))
    context, _, found = run(i, backend)
    assert context[:, :, 0].eq(0).all() and found.indices[:, :, 0].eq(-1).all() and context[:, :, 1].ne(0).all()
    context.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in i.values() if torch.is_tensor(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    chosen = dict(extra="head", influence="head", receiver="both", flow_bias=True, alpha="head", normalize=True)
    i = make(B=1, H=2, N=4, d=2, c=2, E=2, dtype=torch.float64, **{**chosen, "k": 3})
    names = [n for n in i if torch.is_tensor(i[n])]

    def op(*tensors):
        return outputs(**{**i, **dict(zip(names, tensors, strict=True))})

    with dfn_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(op, [i[n].requires_grad_() for n in names], nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
def test_compile(backend):
    def layer(states, positions, weight, values, query_bias, extra_positions, extra_values):
        context, drift, found = flow_attention(
            states.tanh(), positions, weight, values, 0.7, 4, causal=True, query_bias=query_bias, normalize=True,
            extra_positions=extra_positions, extra_values=extra_values,
        )  # fmt: skip
        return context.square().sum() + drift.energy.sum() + found.sq_dists[:, :, :, 0].sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")  # inductor takes a minute
    names = ("states", "positions", "flow_weight", "values", "query_bias", "extra_positions", "extra_values")
    for N in (13, 29):
        i = make(N=N, receiver="bias", extra="head")
        check_compiled(layer, compiled, [i[n] for n in names], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    i = make(causal=True, k=4)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(i, backend)
    want = run({**i, "states": i["states"].bfloat16(), "values": i["values"].bfloat16()}, backend)
    assert got[0].dtype == torch.bfloat16
    for ours, theirs in zip(everything(got), everything(want), strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    chosen = dict(causal=True, extra="head", influence="head", receiver="both", k=4)
    check_same_bits(outputs, make(N=1200 if backend == "native" else 30, D=3, **chosen), backend)


BAD = {
    "states: dims": (dict(states=torch.zeros(2, 3, 23, 11)), ValueError, r"states must .* \[N, d\] or \[B, N, d\]"),
    "states: type": (dict(states=None), TypeError, "states must be a tensor, got NoneType"),
    "positions": (dict(positions=torch.zeros(2, 3, 22, 2)), ValueError, r"positions must have shape \[B, H, N, D\]"),
    "positions: shared": (dict(positions=torch.zeros(2, 22, 2)), ValueError, r"positions must have shape \[B, N, D\]"),
    "flow_weight": (dict(flow_weight=torch.zeros(3, 2, 12)), ValueError, r"flow_weight must have shape \[H, D, d\]"),
    "flow_weight: dims": (dict(flow_weight=torch.zeros(11)), ValueError, "flow_weight must have shape"),
    "values": (dict(values=torch.zeros(2, 23, 7)), ValueError, r"values must have shape \[B, H, N, c\]"),
    "sigma: zero": (dict(sigma=0.0), ValueError, "sigma must be positive and finite, got 0.0"),
    "sigma: shape": (dict(sigma=torch.ones(2)), ValueError, r"sigma must have shape \[H\] = \[3\]"),
    "k: zero": (dict(k=0), ValueError, "k must be between 1 and 1024, got 0"),
    "k: float": (dict(k=2.0), TypeError, "k must be an integer, got float"),
    "flow_bias": (dict(flow_bias=torch.zeros(2)), ValueError, r"flow_bias must have shape \[H, D\]"),
    "alpha": (dict(alpha="1"), TypeError, "alpha must be a number, got str"),
    "query_weight": (dict(query_weight=torch.zeros(2, 11)), ValueError, r"query_weight must have shape \[H, D, d\]"),
    "query_bias": (dict(query_bias=torch.zeros(3, 3)), ValueError, r"query_bias must have shape \[H, D\]"),
    "influence": (dict(influence=torch.zeros(2, 22)), ValueError, r"influence must have shape \[B, N\]"),
    "lengths": (dict(lengths=torch.zeros(3, dtype=torch.int64)), ValueError, r"lengths must have shape \[B\] = \[2\]"),
    "lengths: dtype": (dict(lengths=torch.zeros(2)), TypeError, "lengths must be int64"),
    "extra: half": (dict(extra_positions=torch.zeros(2, 5, 2)), ValueError, "extra_values must be given together"),
    "extra: other half": (dict(extra_values=torch.zeros(2, 5, 7)), ValueError, "extra_positions must be given"),
    "extra: E": (dict(extra_positions=torch.zeros(2, 5, 2), extra_values=torch.zeros(2, 6, 7)), ValueError,
                 r"extra_values must have shape \[B, E, c\] = \[2, 5, 7\]"),
    "extra: influence": (dict(extra_influence=torch.zeros(2, 5)), ValueError, "extra_influence must be None without"),
    "warm: type": (dict(warm=torch.zeros(2)), TypeError, "warm must be Neighbors, got Tensor"),
    "warm: shape": (dict(warm=(torch.zeros(2, 3, 23, 5, dtype=torch.int64), None)), ValueError, "warm.indices must"),
    "device": (dict(influence=torch.zeros(2, 23, device="meta")), ValueError, "influence must be on cpu like states"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match="^flow_attention: .*" + message):
        flow_attention(**{**make(), **changes})
