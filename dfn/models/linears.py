"""The weight of a linear layer as plain numbers, also after torch's or torchao's int8 quantisation.

Both find the linear layers of a model and replace them or their weights. Layers that are called go on working;
where a model reads a weight to hand it to an op, it asks here.
"""

import torch
from torch import Tensor, nn


def is_torchao(weight: object) -> bool:
    if type(weight) in (Tensor, nn.Parameter):  # first: torch.compile reads no module's name
        return False
    return type(weight).__module__.partition(".")[0] == "torchao"


def is_quantised(linear: nn.Module) -> bool:
    """By `torch.ao.quantization.quantize_dynamic`, or by `torchao.quantization.quantize_`."""
    return callable(linear.weight) or is_torchao(linear.weight)


def dense(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias; a weight that was quantised is multiplied out."""
    if callable(linear.weight):  # torch.ao's dynamic linear packs both
        return linear.weight().dequantize(), linear.bias()
    return (linear.weight.dequantize() if is_torchao(linear.weight) else linear.weight), linear.bias


def int8(linear: nn.Module) -> tuple[Tensor, Tensor] | None:
    """int8 values ``[out, in]`` and the float32 scale of each row, as they were quantised; None if otherwise."""
    weight = linear.weight
    if is_torchao(weight):
        values, scales = getattr(weight, "qdata", None), getattr(weight, "scale", None)
        zero = getattr(weight, "zero_point", None)
        fits = isinstance(values, Tensor) and values.dtype == torch.int8 and values.shape == weight.shape
        fits = fits and isinstance(scales, Tensor) and scales.shape == (weight.shape[0], 1)
        if fits and (zero is None or not zero.any()):
            return values.contiguous(), scales[:, 0].float()
        return None
    if not callable(weight):
        return None
    weight = weight()
    if weight.dtype != torch.qint8:
        raise TypeError(f"int8: quantised weights must be qint8, got {weight.dtype}")
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        return weight.int_repr().contiguous(), weight.q_per_channel_scales().float()
    return weight.int_repr().contiguous(), torch.full((weight.shape[0],), weight.q_scale())
