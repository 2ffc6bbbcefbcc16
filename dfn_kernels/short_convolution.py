"""A short causal convolution, channel by channel. Top to bottom: check, schema, fake, backends, autograd, public."""

import math

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import compute_dtype, dense_rows, has_shape, is_float_tensor, same_device, shaped
from ._transforms import OpFunction, call, custom_op
from .packed import check_offset_values, check_sets, place_in_set
from .reference.short_convolution import short_convolution as reference

_backends.register("short_convolution")
OP = "short_convolution"


# ---- check ----------------------------------------------------------------------------------------------------------
def _check(x, weight, ptr) -> None:
    is_float_tensor(OP, "x", x)
    is_float_tensor(OP, "weight", weight)
    if x.ndim < 2:
        raise ValueError(f"{OP}: x must have shape [.., N, d], got {list(x.shape)}")
    if weight.ndim != 2 or len(weight) == 0:
        raise ValueError(f"{OP}: weight must have shape [W, d] with W > 0, got {list(weight.shape)}")
    has_shape(OP, "weight", weight, (len(weight), x.shape[-1]), "[W, d]")
    check_sets(OP, ptr, None, None)
    same_device(OP, "x", x, weight=weight, ptr=ptr)


# ---- schema: weight in float32, or everything in float64 ------------------------------------------------------------
@custom_op("dfn::short_convolution")
def _op(
    x: Tensor,  # [B, N, d]
    weight: Tensor,  # [W, d]
    place: Tensor | None,  # [N]: how many entities of the same sequence come before; their number without it
    backend: str,
) -> Tensor:  # [B, N, d]
    return _launcher(backend).short_convolution(dense_rows(x), weight.contiguous(), place)


@custom_op("dfn::short_convolution_backward")
def _backward_op(
    grad: Tensor,  # [B, N, d]
    x: Tensor,
    weight: Tensor,
    place: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # for x [B, N, d], weight [W, d]
    return _launcher(backend).short_convolution_backward(dense_rows(grad), dense_rows(x), weight.contiguous(), place)


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(x, weight, place, backend):
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(grad, x, weight, place, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


# ---- backends: both have the same two functions ---------------------------------------------------------------------
def _launcher(backend: str):
    if backend == "triton":
        from .triton import short_convolution

        return short_convolution
    return _native.cpu


# ---- autograd: shared by the registered op and the public Function --------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    grads = call(_backward_op, _BackwardFunction, grad, *ctx.saved_tensors, ctx.backend)
    return *grads, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


class ShortConvolutionFunction(OpFunction):
    """The op as a torch.autograd.Function: the arguments of `torch.ops.dfn.short_convolution`, in its order.

    For code that composes Functions by hand; `short_convolution` checks, converts, and calls this or the registered op.
    """

    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- public ---------------------------------------------------------------------------------------------------------
def short_convolution(x: Tensor, weight: Tensor, *, ptr: Tensor | None = None) -> Tensor:
    """Brings together every entity and the few before it, channel by channel.

    ``y_i = sum_{t < W} c_t * x_{i - t}``; before the first entity lies 0. No later entity changes a bit of an earlier
    output.

    Args:
        x: ``[.., N, d]``. float16, bfloat16, float32 or float64.
        weight: c, ``[W, d]``, the entity's own first; W at least 1.
        ptr: int64 ``[S + 1]``: offsets of S sequences that lie one after another along N, ascending from 0 to N. None
            looks into the one before it. Leading dims share it.

    Returns:
        ``[.., N, d]`` in x's dtype, also under autocast. Sums are float32, or float64 if x or weight is.

    Gradients: x and weight. The weight's is summed in an order that the shape decides. A second derivative raises
    RuntimeError, except on the reference backend.

    Raises: ValueError (shapes, offsets on the CPU unless compiled, devices), TypeError (dtypes).

    Source: Fu et al., Hungry hungry hippos (2023), section 3, where it is called a shift.

    >>> import torch
    >>> short_convolution(torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[1.0], [0.5]]))
    tensor([[  1.0000],
            [ 10.5000],
            [105.0000]])
    """
    _check(x, weight, ptr)
    real = compute_dtype(x, weight)
    shape, out_dtype = x.shape, x.dtype
    x, weight = shaped(x, math.prod(shape[:-2]), *shape[-2:]), weight.to(real)
    if real == torch.float64:
        x = x.double()
    check_offset_values(OP, "ptr", ptr, x.shape[1])
    place = None if ptr is None else place_in_set(ptr, x.shape[1])
    backend = _backends.choose(OP, x.device.type)
    if backend == "reference":
        out = reference(x, weight, place)
    else:
        out = call(_op, ShortConvolutionFunction, x, weight, place, backend)
    return shaped(out.to(out_dtype), *shape)
