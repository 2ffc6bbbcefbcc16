"""Linear layers that an op reads: when it may, what happens when it may not, and the numbers of those in int8.

Adapters, hooks and quantisation find the linear layers of a model and replace them or their weights. Layers that are
called go on working; where a model would hand a weight to an op, it asks here.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..training.graphed import has_hooks


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling it is nothing but ``W x + b`` with the tensors that it holds (of an embedding: its rows).

    Not so, and to be called: whatever took its place (adapters, layers that torch.ao quantised), parametrisations,
    hooks (pruning and the old weight_norm are some), another ``forward`` on the object, weights of a kind of their own
    (torchao's int8, DTensor).
    """
    if type(layer) is not kind or _is_watched(layer):
        return False
    return not is_traceable_wrapper_subclass(layer.weight)


def _is_watched(layer: nn.Module) -> bool:
    return "forward" in layer.__dict__ or has_hooks(layer) or _has_any_global_hook()


def dtype_of(linear: nn.Module) -> torch.dtype:
    """What it takes: the dtype of its parameters, float32 if it has none."""
    return next((p.dtype for p in linear.parameters() if p.is_floating_point()), torch.float32)


def applied(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)`` in float32 at least, also under autocast; what is not plain computes in its own dtype."""
    with torch.autocast(x.device.type, enabled=False):
        if is_plain(linear):
            real = torch.promote_types(linear.weight.dtype, torch.float32)
            bias = None if linear.bias is None else linear.bias.to(real)
            return nn.functional.linear(x.to(real), linear.weight.to(real), bias)
        y = linear(x.to(dtype_of(linear)))
        return y.to(torch.promote_types(y.dtype, torch.float32))


def operands(x: Tensor, *linears: nn.Module) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """States, and weights and biases of ``linear(x)`` for an op that takes the products itself.

    If one of them is not plain all are called, and the op multiplies the results by slices of an identity: small beside
    the layers, and the op's other outputs and gradients stay as they are.
    """
    if all(map(is_plain, linears)):
        return x, [linear.weight for linear in linears], [linear.bias for linear in linears]
    results = [applied(linear, x) for linear in linears]
    sizes = [y.shape[-1] for y in results]
    identity = torch.eye(sum(sizes), dtype=results[0].dtype, device=x.device)
    return torch.cat(results, -1), list(identity.split(sizes)), [None] * len(linears)


def weight_of(linear: nn.Module, in_features: int) -> Tensor:
    """``[out, in]``, the matrix that a layer without bias amounts to: its weight; what is not plain is asked where it
    takes the unit vectors."""
    if is_plain(linear):
        return linear.weight
    device = next((p.device for p in linear.parameters()), None)
    return applied(linear, torch.eye(in_features, device=device)).to(dtype_of(linear)).T


def rows_of(embedding: nn.Module, number: int) -> Tensor:
    """``[number, d]``, all rows of an embedding: its weight; what is not plain is asked for them."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight
    device = next((p.device for p in embedding.parameters()), None)
    return embedding(torch.arange(number, device=device))


def is_torchao(weight: object) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def is_quantised(linear: nn.Module) -> bool:
    """By `torch.ao.quantization.quantize_dynamic`, or by `torchao.quantization.quantize_`, and nothing else besides."""
    weight = getattr(linear, "weight", None)
    return (callable(weight) or is_torchao(weight)) and not _is_watched(linear)


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
