import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    backends,
    check_against_reference,
    check_compiled,
    check_on_instruction_set,
    check_same_bits,
    check_second_derivative_raises,
    leaves,
    same_bits,
)

import dfn_kernels
from dfn_kernels import ShortConvolutionFunction, short_convolution
from dfn_kernels.packed import place_in_set

BACKENDS = backends("short_convolution")


def make(B=3, N=17, d=37, W=4, *, dtype=torch.float32, ptr=None):
    inputs = {
        "x": torch.randn(B, N, d, device=DEVICE).to(dtype),
        "weight": torch.randn(W, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE),
    }
    if ptr is not None:
        inputs["ptr"] = torch.tensor(ptr, device=DEVICE)
    return inputs


PACKED = [0, 1, 1, 6, 9, 17]  # of one, none, and more and fewer than W entities


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ptr", [None, PACKED])
def test_matches_reference(backend, dtype, ptr):
    check_against_reference(short_convolution, make(dtype=dtype, ptr=ptr), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 131, 64, 3), (5, 7, 301, 2), (1, 300, 3, 5), (2, 5, 67, 11),
                                   (97, 1, 3, 2), (3, 71, 5, 37)])  # fmt: skip
def test_sizes(backend, sizes):
    """More entities than a chunk or a tile has, fewer than W, channels that fill no register; short rows; a long W."""
    for dtype in (torch.float32, torch.bfloat16):
        check_against_reference(short_convolution, make(*sizes, dtype=dtype), backend)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.skipif("native" not in BACKENDS or DEVICE != "cpu", reason="about CPU kernels")
def test_instruction_sets(isa):
    code = "from test_short_convolution import *; test_matches_reference('native', torch.bfloat16, PACKED);"
    check_on_instruction_set(isa, code + "test_matches_reference('native', torch.float32, None);")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_formula(backend):
    x = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], device=DEVICE)
    c = torch.tensor([[1.0], [0.5], [0.25]], device=DEVICE)
    with dfn_kernels.use_backend(backend):
        assert short_convolution(x, c).flatten().tolist() == [1, 10.5, 105.25, 1052.5]
        packed = short_convolution(x, c, ptr=torch.tensor([0, 2, 4], device=DEVICE))
    assert packed.flatten().tolist() == [1, 10.5, 100, 1050]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ptr", [None, [0, 2, 5]])
def test_gradcheck(backend, ptr):
    i = leaves(make(B=2, N=5, d=2, W=3, dtype=torch.float64, ptr=ptr))
    with dfn_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(lambda x, c: short_convolution(x, c, ptr=i.get("ptr")), [i["x"], i["weight"]],
                                        nondet_tol=0.0)  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_causal_to_the_bit(backend):
    i = make(N=201, d=5)
    with dfn_kernels.use_backend(backend):
        whole = short_convolution(**i)
        for cut in (1, 3, 64, 129, 200):
            x = i["x"].clone()
            x[:, cut:] = float("nan")
            assert same_bits(short_convolution(x, i["weight"])[:, :cut], whole[:, :cut])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_packed_sequences_are_alone(backend):
    """Each comes out as it would alone, and what is not a number in one stays there, backward, too."""
    i = leaves(make(ptr=PACKED))
    with dfn_kernels.use_backend(backend):
        out = short_convolution(**i)
        for a, e in zip(PACKED, PACKED[1:], strict=False):
            assert same_bits(out[:, a:e], short_convolution(i["x"][:, a:e], i["weight"]))
        poisoned = i["x"].detach().clone()
        poisoned[:, 1:6] = float("nan")
        poisoned.requires_grad_()
        other = short_convolution(poisoned, i["weight"], ptr=i["ptr"])
        keep = [0, *range(6, 17)]
        assert same_bits(other[:, keep], out[:, keep]) and other[:, 1:6].isnan().all()
        grad = torch.ones_like(out)
        grad[:, 6:9] = float("nan")
        (found,) = torch.autograd.grad(out, i["x"], grad)
    assert found[:, 6:9].isnan().all() and found[:, :6].isfinite().all() and found[:, 9:].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("ptr", [[0, 5], [0, 2, 5]])
def test_nothing_lies_before_a_sequence(backend, ptr):
    """So no weight meets it, be that infinite, and no gradient, be that not a number."""
    i = make(B=2, N=5, d=3, W=3, ptr=ptr if len(ptr) > 2 else None)
    i["weight"][2] = float("inf")
    i = leaves(i)
    places = [n - max(p for p in ptr if p <= n) for n in range(5)]  # and how many come behind
    behind = [min(p for p in ptr if p > n) - 1 - n for n in range(5)]
    with dfn_kernels.use_backend(backend):
        out = short_convolution(**i)
        grad = torch.ones_like(out)
        grad[:, 0] = float("nan")
        of_x, of_weight = torch.autograd.grad(out, [i["x"], i["weight"]], grad)
    for n in range(5):
        assert out[:, n].isfinite().all() == (places[n] < 2)
        assert of_x[:, n].isfinite().all() == (behind[n] < 2 and n > 0)
    assert of_weight[0].isnan().all() and of_weight[1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dims_and_strides(backend):
    i = make(B=6, ptr=PACKED)
    rest = {"weight": i["weight"], "ptr": i["ptr"]}
    with dfn_kernels.use_backend(backend):
        want = short_convolution(**i)
        assert same_bits(short_convolution(i["x"].view(2, 3, 17, 37), **rest), want.view(2, 3, 17, 37))
        assert same_bits(short_convolution(i["x"][4], **rest), want[4])
        for x in (i["x"].transpose(0, 2).contiguous().transpose(0, 2), torch.cat([i["x"]] * 2, -1)[..., :37]):
            assert not x.is_contiguous() and same_bits(short_convolution(x, **rest), want)
        turned = i["weight"].t().contiguous().t()
        assert same_bits(short_convolution(i["x"], turned, ptr=i["ptr"]), want)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("empty", [dict(B=0), dict(N=0), dict(d=0)])
def test_empty(backend, empty):
    i = leaves(make(**empty))
    with dfn_kernels.use_backend(backend):
        out = short_convolution(**i)
    assert out.shape == i["x"].shape
    out.sum().backward()
    assert i["weight"].grad.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    check_same_bits(short_convolution, make(N=1031 if backend == "native" else 131), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_and_second_derivative(backend):
    i = leaves(make(dtype=torch.float64, ptr=PACKED))
    with dfn_kernels.use_backend(backend):
        place = place_in_set(i["ptr"], i["x"].shape[-2])
        assert same_bits(ShortConvolutionFunction.apply(i["x"], i["weight"], place, backend), short_convolution(**i))
    check_second_derivative_raises(short_convolution, i, "weight", "x", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ptr", [None, PACKED])
def test_opcheck(backend, ptr):
    i = leaves(make(dtype=torch.float64 if ptr else torch.float32, ptr=ptr))
    place = place_in_set(i["ptr"], i["x"].shape[-2]) if ptr else None
    torch.library.opcheck(torch.ops.dfn.short_convolution, (i["x"], i["weight"], place, backend))


@pytest.mark.parametrize("backend", [*(b for b in BACKENDS if DEVICE != "cpu" or b != "triton"), "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_compile(backend, packed):
    def layer(x, c, *ptr):
        return short_convolution(x.tanh(), c * c, ptr=ptr[0] if ptr else None).sin()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for N in (13, 29):
        i = make(N=N, ptr=[0, 5, N] if packed else None)
        check_compiled(layer, compiled, list(i.values()), backend)


def test_dtypes():
    for x in DTYPES:
        for weight in DTYPES:
            for autocast in (False, True):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                    out = short_convolution(torch.ones(3, 5, dtype=x, device=DEVICE),
                                            torch.ones(2, 5, dtype=weight, device=DEVICE))  # fmt: skip
                assert out.dtype == x and out.tolist() == [[1] * 5, [2] * 5, [2] * 5]


BAD = {
    "x: not a tensor": (dict(x=1.0), TypeError, "x must be a tensor, got float"),
    "x: dims": (dict(x=torch.zeros(3)), ValueError, r"x must have shape \[.., N, d\], got \[3\]"),
    "x: integers": (dict(x=torch.zeros(3, 17, 37, dtype=torch.int64)), TypeError, "x must be float"),
    "weight: dims": (dict(weight=torch.zeros(37)), ValueError, r"weight must have shape \[W, d\] .*, got \[37\]"),
    "weight: none": (dict(weight=torch.zeros(0, 37)), ValueError, r"W > 0, got \[0, 37\]"),
    "weight: channels": (dict(weight=torch.zeros(4, 36)), ValueError, r"\[W, d\] = \[4, 37\], got \[4, 36\]"),
    "weight: bool": (dict(weight=torch.zeros(4, 37, dtype=torch.bool)), TypeError, "weight must be float"),
    "ptr: dtype": (dict(ptr=torch.tensor([0.0, 17.0])), TypeError, "ptr must be int64, got torch.float32"),
    "ptr: dims": (dict(ptr=torch.tensor(17)), ValueError, r"ptr must have shape \[S \+ 1\], got \[\]"),
    "ptr: falls": (dict(ptr=torch.tensor([0, 9, 5, 17])), ValueError, "ptr must ascend, got 9 before 5"),
    "ptr: short": (dict(ptr=torch.tensor([0, 16])), ValueError, "ptr must go from 0 to the number of rows, 17"),
    "device": (dict(weight=torch.zeros(4, 37, device="meta")), ValueError, "weight must be on cpu like x"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match="^short_convolution: .*" + message):
        short_convolution(**{**make(), **changes})
