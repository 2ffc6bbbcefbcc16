"""What the op takes (strides, no elements, padding, what is not a number, extremes) and what it refuses."""

import pytest
import torch
from helpers import DEVICE, backends, check_against_reference, same_bits, value_and_grads
from test_gaussian_gather import make

import dfn_kernels
from dfn_kernels import gaussian_gather

BACKENDS = backends("gaussian_gather")


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dims(backend):
    """[N, ..] and [B, N, ..] give what [B, H, N, ..] gives."""
    full = make(B=1, H=1, sigma="float")
    with dfn_kernels.use_backend(backend):
        want = gaussian_gather(**full)
        for squeeze in (lambda x: x[:, 0], lambda x: x[0, 0]):
            got = gaussian_gather(**{n: squeeze(x) if isinstance(x, torch.Tensor) else x for n, x in full.items()})
            assert same_bits(got, squeeze(want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    inputs = make()
    strided = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(x, torch.Tensor) and x.ndim > 1 else x
        for name, x in inputs.items()
    }
    interleaved = {**inputs, "values": inputs["values"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert not strided["values"].is_contiguous() and not interleaved["values"].is_contiguous()
    with dfn_kernels.use_backend(backend):
        want = gaussian_gather(**inputs)
        assert same_bits(gaussian_gather(**strided), want)
        assert same_bits(gaussian_gather(**interleaved), want)
    check_against_reference(gaussian_gather, strided, backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(B=0), dict(M=0), dict(k=0), dict(c=0), dict(N=0), dict(N=0, M=0)])
def test_empty(backend, empty):
    inputs = make(**{**dict(N=3, M=4), **empty})
    if empty.get("N") == 0:
        inputs["indices"].fill_(-1)
    inputs["values"].requires_grad_()
    inputs["positions"].requires_grad_()
    with dfn_kernels.use_backend(backend):
        for normalize in (False, True):
            out = gaussian_gather(**inputs, normalize=normalize)
            assert out.shape == (*inputs["indices"].shape[:3], inputs["values"].shape[3])
            assert out.eq(0).all()
            out.sum().backward()
    assert inputs["values"].grad.eq(0).all() and inputs["positions"].grad.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("normalize", [False, True])
def test_padding_is_nobody(backend, normalize):
    """A query without neighbours gets 0; entity 0, whom nobody lists, may hold NaN without anybody noticing."""
    inputs = make(influence=None)
    inputs["indices"] = torch.where(inputs["indices"] == 0, -1, inputs["indices"])
    inputs["indices"][:, :, 3] = -1
    for name in ("values", "positions"):
        inputs[name][:, :, 0] = float("nan")
        inputs[name].requires_grad_()
    with dfn_kernels.use_backend(backend):
        out = gaussian_gather(**inputs, normalize=normalize)
        out.square().sum().backward()
    assert out.isfinite().all() and out[:, :, 3].eq(0).all() and out[:, :, 4].ne(0).any()
    for name in ("values", "positions"):
        assert inputs[name].grad.isfinite().all() and inputs[name].grad[:, :, 0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_a_number_stays_with_its_neighbors(backend, normalize):
    """A query that stands nowhere spoils its own output and the gradients of those it lists, and nobody else's."""
    inputs = make(B=1, H=1, N=29, M=11, k=3, c=16)
    inputs["indices"][0, 0, 4] = torch.tensor([7, 28, -1], device=DEVICE)
    inputs["query_positions"][0, 0, 4] = float("nan")
    names = ("positions", "values", "influence")
    for name in names:
        inputs[name].requires_grad_()
    with dfn_kernels.use_backend(backend):
        out = gaussian_gather(**inputs, normalize=normalize)
        out.sum().backward()
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [4]
    for name in names:
        grad = inputs[name].grad.view(29, -1)
        assert grad.isnan().any(-1).nonzero().flatten().tolist() == [7, 28], name


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_extreme_weights(backend):
    positions = torch.tensor([[0.0], [1.0], [3.0], [3.0]], device=DEVICE)
    values = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], device=DEVICE)
    indices = torch.tensor([[1, 2], [0, 2], [2, 3], [0, 1]], device=DEVICE)
    with dfn_kernels.use_backend(backend):
        # tiny sigma: normalised weights pick the nearest, ties share; plain ones vanish unless the distance is 0
        near = gaussian_gather(positions, values, indices, 1e-3, normalize=True).flatten().tolist()
        assert near == [10.0, 1.0, 550.0, 10.0]
        assert gaussian_gather(positions, values, indices, 1e-3).flatten().tolist() == [0, 0, 1100, 0]
        # huge sigma: a plain sum, a plain mean
        assert gaussian_gather(positions, values, indices, 1e10).flatten().tolist() == [110, 101, 1100, 11]
        assert gaussian_gather(positions, values, indices, 1e10, normalize=True).flatten().tolist() == [
            55,
            50.5,
            550,
            5.5,
        ]
        # influence: zero and negative; weights that sum to zero give 0
        w = torch.tensor([[1.0, 0.0, 1.0, -1.0]], device=DEVICE)
        one = dict(positions=positions[None], values=values[None], indices=indices[None], sigma=1e10, influence=w)
        assert gaussian_gather(**one).flatten().tolist() == [100, 101, -900, 1]
        assert gaussian_gather(**one, normalize=True).flatten().tolist() == [100, 50.5, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("far", [3e38, float("inf")])
@pytest.mark.parametrize("D", [1, 2, 3, 5])
def test_one_too_far_is_nobodys_neighbor(backend, D, far, normalize):
    """A distance that overflows: by weight and by gradient, which an infinite step must not make NaN."""
    inputs = {**make(B=1, H=1, D=D), "normalize": normalize}
    inputs["indices"][0, 0, :8, 1] = 3
    inputs["positions"][0, 0, 3, -1] = far
    inputs["query_positions"][0, 0, 4:8, -1] = -far
    grad = torch.randn(1, 1, 11, 37, device=DEVICE)
    got, want = (value_and_grads(gaussian_gather, inputs, grad, name) for name in (backend, "reference"))
    for name, x in want.items():
        assert x.isfinite().all() and x.ne(0).any(), name
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# In Triton it may give NaN: there the last edge is read again, times zeros, and what would prevent that spills.
@pytest.mark.parametrize("backend", [*({*BACKENDS} - {"triton"}), "reference"])
@pytest.mark.parametrize("c", [5, 16])
@pytest.mark.parametrize("k", [1, 3, 5, 11])
def test_infinite_influence(backend, k, c):
    """Infinite times what is there, whatever the number of edges that a kernel walks at once."""
    inputs = make(B=1, H=1, k=k, c=c)
    inputs["indices"].clamp_(max=15)[..., -1] = 16
    inputs["values"] = inputs["values"].abs() + 1
    inputs["influence"][..., 16] = float("inf")
    with dfn_kernels.use_backend(backend):
        assert gaussian_gather(**inputs).isposinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_overflow_is_infinite(backend):
    values = torch.full((3, 5), 6e4, dtype=torch.float16, device=DEVICE)
    out = gaussian_gather(
        torch.zeros(3, 1, device=DEVICE), values, torch.tensor([[0, 1], [1, -1], [2, 0]], device=DEVICE), 1.0
    )
    assert out[0].isinf().all() and out[1].eq(6e4).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU counts a bad index as padding")
@pytest.mark.parametrize("bad", [17, 2**40, -2, -(2**62)])
def test_bad_index(bad):
    inputs = make()
    inputs["indices"][1, 2, 3, 4] = bad
    if "native" in BACKENDS:
        with pytest.raises(IndexError, match="indices must be -1 or between 0 and 16"):
            gaussian_gather(**inputs)


def _change(**changes):
    return lambda inputs: {**inputs, **changes}


# ruff: noqa: E501
BAD = {
    "positions: not a tensor": (_change(positions=[[0.0]]), TypeError, "positions must be a tensor, got list"),
    "positions: integers": (_change(positions=torch.zeros(2, 3, 17, 2, dtype=torch.int64)), TypeError, "positions must be float"),
    "positions: shape": (_change(positions=torch.zeros(2, 3, 16, 2)), ValueError, r"values must have shape \[B, H, N, c\]"),
    "positions: dims": (_change(positions=torch.zeros(2, 17, 2)), ValueError, "positions must have shape"),
    "values: dims": (_change(values=torch.zeros(5)), ValueError, r"values must have shape .* got \[5\]"),
    "values: dtype": (_change(values=torch.zeros(2, 3, 17, 37, dtype=torch.complex64)), TypeError, "values must be float"),
    "indices: dtype": (_change(indices=torch.zeros(2, 3, 11, 5, dtype=torch.int32)), TypeError, "indices must be int64, got torch.int32"),
    "indices: shape": (_change(indices=torch.zeros(2, 2, 11, 5, dtype=torch.int64)), ValueError, "indices must have shape"),
    "indices: rows": (_change(query_positions=None), ValueError, "one row per position"),
    "query_positions: D": (_change(query_positions=torch.zeros(2, 3, 11, 3)), ValueError, "query_positions must have shape"),
    "influence: shape": (_change(influence=torch.zeros(2, 16)), ValueError, "influence must have shape"),
    "influence: dtype": (_change(influence=torch.zeros(2, 17, dtype=torch.bool)), TypeError, "influence must be float"),
    "sigma: zero": (_change(sigma=0.0), ValueError, "sigma must be positive and finite, got 0.0"),
    "sigma: NaN": (_change(sigma=float("nan")), ValueError, "sigma must be positive"),
    "sigma: text": (_change(sigma="1"), TypeError, "sigma must be a number, got str"),
    "sigma: shape": (_change(sigma=torch.ones(2)), ValueError, r"sigma must have shape \[H\] = \[3\], got \[2\]"),
    "device": (_change(influence=torch.zeros(2, 17, device="meta")), ValueError, "influence must be on cpu"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match="^gaussian_gather: .*" + message):
        gaussian_gather(**change(make()))
