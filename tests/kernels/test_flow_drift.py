import itertools

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_accurate,
    backends,
    check_against_reference,
    check_compiled,
    check_same_bits,
    check_second_derivative_raises,
    distance,
    leaves,
    same_bits,
)

import dfn_kernels
from dfn_kernels import Drift, FlowDriftFunction, flow_drift
from dfn_kernels.flow_drift import _wide_backward as wide_backward
from dfn_kernels.reference.flow_drift import flow_drift as reference

BACKENDS = backends("flow_drift")


def make(B=2, H=3, N=17, D=2, d=37, *, dtype=torch.float32, bias=True, alpha="head", shared=False):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "states": torch.randn(B, N, d, device=DEVICE).to(dtype),
        "positions": torch.randn(*((B, N, D) if shared else (B, H, N, D)), dtype=real, device=DEVICE),
        "weight": torch.randn(H, D, d, dtype=real, device=DEVICE),
        "alpha": {"head": torch.randn(H, dtype=real, device=DEVICE),
                  "one": torch.tensor(0.8, dtype=real, device=DEVICE), "float": 0.1}[alpha],
    }  # fmt: skip
    if bias:
        inputs["bias"] = torch.randn(H, D, dtype=real, device=DEVICE)
    return inputs


def outputs(**inputs):
    """All three outputs in one tensor."""
    return torch.cat([x.flatten() for x in flow_drift(**inputs)])


def check(inputs, backend):
    check_against_reference(outputs, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(backend, dtype):
    for bias, alpha, shared in [(1, "head", 0), (0, "one", 1), (1, "float", 1), (0, "head", 0)]:
        check(make(dtype=dtype, bias=bias, alpha=alpha, shared=shared), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(B=1, H=1, N=1, D=1, d=1),
        dict(B=3, H=1, N=5, D=3, d=64),
        dict(B=1, H=4, N=131, D=3, d=16),
        dict(B=2, H=5, N=7, D=7, d=129),
        dict(B=1, H=2, N=601, D=3, d=67),
        dict(B=2, H=1, N=5, D=31, d=61),
        dict(B=2, H=1, N=53, D=2, d=300),
        dict(B=1, H=1, N=19, D=3, d=1031),
        dict(B=2, H=2, N=5, D=23, d=53),  # beyond WIDE
    ],
)
def test_sizes(backend, sizes):
    for dtype in (torch.float32, torch.bfloat16):
        check(make(**sizes, dtype=dtype), backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="chunks are Triton's")
def test_chunks_of_several_blocks(monkeypatch):
    """As of a hundred thousand entities: a chunk's last block reaches into the next chunk, the last chunk beyond N."""
    from dfn_kernels.triton import flow_drift as op

    monkeypatch.setattr(op, "chunk_of", lambda B, N, block, chunks: 7 * max(block, 14))
    for H, dtype in itertools.product((1, 2), (torch.float32, torch.bfloat16)):
        check(make(B=2, H=H, N=230, D=3, d=37, dtype=dtype), "triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="there are no tensor cores, and the interpreter multiplies in float32")
@pytest.mark.parametrize("H, D", [(1, 3), (1, 7), (4, 3), (4, 7)])
def test_error_is_that_of_plain_float32(H, D):
    """Three products of tensor-core precision: one alone is 1,000 times as far from the exact result."""
    inputs = make(B=2, H=H, N=2053, D=D, d=256)
    plain = reference(**inputs)[1]
    exact = reference(**{n: x.double() for n, x in inputs.items()})[1]
    with dfn_kernels.use_backend("triton"):
        assert_accurate(flow_drift(**inputs).flow, exact, distance(plain, exact), "flow")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_heads_and_leading_dims(backend):
    """[N, ..], [A, B, N, ..] and one head give what [B, H, N, ..] gives."""
    i = make(B=2, H=1, alpha="float")
    states, positions, weight, bias = i["states"], i["positions"], i["weight"], i["bias"]
    with dfn_kernels.use_backend(backend):
        want = flow_drift(states, positions, weight, bias)
        for got, there in [
            (flow_drift(states, positions[:, 0], weight[0], bias[0]), lambda x: x[:, 0]),
            (flow_drift(states[0], positions[0, 0], weight[0], bias[0]), lambda x: x[0, 0]),
            (flow_drift(states[0], positions[0], weight, bias), lambda x: x[0]),
            (flow_drift(states[:, None], positions[:, None], weight, bias), lambda x: x[:, None]),
            (flow_drift(states, positions[:, 0], weight, bias, alpha=torch.tensor([0.1], device=DEVICE)), lambda x: x),
        ]:
            assert isinstance(got, Drift)
            for ours, theirs in zip(got, want, strict=True):
                assert same_bits(ours, there(theirs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    wide = [dict(B=1, H=2, N=2, D=33, d=2)] if backend == "native" else []
    for sizes in (dict(B=2, H=2, N=3, D=2, d=2), *wide):
        inputs = make(**sizes, dtype=torch.float64)
        names = list(inputs)

        def op(*values, names=names):
            return flow_drift(**dict(zip(names, values, strict=True)))

        with dfn_kernels.use_backend(backend):
            assert torch.autograd.gradcheck(op, [inputs[n].requires_grad_() for n in names], nondet_tol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_at_a_time(backend):
    """The gradient of each output alone: the others' are zero then."""
    inputs = make(dtype=torch.float64)
    for name in Drift._fields:
        found = []
        for which in (backend, "reference"):
            copies = leaves(inputs)
            with dfn_kernels.use_backend(which):
                getattr(flow_drift(**copies), name).square().sum().backward()
            found.append({n: x.grad for n, x in copies.items()})
        for n in inputs:
            theirs = found[1][n]
            torch.testing.assert_close(found[0][n], torch.zeros_like(inputs[n]) if theirs is None else theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    inputs = make()
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x for n, x in inputs.items()}
    sliced = {**inputs, "states": torch.cat([inputs["states"]] * 2, -1)[:, :, :37]}
    assert not strided["states"].is_contiguous() and not sliced["states"].is_contiguous()
    with dfn_kernels.use_backend(backend):
        want = flow_drift(**inputs)
        for other in (strided, sliced):
            assert all(same_bits(a, b) for a, b in zip(flow_drift(**other), want, strict=True))
    check(strided, backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(B=0), dict(N=0), dict(d=0), dict(D=0)])
def test_empty(backend, empty):
    inputs = leaves(make(**empty))
    with dfn_kernels.use_backend(backend):
        out = flow_drift(**inputs)
    B, H, N, D = inputs["positions"].shape
    assert out.positions.shape == out.flow.shape == (B, H, N, D) and out.energy.shape == (B, H, N)
    if "d" in empty:
        assert out.flow.equal(inputs["bias"].view(1, H, 1, D).expand(B, H, N, D))
    sum(x.sum() for x in out).backward()
    for name in ("states", "weight"):
        assert inputs[name].grad.eq(0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_entities_leave_earlier_bits(backend):
    inputs = make(N=23)
    changed = {**inputs, "states": inputs["states"].clone(), "positions": inputs["positions"].clone()}
    changed["states"][:, 11:] = float("nan")
    changed["positions"][:, :, 11:] = 1e30
    with dfn_kernels.use_backend(backend):
        for want, got in zip(flow_drift(**inputs), flow_drift(**changed), strict=True):
            assert same_bits(want[:, :, :11], got[:, :, :11]) and not torch.equal(want, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    check_same_bits(outputs, make(B=3, N=1031 if backend == "native" else 131), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_and_second_derivative(backend):
    i = leaves(make(H=1, dtype=torch.float64))
    out = FlowDriftFunction.apply(i["states"], i["positions"], i["weight"], i["bias"], i["alpha"], backend)
    with dfn_kernels.use_backend(backend):
        assert all(same_bits(a, b) for a, b in zip(out, flow_drift(**i), strict=True))
    check_second_derivative_raises(lambda **i: flow_drift(**i).energy, i, "states", "states", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for dtype, D in itertools.product((torch.float32, torch.float64), (2, 23)):
        i = make(dtype=dtype, D=D)
        arguments = [i[n].requires_grad_() for n in ("states", "positions", "weight", "bias", "alpha")]
        torch.library.opcheck(torch.ops.dfn.flow_drift, (*arguments, backend))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
def test_compile(backend):
    def layer(x, positions, weight, alpha):
        moved, flow, energy = flow_drift(x.tanh(), positions, weight, alpha=alpha)
        return moved.square().sum() + energy.sin().sum() + flow.sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for N in (13, 29):
        i = make(N=N, bias=False)
        check_compiled(layer, compiled, [i[n] for n in ("states", "positions", "weight", "alpha")], backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("D", [2, 23])  # 23: beyond WIDE
@pytest.mark.parametrize("bias", [True, False])
def test_autocast(backend, D, bias):
    inputs = make(D=D, bias=bias)
    with dfn_kernels.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        out = flow_drift(**inputs)
    assert all(x.dtype == torch.float32 for x in out)
    with dfn_kernels.use_backend(backend):
        want = flow_drift(**{**inputs, "states": inputs["states"].bfloat16()})
    assert all(same_bits(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [2, 23])  # 23: beyond WIDE
def test_backward_inside_autocast(backend, D):
    inputs = make(D=D, dtype=torch.bfloat16)
    found = []
    for enabled in (True, False):
        copies = leaves(inputs)
        with dfn_kernels.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            sum(x.square().sum() for x in flow_drift(**copies)).backward()
        found.append([x.grad for x in copies.values()])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow  # gigabytes, of which a few pages are ever touched
@pytest.mark.skipif(not INTERPRETED or DEVICE != "cpu", reason="wants memory that is not there until it is used")
def test_heads_far_apart_in_triton(monkeypatch):
    """The last of 32 heads lies beyond 2^31 elements; the first block of entities in each kernel."""
    from dfn_kernels.triton import flow_drift as op

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    H, N, n, d, real = 32, 70_000_000, 64, 5, torch.float32
    states, weight, alpha = torch.randn(n, d), torch.randn(H, 1, d), torch.randn(H)
    positions, flow, energy = (torch.empty(H, N) for _ in range(3))
    start = torch.randn(H, n)
    positions[:, :n] = start
    op.forward_kernel[(1,)](
        states, positions, weight, alpha, alpha, positions, flow, energy, H, N, 1, d, 0, d,
        HAS_BIAS=False, **op.forward_tile(H, real, real),
    )  # fmt: skip
    want = reference(states[None], start.view(1, H, n, 1), weight, None, alpha)
    for ours, theirs in zip((positions, flow, energy), want, strict=True):
        torch.testing.assert_close(ours[:, :n], theirs.view(H, n))

    grad_states, sums = torch.empty(n, d), torch.empty(H * (d + 2))
    op.backward_kernel[(1,)](
        positions, positions, energy, states, weight, alpha, flow, grad_states, sums,
        H, N, 1, d, 0, d, n, 1, 1, len(sums), **op.backward_tile(H, d, real, real),
    )  # fmt: skip
    grads = wide_backward(*(want[at].clone() for at in (0, 0, 2)), states[None], weight, alpha, want[1])
    for ours, theirs in ((grad_states, grads[0][0]), (sums, torch.cat([x.flatten() for x in grads[1:]]))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)  # sums of both signs, of terms up to 1,000


def test_dtypes():
    half = torch.float16
    single, double = torch.float32, torch.float64
    for states, positions, want in [(half, half, single), (half, double, double), (double, half, double)]:
        out = flow_drift(torch.ones(3, 5, dtype=states), torch.ones(3, 2, dtype=positions), torch.ones(2, 5))
        assert all(x.dtype == want for x in out)


def _change(**changes):
    return lambda inputs: {**inputs, **changes}


BAD = {
    "states: not a tensor": (_change(states=[1.0]), TypeError, "states must be a tensor, got list"),
    "states: dims": (_change(states=torch.zeros(37)), ValueError, r"states must have shape .* got \[37\]"),
    "states: integers": (_change(states=torch.zeros(2, 17, 37, dtype=torch.int64)), TypeError, "states must be float"),
    "positions: shape": (_change(positions=torch.zeros(2, 3, 16, 2)), ValueError, r"positions must .* \[.., H, N, D\]"),
    "positions: heads": (_change(positions=torch.zeros(2, 4, 17, 2)), ValueError, "positions must have shape"),
    "positions: shared": (_change(positions=torch.zeros(2, 16, 2)), ValueError, r"positions must .* \[.., N, D\]"),
    "weight: dims": (_change(weight=torch.zeros(37)), ValueError, r"weight must have shape .* got \[37\]"),
    "weight: d": (_change(weight=torch.zeros(3, 2, 36)), ValueError, r"weight must .* = \[3, 2, 37\]"),
    "weight: dtype": (_change(weight=torch.zeros(3, 2, 37, dtype=torch.int8)), TypeError, "weight must be float"),
    "weight: no heads": (_change(weight=torch.zeros(2, 37)), ValueError, r"positions must .* \[.., N, D\]"),
    "bias: shape": (_change(bias=torch.zeros(2)), ValueError, r"bias must have shape \[H, D\] = \[3, 2\], got \[2\]"),
    "bias: type": (_change(bias=0.5), TypeError, "bias must be a tensor, got float"),
    "alpha: text": (_change(alpha="1"), TypeError, "alpha must be a number, got str"),
    "alpha: shape": (_change(alpha=torch.ones(2)), ValueError, r"alpha must have shape \[H\] = \[3\], got \[2\]"),
    "alpha: integers": (_change(alpha=torch.ones(3, dtype=torch.int64)), TypeError, "alpha must be float"),
    "device": (_change(bias=torch.zeros(3, 2, device="meta")), ValueError, "bias must be on cpu like states, got meta"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match="^flow_drift: .*" + message):
        flow_drift(**change(make()))
