"""Drift of entities along their flow. Read from top to bottom: check, schema, fake, backends, autograd, public."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import (
    compute_dtype,
    dense_rows,
    has_shape,
    is_float_tensor,
    is_number,
    same_device,
    shaped,
)
from ._transforms import OpFunction, call, custom_op, per_head
from .reference.flow_drift import flow_drift as reference

_backends.register("flow_drift")
OP = "flow_drift"
# More outputs per entity than this (the published layer has D = d) make a matrix product that a GEMM library does
# best; nothing is left to fuse then, and both backends use PyTorch's.
WIDE = {torch.float32: 32, torch.float64: 16}


class Drift(NamedTuple):
    """Where the entities went, how they moved, and the energy of that motion."""

    positions: Tensor
    flow: Tensor
    energy: Tensor


# ---- check ----------------------------------------------------------------------------------------------------------
def _check(states, positions, weight, bias, alpha) -> None:
    for name, value in (("states", states), ("positions", positions), ("weight", weight)):
        is_float_tensor(OP, name, value)
    if states.ndim < 2:
        raise ValueError(f"{OP}: states must have shape [.., N, d], got {list(states.shape)}")
    if weight.ndim not in (2, 3):
        raise ValueError(f"{OP}: weight must have shape [D, d] or [H, D, d], got {list(weight.shape)}")
    *lead, N, d = states.shape
    heads, D = weight.shape[:-2], positions.shape[-1] if positions.ndim else 0
    letters = "[H, D" if heads else "[D"
    if not heads or positions.ndim != states.ndim:
        has_shape(OP, "positions", positions, (*lead, *heads, N, D), "[.., H, N, D]" if heads else "[.., N, D]")
    else:  # one position for all heads
        has_shape(OP, "positions", positions, (*lead, N, D), "[.., N, D]")
    has_shape(OP, "weight", weight, (*heads, D, d), letters + ", d]")
    if bias is not None:
        is_float_tensor(OP, "bias", bias)
        has_shape(OP, "bias", bias, (*heads, D), letters + "]")
    same_device(OP, "states", states, positions=positions, weight=weight, bias=bias)
    if isinstance(alpha, Tensor):
        is_float_tensor(OP, "alpha", alpha)
        if alpha.ndim > 0:
            has_shape(OP, "alpha", alpha, tuple(heads) or (1,), "[H]" if heads else "[] or [1]")
        same_device(OP, "states", states, alpha=alpha)
    else:
        is_number(OP, "alpha", alpha)


# ---- schema: positions, weight, bias and alpha in float32, or everything in float64 ---------------------------------
@custom_op("dfn::flow_drift")
def _op(
    states: Tensor,  # [B, N, d]
    positions: Tensor,  # [B, H, N, D]
    weight: Tensor,  # [H, D, d]
    bias: Tensor | None,  # [H, D]
    alpha: Tensor,  # [H]
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # positions [B, H, N, D], flow [B, H, N, D], energy [B, H, N]
    if weight.shape[0] * weight.shape[1] > WIDE[weight.dtype]:
        return tuple(x.contiguous() for x in reference(states, positions, weight, bias, alpha))
    return _launcher(backend).flow_drift(
        dense_rows(states), positions.contiguous(), weight.contiguous(),
        None if bias is None else bias.contiguous(), alpha.contiguous(),
    )  # fmt: skip


@custom_op("dfn::flow_drift_backward")
def _backward_op(
    grad_positions: Tensor,  # [B, H, N, D]
    grad_flow: Tensor,  # [B, H, N, D]
    grad_energy: Tensor,  # [B, H, N]
    states: Tensor,
    weight: Tensor,
    alpha: Tensor,
    flow: Tensor,  # [B, H, N, D], from the forward pass
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # for states [B, N, d], weight [H, D, d], bias [H, D], alpha [H]
    if weight.shape[0] * weight.shape[1] > WIDE[weight.dtype]:
        return _wide_backward(grad_positions, grad_flow, grad_energy, states, weight, alpha, flow)
    return _launcher(backend).flow_drift_backward(
        grad_positions.contiguous(), grad_flow.contiguous(), grad_energy.contiguous(), dense_rows(states),
        weight.contiguous(), alpha.contiguous(), flow.contiguous(),
    )  # fmt: skip


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(states, positions, weight, bias, alpha, backend):
    return (
        positions.new_empty(positions.shape),
        positions.new_empty(positions.shape),
        positions.new_empty(positions.shape[:-1]),
    )


@_backward_op.register_fake
def _(grad_positions, grad_flow, grad_energy, states, weight, alpha, flow, backend):
    return (
        states.new_empty(states.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:2]),
        alpha.new_empty(alpha.shape),
    )


# ---- backends: both have the same two functions ---------------------------------------------------------------------
def _launcher(backend: str):
    if backend == "triton":
        from .triton import flow_drift

        return flow_drift
    return _native.cpu


def _wide_backward(grad_positions, grad_flow, grad_energy, states, weight, alpha, flow) -> tuple:
    H, D, d = weight.shape
    B, N, _ = states.shape
    total = alpha.view(1, H, 1, 1) * grad_positions + grad_flow + 2 * grad_energy.unsqueeze(-1) * flow
    rows = total.transpose(1, 2).reshape(B * N, H * D)
    with torch.autocast(states.device.type, enabled=False):  # which would round the products' operands
        grad_states = rows @ weight.reshape(H * D, d)
        grad_weight = rows.t() @ states.reshape(B * N, d).to(weight.dtype)
    return (
        grad_states.view(B, N, d).to(states.dtype),
        grad_weight.view(H, D, d),
        total.sum((0, 2)),
        (grad_positions * flow).sum((0, 2, 3)),
    )


# ---- autograd: shared by the registered op and the public Function --------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    states, _, weight, bias, alpha, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(states, weight, alpha, output[1])


def _backward(ctx, grad_positions, grad_flow, grad_energy):
    grad_states, grad_weight, grad_bias, grad_alpha = call(
        _backward_op, _BackwardFunction, grad_positions, grad_flow, grad_energy, *ctx.saved_tensors, ctx.backend
    )
    return grad_states, grad_positions, grad_weight, grad_bias if ctx.has_bias else None, grad_alpha, None


_op.register_autograd(_backward, setup_context=_setup_context)


class FlowDriftFunction(OpFunction):
    """The op as a torch.autograd.Function: the arguments of `torch.ops.dfn.flow_drift`, in its order.

    For code that composes Functions by hand; `flow_drift` checks, converts, and calls this or the registered op.
    """

    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- from [B, ..] on, without checks: what flow_attention calls, too -------------------------------------------------
def drift_heads(states: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor) -> Drift:
    """The op on states [B, N, d] and positions [B, H, N, D]; all but the states in the dtype of the result."""
    if positions.dtype == torch.float64:
        states = states.double()
    backend = _backends.choose(OP, states.device.type)
    if backend == "reference":
        return Drift(*reference(states, positions, weight, bias, alpha))
    return Drift(*call(_op, FlowDriftFunction, states, positions, weight, bias, alpha, backend))


# ---- public ---------------------------------------------------------------------------------------------------------
def flow_drift(
    states: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None = None, alpha: float | Tensor = 0.1
) -> Drift:
    """Moves every entity along the flow that its state prescribes.

    ``flow[i] = weight @ states[i] + bias``, ``positions'[i] = positions[i] + alpha * flow[i]``,
    ``energy[i] = |flow[i]|^2``, all in one pass over the states. With heads each head has its own weight, positions
    and alpha, and reads the same states.

    Args:
        states: ``[.., N, d]``. float16, bfloat16, float32 or float64. Under autocast they are cast to its dtype.
        positions: ``[.., N, D]``, or with heads ``[.., H, N, D]``; ``[.., N, D]`` is then shared by the heads.
        weight: W_f, ``[D, d]`` or, with heads, ``[H, D, d]``.
        bias: ``[D]`` or ``[H, D]``.
        alpha: step length: a number, a 0-d tensor, or one per head, ``[H]``.

    Returns:
        ``Drift(positions, flow, energy)``: ``[.., (H,) N, D]``, the same, and ``[.., (H,) N]``, in float32, or in
        float64 if states or positions are. The positions given are not changed.

    Gradients: states, positions, weight, bias, and alpha if a tensor; from all three outputs. The sums over entities
    run in fixed order: the same bits in every run (beyond H * D = 32, or 16 in float64,
    PyTorch's matrix product decides). A second derivative raises RuntimeError, except on the reference backend.

    Raises: ValueError (shapes, devices), TypeError (dtypes).

    Source: the drift of a Dynamic Flow Network layer, ``f_i = W_f s_i``, ``p_i' = p_i + alpha f_i``.

    >>> import torch
    >>> drift = flow_drift(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1), torch.tensor([[3.0, 0.5]]), alpha=0.5)
    >>> drift.positions, drift.flow, drift.energy
    (tensor([[2.]]), tensor([[4.]]), tensor([16.]))
    """
    _check(states, positions, weight, bias, alpha)
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        states = states.to(torch.get_autocast_dtype(device))
    real = compute_dtype(states, positions)

    lead, (N, d) = states.shape[:-2], states.shape[-2:]
    heads = weight.ndim == 3
    shared = heads and positions.ndim == states.ndim
    H, D = weight.shape[0] if heads else 1, weight.shape[-2]
    B = math.prod(lead)
    positions = positions.to(real)
    if shared or not heads:
        positions = positions.reshape(B, 1, N, D)
        if shared:
            positions = positions.expand(B, H, N, D)
    elif len(lead) != 1:
        positions = positions.reshape(B, H, N, D)
    states = shaped(states, B, N, d)
    weight = shaped(weight.to(real), H, D, d)
    if bias is not None:
        bias = shaped(bias.to(real), H, D)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(real).expand(H)
    else:
        alpha = per_head(alpha, H, states, real)
    out = drift_heads(states, positions, weight, bias, alpha)
    if heads and len(lead) == 1:
        return out
    shape = (*lead, H, N) if heads else (*lead, N)
    return Drift(out[0].view(*shape, D), out[1].view(*shape, D), out[2].view(shape))
