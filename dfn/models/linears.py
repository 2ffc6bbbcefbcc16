"""When an op may read the weights of a linear layer, and what happens when it may not."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(linear: nn.Module) -> bool:
    """Whether calling it is nothing but ``W x + b`` with the tensors that it holds.

    Not so, and to be called: whatever took its place (adapters, layers that torch.ao quantised), parametrisations,
    hooks (pruning and the old weight_norm are some), another ``forward`` on the object, weights of a kind of their own
    (torchao's int8, DTensor).
    """
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return not (hooked or _has_any_global_hook() or is_traceable_wrapper_subclass(linear.weight))


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


def operands(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """States, weight and bias of ``linear(x)`` for an op that takes the product itself.

    What is not plain is called, and the op multiplies the result by an identity: small beside the layer, and the op's
    other outputs and gradients stay as they are.
    """
    if is_plain(linear):
        return x, linear.weight, linear.bias
    y = applied(linear, x)
    return y, torch.eye(y.shape[-1], dtype=y.dtype, device=y.device), None
