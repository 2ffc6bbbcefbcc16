"""Normalisation of states by flow energy. Read from top to bottom: check, schema, fake, backends, autograd, public."""

import math

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import (
    compute_dtype,
    dense_rows,
    has_shape,
    is_float_tensor,
    is_index_tensor,
    is_number,
    same_device,
    shaped,
)
from ._transforms import OpFunction, call, custom_op
from .packed import check_sets
from .reference.flow_norm import flow_norm as reference
from .set_means import set_means

_backends.register("flow_norm")
OP = "flow_norm"
MODES = ("mean", "causal", "entity")


# ---- check ----------------------------------------------------------------------------------------------------------
def _check(states, energy, eps, mode, lengths, ptr) -> None:
    is_float_tensor(OP, "states", states)
    is_float_tensor(OP, "energy", energy)
    if states.ndim < 2:
        raise ValueError(f"{OP}: states must have shape [.., N, d], got {list(states.shape)}")
    has_shape(OP, "energy", energy, states.shape[:-1], "[.., N]")
    is_number(OP, "eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{OP}: eps must be finite and not negative, got {eps}")
    if mode not in MODES:
        raise ValueError(f"{OP}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if lengths is not None:
        is_index_tensor(OP, "lengths", lengths)
        has_shape(OP, "lengths", lengths, states.shape[:-2], "[..]")
    check_sets(OP, ptr, None, None, lengths=lengths)
    same_device(OP, "states", states, energy=energy, lengths=lengths, ptr=ptr)


# ---- schema: energy in float32, or everything in float64 ------------------------------------------------------------
@custom_op("dfn::flow_norm")
def _op(
    states: Tensor,  # [B, N, d]
    energy: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    eps: float,
    mode: str,
    backend: str,
) -> Tensor:  # [B, N, d]
    return _launcher(backend).flow_norm(*_dense(states, energy, lengths), eps, mode)


@custom_op("dfn::flow_norm_backward")
def _backward_op(
    grad: Tensor,  # [B, N, d]
    states: Tensor,
    energy: Tensor,
    lengths: Tensor | None,
    eps: float,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # for states [B, N, d], energy [B, N]
    return _launcher(backend).flow_norm_backward(dense_rows(grad), *_dense(states, energy, lengths), eps, mode)


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(states, energy, lengths, eps, mode, backend):
    return states.new_empty(states.shape)


@_backward_op.register_fake
def _(grad, states, energy, lengths, eps, mode, backend):
    return states.new_empty(states.shape), energy.new_empty(energy.shape)


# ---- backends: both have the same two functions ---------------------------------------------------------------------
def _launcher(backend: str):
    if backend == "triton":
        from .triton import flow_norm

        return flow_norm
    return _native.cpu


def _dense(states, energy, lengths) -> tuple:
    return dense_rows(states), energy.contiguous(), None if lengths is None else lengths.contiguous()


# ---- autograd: shared by the registered op and the public Function --------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    grads = call(_backward_op, _BackwardFunction, grad, *ctx.saved_tensors, ctx.eps, ctx.mode, ctx.backend)
    return *grads, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


class FlowNormFunction(OpFunction):
    """The op as a torch.autograd.Function: the arguments of `torch.ops.dfn.flow_norm`, in its order.

    For code that composes Functions by hand; `flow_norm` checks, converts, and calls this or the registered op.
    """

    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- public ---------------------------------------------------------------------------------------------------------
def flow_norm(
    states: Tensor, energy: Tensor, eps: float = 1e-6, mode: str = "mean", lengths: Tensor | None = None, *,
    ptr: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Divides states by the root of their mean flow energy.

    ``y[i] = states[i] / sqrt(E[energy] + eps)``, where E is, by ``mode``:

    - "mean": the mean over the entities of the sequence;
    - "causal": the running mean over entities ``j <= i``. What comes later does not change a bit of what is earlier;
    - "entity": the entity's own energy.

    Args:
        states: ``[.., N, d]``. float16, bfloat16, float32 or float64.
        energy: ``[.., N]``, not negative, as `flow_drift` returns it; with heads, summed over them first.
        eps: added to the mean; must not be negative.
        mode: "mean", "causal" or "entity".
        lengths: int64 ``[..]``: entities ``lengths`` and beyond are padding: they are left out of the mean, and their
            rows of the output are 0.
        ptr: int64 ``[S + 1]``, instead of lengths: offsets of S sequences that lie one after another along N, ascending
            from 0 to N. Means are those of each alone. Leading dims share it.

    Returns:
        ``[.., N, d]`` in states' dtype, also under autocast. The arithmetic is float32, or float64 if states or energy
        are; running means are summed in float64.

    Gradients: states and energy. A second derivative raises RuntimeError, except on the reference backend.

    Raises: ValueError (shapes, eps, mode, devices), TypeError (dtypes).

    Source: the FlowNorm of Dynamic Flow Networks, ``FlowNorm(s_i) = s_i / sqrt(E[|f|^2] + eps)``.

    >>> import torch
    >>> flow_norm(torch.ones(2, 1), torch.tensor([1.0, 7.0]), eps=0.0, mode="causal")
    tensor([[1.0000],
            [0.5000]])
    """
    _check(states, energy, eps, mode, lengths, ptr)
    real = compute_dtype(states, energy)
    shape, out_dtype = states.shape, states.dtype
    B, (N, d) = math.prod(shape[:-2]), shape[-2:]
    states = shaped(states, B, N, d)
    if real == torch.float64:
        states = states.double()
    energy = shaped(energy.to(real), B, N)
    if lengths is not None:
        lengths = shaped(lengths, B)
    if ptr is not None and mode != "entity":  # the pass over the states is that of means which are known
        energy, mode = set_means(energy, ptr, mode == "causal"), "entity"
    # A number given to an op is a constant of the program, which an exported one wants; a term of the mean is not.
    # (In PyTorch 2.11 is_exporting() is true of whatever Dynamo traces, so it cannot tell them apart.)
    if torch.compiler.is_dynamo_compiling():
        energy, eps = energy + eps, 0.0

    backend = _backends.choose(OP, states.device.type)
    if backend == "reference":
        out = reference(states, energy, lengths, float(eps), mode)
    else:
        out = call(_op, FlowNormFunction, states, energy, lengths, float(eps), mode, backend)
    return shaped(out.to(out_dtype), *shape)
