"""A whole low-rank router in int8, for inference on the CPU. Top to bottom: schema, fake, public."""

import math

import torch
from torch import Tensor, nn

from . import _native
from ._checks import has_shape, is_float_tensor
from ._transforms import OpFunction, call, custom_op
from .quantized_route import QuantizedPatterns

OP = "QuantizedLowRank"


@custom_op("dfn::quantized_low_rank")
def _op(
    x: Tensor,  # [T, I] float32, contiguous like all of them
    down: Tensor,  # the packed rows of down, [P * r, I], and then of the selector, [P, I]
    down_scales: Tensor,
    down_sums: Tensor,
    selector_bias: Tensor,  # [P] float32
    up: Tensor,  # the packed rows of [O, P * r]
    up_scales: Tensor,
    up_sums: Tensor,
    bias: Tensor | None,  # [O] float32
) -> tuple[Tensor, Tensor]:  # [T, O] and the weights [T, P], float32
    packed = (down, down_scales, down_sums, selector_bias, up, up_scales, up_sums)
    return _native.cpu.quantized_low_rank(x, *packed, bias)


@_op.register_fake
def _(x, down, down_scales, down_sums, selector_bias, up, up_scales, up_sums, bias):
    return x.new_empty(x.shape[0], up_scales.shape[1]), x.new_empty(x.shape[0], selector_bias.shape[0])


class _Function(OpFunction):
    op = _op


class QuantizedLowRank(nn.Module):
    """Selector, softmax and low-rank patterns of int8 in one pass: ``(x [..., I], bias=None) -> (y, weights)``.

    ``w = softmax(S x + b)``, ``y = sum(w[p] * up[p] @ (down[p] @ x) for p in range(P)) + bias``: the products as in
    `QuantizedPatterns`, with a scale per token for x and another for the weighted ``down x``. y is ``[..., O]`` in the
    dtype of x, the weights are ``[..., P]`` float32. Inference only: nothing gets a gradient.

    Args:
        selector, down, up: pairs of int8 values and float32 scales of their rows: S ``[P, I]``, down
            ``[P * r, I]``, up ``[O, P * r]``.
        selector_bias: b, ``[P]``.
    """

    def __init__(
        self, selector: tuple[Tensor, Tensor], selector_bias: Tensor,
        down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor],
    ):  # fmt: skip
        super().__init__()
        both = (torch.cat(pair).unsqueeze(0) for pair in zip(down, selector, strict=True))
        self.down = QuantizedPatterns(*both)
        self.up = QuantizedPatterns(*(part.unsqueeze(0) for part in up))
        self.register_buffer("selector_bias", selector_bias.detach().float().contiguous())

    def factors(self) -> tuple[Tensor, Tensor]:
        """up ``[P, O, r]`` and down ``[P, r, I]`` as they are used, float32."""
        P = self.selector_bias.shape[0]
        down, up = self.down.dequantize()[0, :-P], self.up.dequantize()[0]
        return up.view(up.shape[0], P, -1).transpose(0, 1), down.view(P, -1, down.shape[1])

    @torch.no_grad()
    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        is_float_tensor(OP, "x", x)
        P, O, I = self.selector_bias.shape[0], self.up.shape[1], self.down.shape[2]
        has_shape(OP, "x", x, (*x.shape[:-1], I), "[..., I]")
        tokens = x.reshape(math.prod(x.shape[:-1]), I).float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        if _native.CPU_MISSING is None and x.device.type == "cpu":
            down, up = self.down, self.up
            packed = (down.packed, down.scales, down.sums, self.selector_bias, up.packed, up.scales, up.sums)
            y, w = call(_op, _Function, tokens, *packed, bias)
        else:
            inner, logits = (tokens @ self.down.dequantize()[0].T).split((self.up.shape[2], P), 1)
            w = (logits + self.selector_bias).softmax(1)
            weighted = inner.unflatten(1, (P, -1)) * w.unsqueeze(2)
            y = weighted.flatten(1) @ self.up.dequantize()[0].T
            y = y if bias is None else y + bias
        return y.to(x.dtype).reshape(*x.shape[:-1], O), w.reshape(*x.shape[:-1], P)
