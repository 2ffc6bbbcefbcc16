import itertools

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    backends,
    check_against_reference,
    check_compiled,
    check_same_bits,
    check_second_derivative_raises,
    leaves,
    same_bits,
)

import dfn_kernels
from dfn_kernels import FlowNormFunction, flow_norm
from dfn_kernels.flow_norm import MODES

BACKENDS = backends("flow_norm")


def make(B=3, N=17, d=37, *, dtype=torch.float32, lengths=False, **options):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "states": torch.randn(B, N, d, device=DEVICE).to(dtype),
        "energy": torch.rand(B, N, dtype=real, device=DEVICE) + 0.1,
    }
    if lengths:  # empty, full and partly filled
        inputs["lengths"] = torch.tensor([N // 2 + 1, 0, N] * (B + 1), device=DEVICE)[:B]
    return {**inputs, **options}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(backend, dtype):
    for mode, lengths in itertools.product(MODES, (False, True)):
        check_against_reference(flow_norm, make(dtype=dtype, mode=mode, lengths=lengths), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 131, 64), (5, 7, 301), (1, 300, 3)])
def test_sizes(backend, sizes):
    for mode, dtype in itertools.product(MODES, (torch.float32, torch.bfloat16)):
        check_against_reference(flow_norm, make(*sizes, dtype=dtype, mode=mode, eps=0.5), backend)


def test_formula():
    s, e = torch.ones(3, 2, device=DEVICE), torch.tensor([4.0, 12.0, 32.0], device=DEVICE)
    for mode, want in (("mean", [4, 4, 4]), ("causal", [2, 8**0.5, 4]), ("entity", [2, 12**0.5, 32**0.5])):
        torch.testing.assert_close(1 / flow_norm(s, e, 0.0, mode)[:, 1], torch.tensor(want, device=DEVICE).float())
    short = flow_norm(s, e, 0.0, "mean", torch.tensor(2, device=DEVICE))
    assert short[2].eq(0).all()
    torch.testing.assert_close(1 / short[0, 0], torch.tensor(8**0.5, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    for mode, lengths in itertools.product(MODES, (False, True)):
        i = make(B=2, N=3, d=2, dtype=torch.float64, lengths=lengths)
        with dfn_kernels.use_backend(backend):
            assert torch.autograd.gradcheck(
                lambda s, e, i=i, mode=mode: flow_norm(s, e, 0.3, mode, i.get("lengths")),
                [i["states"].requires_grad_(), i["energy"].requires_grad_()],
                nondet_tol=0.0,
            )


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("mode", MODES)
def test_padding_is_left_out(backend, mode):
    i = make(lengths=True, mode=mode)
    pad = torch.arange(17, device=DEVICE) >= i["lengths"].unsqueeze(1)
    clean = flow_norm(**i)
    i["states"][pad] = float("nan")
    i["energy"][pad] = float("inf")
    i = leaves(i)
    with dfn_kernels.use_backend(backend):
        out = flow_norm(**i)
    out.square().sum().backward()
    assert out[pad].eq(0).all()
    torch.testing.assert_close(out, clean)
    for name in ("states", "energy"):
        assert i[name].grad[pad].eq(0).all() and i[name].grad.isfinite().all() and i[name].grad.ne(0).any()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_causal_to_the_bit(backend):
    i = make(N=531, d=5, mode="causal")
    for cut in (1, 64, 129, 530):
        other = {**i, "states": i["states"].clone(), "energy": i["energy"].clone()}
        other["states"][:, cut:] = float("nan")
        other["energy"][:, cut:] *= 1e20
        with dfn_kernels.use_backend(backend):
            assert same_bits(flow_norm(**i)[:, :cut], flow_norm(**other)[:, :cut])


@pytest.mark.skipif("triton" not in BACKENDS, reason="blocks are Triton's")
@pytest.mark.parametrize("direct", [True, False])
def test_many_blocks(direct, monkeypatch):
    """Several blocks to a sequence, which read all energies or sums of blocks, and several tiles to a program."""
    from dfn_kernels.triton import flow_norm as op

    N = 9_001 if direct else 40_001
    if DEVICE == "cpu":  # the interpreter takes a millisecond for what a GPU does in a nanosecond
        N = 171
        monkeypatch.setattr(op, "BLOCK", 64)
        monkeypatch.setattr(op, "DIRECT", N if direct else N - 1)
        monkeypatch.setattr(op, "chunk_of", lambda N, tile: 2 * tile)
    for mode in MODES:
        check_against_reference(flow_norm, make(3, N, 5, mode=mode, lengths=mode != "causal"), "triton")
    i = make(1, N, 5, mode="causal")
    with dfn_kernels.use_backend("triton"):
        want = flow_norm(**i)
        for cut in (63, 64, 129):
            energy = i["energy"].clone()
            energy[:, cut:] = float("nan")
            assert same_bits(flow_norm(**{**i, "energy": energy})[:, :cut], want[:, :cut])
        means = flow_norm(torch.ones_like(i["states"]), i["energy"])
        assert same_bits(means, means[:, :1].expand_as(means))


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_long_running_mean_stays_exact(backend):
    """One large energy, then many small ones, which a float32 sum would forget."""
    N = 20_000 if backend != "triton" else 2_000
    energy = torch.full((1, N), 0.125, device=DEVICE)
    energy[0, 0] = 2.0**22
    with dfn_kernels.use_backend(backend):
        out = flow_norm(torch.ones(1, N, 1, device=DEVICE), energy, 0.0, "causal")
    want = ((2.0**22 + 0.125 * (N - 1)) / N) ** -0.5
    assert abs(out[0, -1, 0].item() / want - 1) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dims_and_strides(backend):
    i = make(B=6, lengths=True)
    with dfn_kernels.use_backend(backend):
        for mode in MODES:
            want = flow_norm(**i, mode=mode)
            cube = {n: x.view(2, 3, *x.shape[1:]) for n, x in i.items()}
            assert same_bits(flow_norm(**cube, mode=mode), want.view(2, 3, 17, 37))
            for b in range(6):
                assert same_bits(flow_norm(**{n: x[b] for n, x in i.items()}, mode=mode), want[b])
            strided = {n: x.t().contiguous().t() if x.ndim == 2 else x for n, x in i.items()}
            strided["states"] = i["states"].transpose(0, 2).contiguous().transpose(0, 2)
            assert same_bits(flow_norm(**strided, mode=mode), want)
            sliced = {**i, "states": torch.cat([i["states"]] * 2, -1)[:, :, :37]}
            assert same_bits(flow_norm(**sliced, mode=mode), want)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(B=0), dict(N=0), dict(d=0)])
def test_empty(backend, empty):
    for mode, lengths in itertools.product(MODES, (False, True)):
        i = leaves(make(**empty, mode=mode, lengths=lengths))
        with dfn_kernels.use_backend(backend):
            out = flow_norm(**i)
        assert out.shape == i["states"].shape
        out.sum().backward()
        assert i["energy"].grad.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    for mode in MODES:
        i = make(N=1031 if backend == "native" else 31, mode=mode, lengths=True)
        check_same_bits(flow_norm, i, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_and_second_derivative(backend):
    i = leaves(make(dtype=torch.float64, lengths=True))
    s, e = i["states"], i["energy"]
    with dfn_kernels.use_backend(backend):
        assert same_bits(FlowNormFunction.apply(s, e, i["lengths"], 0.5, "causal", backend),
                         flow_norm(s, e, 0.5, "causal", i["lengths"]))  # fmt: skip
    check_second_derivative_raises(flow_norm, i, "energy", "states", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for mode, lengths in itertools.product(MODES, (False, True)):
        i = make(dtype=torch.float64 if lengths else torch.float32, lengths=lengths)
        arguments = (i["states"].requires_grad_(), i["energy"].requires_grad_(), i.get("lengths"), 0.5, mode, backend)
        torch.library.opcheck(torch.ops.dfn.flow_norm, arguments)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_compile(backend, mode):
    def layer(s, e, lengths):
        return flow_norm(s.tanh(), e * e, 1.0, mode, lengths).sin()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for N in (13, 29):
        i = make(N=N, lengths=True)
        check_compiled(layer, compiled, [i[n] for n in ("states", "energy", "lengths")], backend)


def test_dtypes():
    for states, energy, autocast in itertools.product(DTYPES, DTYPES, (False, True)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = flow_norm(torch.ones(3, 5, dtype=states, device=DEVICE), torch.ones(3, dtype=energy, device=DEVICE))
        assert out.dtype == states


BAD = {
    "states: not a tensor": (dict(states=1.0), TypeError, "states must be a tensor, got float"),
    "states: dims": (dict(states=torch.zeros(3)), ValueError, r"states must have shape \[.., N, d\], got \[3\]"),
    "states: integers": (dict(states=torch.zeros(3, 17, 37, dtype=torch.int64)), TypeError, "states must be float"),
    "energy: heads": (dict(energy=torch.zeros(3, 4, 17)), ValueError, r"energy must .* = \[3, 17\], got \[3, 4, 17\]"),
    "energy: bool": (dict(energy=torch.zeros(3, 17, dtype=torch.bool)), TypeError, "energy must be float"),
    "eps: negative": (dict(eps=-1e-6), ValueError, "eps must be finite and not negative, got -1e-06"),
    "eps: NaN": (dict(eps=float("nan")), ValueError, "eps must be finite"),
    "eps: text": (dict(eps="1"), TypeError, "eps must be a number, got str"),
    "mode": (dict(mode="max"), ValueError, "mode must be one of mean, causal, entity, got 'max'"),
    "lengths: dtype": (dict(lengths=torch.ones(3)), TypeError, "lengths must be int64, got torch.float32"),
    "lengths: shape": (dict(lengths=torch.arange(2)), ValueError, r"lengths must .* = \[3\], got \[2\]"),
    "lengths: list": (dict(lengths=[1, 2, 3]), TypeError, "lengths must be a tensor, got list"),
    "device": (dict(energy=torch.zeros(3, 17, device="meta")), ValueError, "energy must be on cpu like states"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match="^flow_norm: .*" + message):
        flow_norm(**{**make(), **changes})
