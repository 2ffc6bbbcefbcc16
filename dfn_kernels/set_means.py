"""Means within packed sets, for `flow_norm`. Top to bottom: schema, fake, backends, autograd, function."""

from torch import Tensor

from . import _backends, _native
from ._transforms import OpFunction, call, custom_op
from .packed import check_offset_values
from .reference.set_means import set_means as reference

_backends.register("set_means")


# ---- schema ---------------------------------------------------------------------------------------------------------
@custom_op("dfn::set_means")
def _op(
    values: Tensor,  # [B, N], float32 or float64
    ptr: Tensor,  # [S + 1] offsets of the sets
    causal: bool,  # over the rows of the set up to each one
    backend: str,
) -> Tensor:  # [B, N]
    check_offset_values("flow_norm", "ptr", ptr, values.shape[1])
    return _launcher(backend).set_means(values.contiguous(), ptr.contiguous(), causal)


@custom_op("dfn::set_means_backward")
def _backward_op(grad: Tensor, ptr: Tensor, causal: bool, backend: str) -> Tensor:  # for values [B, N]
    return _launcher(backend).set_means_backward(grad.contiguous(), ptr.contiguous(), causal)


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(values, ptr, causal, backend):
    return values.new_empty(values.shape)


@_backward_op.register_fake
def _(grad, ptr, causal, backend):
    return grad.new_empty(grad.shape)


# ---- backends: both have the same two functions ---------------------------------------------------------------------
def _launcher(backend: str):
    if backend == "triton":
        from .triton import set_means

        return set_means
    return _native.cpu


# ---- autograd -------------------------------------------------------------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    _, ptr, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(ptr)


def _backward(ctx, grad):
    return call(_backward_op, _BackwardFunction, grad, *ctx.saved_tensors, ctx.causal, ctx.backend), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


class _Function(OpFunction):
    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- function -------------------------------------------------------------------------------------------------------
def set_means(values: Tensor, ptr: Tensor, causal: bool) -> Tensor:
    """``out[i] = mean(values[j] for j in the set of i)``, of those with ``j <= i`` if causal: ``[B, N] -> [B, N]``.

    Sums run in float64, one row after the other: neither another set nor, if causal, a later row changes a bit.
    """
    backend = _backends.choose("set_means", values.device.type)
    if backend == "reference":
        check_offset_values("flow_norm", "ptr", ptr, values.shape[1])
        return reference(values, ptr, causal)
    return call(_op, _Function, values, ptr, causal, backend)
