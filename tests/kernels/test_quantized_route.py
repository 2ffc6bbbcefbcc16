import pytest
import torch
from helpers import DEVICE, INTERPRETED, same_bits
from test_pattern_route import make, softmax_weights

from dfn_kernels import _native, pattern_route, quantize_patterns

pytestmark = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="a kernel for the CPU")


def as_rounded(quantized, x, weights, bias=None):
    """The same arithmetic in float64."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    rounded = (x.double() / scale.where(scale > 0, 1) + 0.5).floor() * scale
    return pattern_route(rounded, weights.double(), quantized.dequantize().double(), bias)


SIZES = [dict(T=T) for T in (1, 2, 3, 7, 14, 15, 131)] + [
    dict(O=1), dict(I=1), dict(P=1, O=33, I=3), dict(T=600, O=67, I=131), dict(T=5, P=3, O=31, I=1031),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_is_the_rounded_product(sizes):
    inputs = make(**sizes)
    patterns = inputs.pop("patterns")
    quantized = quantize_patterns(patterns)
    assert (quantized.dequantize() - patterns).abs().le(patterns.abs().amax(2, keepdim=True) / 253).all()
    y, want = quantized(**inputs), as_rounded(quantized, **inputs)
    assert (y - want).norm() < 2e-3 * want.norm()  # a value halfway between two integers may fall to either side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_one_and_a_half_percent(dtype):
    inputs = make(131, 8, 512, 512, dtype=dtype, bias=False, weights=softmax_weights(131, 8))
    exact = pattern_route(**{name: x.double() for name, x in inputs.items()})
    y = quantize_patterns(inputs.pop("patterns"))(**inputs)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() < 0.015 * exact.norm()


def test_leading_dims_zeros_and_empty():
    inputs = make(lead=(2, 3))
    quantized = quantize_patterns(inputs.pop("patterns"))
    y = quantized(**inputs)
    flat = quantized(inputs["x"].flatten(0, 1), inputs["weights"].flatten(0, 1), inputs["bias"])
    assert same_bits(y.flatten(0, 1), flat)
    inputs["x"].zero_()
    assert torch.equal(quantized(**inputs), inputs["bias"].expand_as(y))
    assert quantize_patterns(torch.zeros(2, 3, 4))(torch.ones(5, 4), torch.ones(5, 2)).eq(0).all()
    for empty in (dict(T=0), dict(O=0), dict(I=0)):
        inputs = make(**empty)
        y = quantize_patterns(inputs.pop("patterns"))(**inputs)
        assert torch.equal(y, inputs["bias"].expand(y.shape))


def test_not_a_number_stays_in_its_row():
    inputs = make(T=16)
    inputs["x"][3, 4], inputs["x"][5, 6] = float("nan"), float("inf")
    y = quantize_patterns(inputs.pop("patterns"))(**inputs)
    assert not y[[3, 5]].isfinite().any() and y[[0, 1, 2, 4, 6]].isfinite().all()


@pytest.mark.skipif(_native.CPU_MISSING is not None, reason="only the compiled library rounds x")
def test_tokens_near_underflow():
    """Down to 4e-37 they count; below, their scale's inverse is infinite, and they count as 0."""
    quantized, weights = quantize_patterns(torch.ones(1, 3, 70)), torch.ones(2, 1)
    y = quantized(torch.tensor([[5e-37], [3e-37]]).expand(2, 70), weights)
    # scale of the token times that of the pattern, 3.1e-41, has 15 bits
    torch.testing.assert_close(y[0], torch.full((3,), 70 * 5e-37), rtol=2**-15, atol=0)
    assert y[1].eq(0).all() and quantized(torch.full((2, 70), 1e-40), weights).eq(0).all()


def test_largest_sums_do_not_overflow():
    patterns = torch.ones(1, 3, 65536)
    assert quantize_patterns(patterns)(torch.ones(2, 65536), torch.ones(2, 1)).sub(65536).abs().max() < 1
    assert quantize_patterns(-patterns)(torch.ones(2, 65536), torch.ones(2, 1)).add(65536).abs().max() < 1


def test_bad_input():
    with pytest.raises(TypeError, match="^quantize_patterns: patterns must be a tensor"):
        quantize_patterns([1.0])
    with pytest.raises(ValueError, match=r"^quantize_patterns: patterns must have shape \[P, O, I\]"):
        quantize_patterns(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="^quantize_patterns: patterns must be finite"):
        quantize_patterns(torch.full((1, 2, 3), float("inf")))
    with pytest.raises(ValueError, match="^QuantizedPatterns: x must have shape"):
        quantize_patterns(torch.zeros(1, 2, 3))(torch.zeros(5, 4), torch.zeros(5, 1))
