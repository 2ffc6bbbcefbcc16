"""Pattern routing with int8 patterns, for inference on the CPU. Top to bottom: schema, fake, public."""

import torch
from torch import Tensor, nn

from . import _native
from ._checks import is_float_tensor
from ._transforms import OpFunction, call, custom_op
from .pattern_route import check_tokens, per_token
from .reference.pattern_route import pattern_route as reference

OP = "quantize_patterns"
STRIP = 32  # rows of a pattern that are packed together


@custom_op("dfn::quantized_route")
def _op(
    x: Tensor,  # [T, I] float32, contiguous like all of them
    weights: Tensor,  # [T, P] float32
    packed: Tensor,  # [P, ceil(O / 32), ceil(I / 4), 32, 4] int8
    scales: Tensor,  # [P, O] float32
    sums: Tensor,  # [P, O] int32: of the rows of int8 values
    bias: Tensor | None,  # [O] float32
) -> Tensor:  # [T, O] float32
    return _native.cpu.quantized_route(x, weights, packed, scales, sums, bias)


@_op.register_fake
def _(x, weights, packed, scales, sums, bias):
    return x.new_empty(x.shape[0], scales.shape[1])


class _Function(OpFunction):
    op = _op


class QuantizedPatterns(nn.Module):
    """What `quantize_patterns` returns; call it like `pattern_route`: ``(x, weights, bias=None) -> y``.

    ``y[t] = sum(w[t, p] * s_x[t] * s[p] * (Q[p] @ q[t]) for p in range(P)) + bias``: q is x[t] divided by its own scale
    s_x and rounded to int8, sums are exact in int32. Inference only: nothing gets a gradient.

    A module of buffers: it can be part of a model, moved, saved and loaded.
    """

    def __init__(self, values: Tensor, scales: Tensor):  # int8 [P, O, I], float32 [P, O]
        super().__init__()
        P, O, I = values.shape
        self.shape = values.shape
        strips, quads = -(-O // STRIP), -(-I // 4)
        padded = values.new_zeros(P, strips * STRIP, quads * 4)
        padded[:, :O, :I] = values
        self.register_buffer("packed", padded.view(P, strips, STRIP, quads, 4).transpose(2, 3).contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("sums", values.sum(2, dtype=torch.int32))

    def dequantize(self) -> Tensor:
        """[P, O, I] float32: the patterns as they are used."""
        P, O, I = self.shape
        values = self.packed.transpose(2, 3).reshape(P, self.packed.shape[1] * STRIP, -1)[:, :O, :I]
        return values * self.scales.unsqueeze(2)

    @torch.no_grad()
    def forward(self, x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
        P, O, I = self.shape
        check_tokens("QuantizedPatterns", x, weights, bias, P, O, I)
        if x.device != self.scales.device:
            raise ValueError(f"QuantizedPatterns: x must be on {self.scales.device}, got {x.device}")
        tokens, mixture = per_token(x, weights, torch.float32)
        tokens, mixture = tokens.float().contiguous(), mixture.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        if _native.CPU_MISSING is None and x.device.type == "cpu":
            y = call(_op, _Function, tokens, mixture, self.packed, self.scales, self.sums, bias)
        else:
            y = reference(tokens, mixture, self.dequantize(), bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], O)

    def extra_repr(self) -> str:
        return ", ".join(f"{letter}={size}" for letter, size in zip("POI", self.shape, strict=True))


@torch.no_grad()
def quantize_patterns(patterns: Tensor) -> QuantizedPatterns:
    """Rounds patterns to int8, one scale per pattern and row, and packs them for the CPU's byte products.

    A quarter of the memory of float32. The result's relative error is about 1 % for normally distributed inputs; x gets
    one scale per token, at call time. Without the compiled library, or on a GPU, the rounded patterns are used in
    float32, and x is not rounded.

    Args:
        patterns: ``[P, O, I]``, any float dtype, finite, I at most 65,536.

    >>> import torch
    >>> quantized = quantize_patterns(torch.tensor([[[127.0, 1.0], [2.0, -254.0]]]))
    >>> quantized(torch.tensor([[127.0, 0.0]]), torch.tensor([[0.5]]))
    tensor([[8064.5000,  127.0000]])
    """
    is_float_tensor(OP, "patterns", patterns)
    if patterns.ndim != 3:
        raise ValueError(f"{OP}: patterns must have shape [P, O, I], got {list(patterns.shape)}")
    if patterns.shape[2] > 65536:
        raise ValueError(f"{OP}: patterns must have at most 65536 columns, got {patterns.shape[2]}")
    if not patterns.isfinite().all():
        raise ValueError(f"{OP}: patterns must be finite")
    return QuantizedPatterns(*int8_rows(patterns))


def int8_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values ``[.., I]`` and the float32 scale of each row, ``[..]``: the largest magnitude becomes 127."""
    matrix = matrix.float()
    largest = matrix.abs().amax(-1) if matrix.shape[-1] else matrix.sum(-1)
    scales = largest / 127
    values = (matrix / scales.where(scales > 0, 1).unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return values, scales
