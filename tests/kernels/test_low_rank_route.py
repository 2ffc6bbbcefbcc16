import pytest
import torch
from helpers import DEVICE, INTERPRETED, check_compiled

from dfn_kernels import low_rank_route, pattern_route

pytestmark = pytest.mark.skipif(INTERPRETED, reason="there is no Triton kernel in it")


def make(lead=(3, 7), P=5, O=11, I=13, r=2, dtype=torch.float32):
    return {
        "x": torch.randn(*lead, I, device=DEVICE).to(dtype),
        "weights": torch.randn(*lead, P, device=DEVICE, dtype=dtype),
        "up": torch.randn(P, O, r, device=DEVICE).to(dtype),
        "down": torch.randn(P, r, I, device=DEVICE).to(dtype),
        "bias": torch.randn(O, device=DEVICE, dtype=dtype),
    }


def multiplied_out(x, weights, up, down, bias=None, **options):
    return pattern_route(x, weights, up @ down, bias, **options)


@pytest.mark.parametrize("sizes", [{}, dict(r=1), dict(P=1, O=1, I=1), dict(lead=()), dict(lead=(2, 3, 5))])
def test_is_pattern_route_of_the_product(sizes):
    inputs = make(**sizes, dtype=torch.float64)
    torch.testing.assert_close(low_rank_route(**inputs), multiplied_out(**inputs))
    inputs["bias"] = None
    torch.testing.assert_close(low_rank_route(**inputs), multiplied_out(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    inputs = make(dtype=dtype)
    y = low_rank_route(**inputs)
    exact = multiplied_out(**{name: x.double() for name, x in inputs.items()})
    assert y.dtype == dtype
    assert (y.double() - exact).norm() < 3 * torch.finfo(dtype).eps * exact.norm()


def test_weights_per_sequence():
    inputs = make(lead=(3, 7), dtype=torch.float64)
    inputs["weights"] = torch.randn(3, 1, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = low_rank_route(**inputs)
    torch.testing.assert_close(y, multiplied_out(**inputs))
    y.sum().backward()
    assert inputs["weights"].grad.shape == (3, 1, 5)


def test_gradcheck():
    tensors = [x.requires_grad_() for x in make(lead=(5,), P=2, O=3, I=4, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(low_rank_route, tensors)
    assert torch.autograd.gradgradcheck(low_rank_route, tensors)


@pytest.mark.parametrize("sizes", [dict(lead=(0,)), dict(r=0), dict(O=0), dict(I=0), dict(P=0)], ids=str)
def test_empty(sizes):
    inputs = make(**sizes)
    y = low_rank_route(**inputs)
    assert torch.equal(y, inputs["bias"].expand(y.shape)) or sizes == dict(lead=(0,))


def test_compile_and_autocast():
    compiled = torch.compile(low_rank_route, fullgraph=True, dynamic=True)
    for N in (7, 11):
        inputs = make(lead=(2, N))
        check_compiled(low_rank_route, compiled, list(inputs.values()))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert low_rank_route(**inputs).dtype == torch.bfloat16


BAD = {
    "up: dims": (dict(up=torch.zeros(5, 11)), ValueError, r"up must have shape \[P, O, r\], got \[5, 11\]"),
    "down: dims": (dict(down=torch.zeros(5, 11)), ValueError, r"down must have shape \[P, r, I\], got \[5, 11\]"),
    "down: rank": (dict(down=torch.zeros(5, 3, 13)), ValueError, r"\[P, r\] = \[5, 2\] like up, got \[5, 3, 13\]"),
    "up: dtype": (dict(up=torch.zeros(5, 11, 2).half()), TypeError, "up must have the dtype of x, torch.float32"),
    "up: list": (dict(up=[1]), TypeError, "up must be a tensor, got list"),
    "x: size": (dict(x=torch.zeros(3, 7, 12)), ValueError, "x must have shape .* with I = 13"),
    "weights: lead": (dict(weights=torch.zeros(2, 7, 5)), ValueError, "weights must have leading dimensions"),
    "bias: size": (dict(bias=torch.zeros(12)), ValueError, r"bias must have shape \[O\] = \[11\]"),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match="^low_rank_route: .*" + message):
        low_rank_route(**{**make(), **change})
