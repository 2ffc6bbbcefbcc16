"""The exact sparse routing behind `pattern_route(density=)`. Top to bottom: threshold, schema, fake, autograd, call.

F_t = sum_p w_tp P_p keeps the entries with |F_toi| > threshold_t, the others count as 0. F exists only as registers, a
few of its entries at a time; the patterns are mixed for every token, so this costs more than the dense product.
"""

import math

import torch
from torch import Tensor

from . import _backends, _native
from ._transforms import OpFunction, call, custom_op
from .reference.pattern_route import pattern_route_density as reference

OP = "pattern_route_density"
_backends.register(OP, triton=False)

SAMPLES = 32768  # entries that the threshold is calibrated on: a standard error of 0.28 points at 50 %, 0.17 at 10 %


# ---- threshold ------------------------------------------------------------------------------------------------------
def _sample(patterns: Tensor) -> Tensor:
    """[P, S]: the same entries of every pattern, all of them if they are few, else evenly scattered over the matrix."""
    P, O, I = patterns.shape
    if O * I <= SAMPLES:
        return patterns.reshape(P, O * I)
    # a golden-ratio sequence over the flat index: even over rows and columns alike, and the same in every run
    step = round(O * I * 0.6180339887498949)
    while math.gcd(step, O * I) != 1:
        step += 1
    places = torch.arange(SAMPLES, device=patterns.device) * step % (O * I)
    return patterns.reshape(P, O * I)[:, places]


@custom_op("dfn::magnitude_above")
def _magnitude_above(mixed: Tensor, keep: int) -> Tensor:  # [T, S] -> [T]: what `keep` entries of a row exceed
    return _native.cpu.magnitude_above(mixed.contiguous(), keep)


@_magnitude_above.register_fake
def _(mixed, keep):
    return mixed.new_empty(mixed.shape[0])


class _MagnitudeFunction(OpFunction):
    op = _magnitude_above


def density_threshold(weights: Tensor, patterns: Tensor, density: float, backend: str = "reference") -> Tensor:
    """[T, P], [P, O, I] -> [T]: the magnitude that a share `density` of each token's mixed entries exceeds.

    The quantile of |F_t| over a fixed sample of entries; the exact one where there are at most SAMPLES.
    """
    entries = _sample(patterns).to(weights.dtype)
    S = entries.shape[1]
    keep = round(density * S)
    if keep >= S or weights.numel() == 0:
        return weights.new_full((weights.shape[0],), -1.0)
    rows = max(1, 2**22 // S)
    parts = (part @ entries for part in weights.split(rows))
    if backend == "native":
        return torch.cat([call(_magnitude_above, _MagnitudeFunction, mixed, keep) for mixed in parts])
    return torch.cat([mixed.abs().kthvalue(S - keep, dim=1).values for mixed in parts])


# ---- schema: everything in float32, or all in float64 ---------------------------------------------------------------
@custom_op("dfn::pattern_route_density")
def _op(
    x: Tensor,  # [T, I]
    weights: Tensor,  # [T, P]
    patterns: Tensor,  # [P, O, I]
    threshold: Tensor,  # [T]
    bias: Tensor | None,  # [O]
) -> tuple[Tensor, Tensor]:  # [T, O]; the number of entries each token keeps, [T] int64
    dense = (tensor.contiguous() for tensor in (x, weights, patterns, threshold))
    return _native.cpu.pattern_route_density(*dense, None if bias is None else bias.contiguous())


@custom_op("dfn::pattern_route_density_backward")
def _backward_op(
    grad: Tensor, x: Tensor, weights: Tensor, patterns: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # for x, weights, patterns
    dense = (tensor.contiguous() for tensor in (grad, x, weights, patterns, threshold))
    return _native.cpu.pattern_route_density_backward(*dense)


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(x, weights, patterns, threshold, bias):
    T, O = x.shape[0], patterns.shape[1]
    return x.new_empty(T, O), x.new_empty(T, dtype=torch.int64)


@_backward_op.register_fake
def _(grad, x, weights, patterns, threshold):
    return x.new_empty(x.shape), weights.new_empty(weights.shape), patterns.new_empty(patterns.shape)


# ---- autograd: what is kept counts as constant ----------------------------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    x, weights, patterns, threshold, bias = inputs
    ctx.save_for_backward(x, weights, patterns, threshold)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    grads = call(_backward_op, _BackwardFunction, grad, *ctx.saved_tensors)
    return *grads, None, grad.sum(0) if ctx.has_bias else None


_op.register_autograd(_backward, setup_context=_setup_context)


class _RouteFunction(OpFunction):
    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- call -----------------------------------------------------------------------------------------------------------
def route_with_density(
    x: Tensor,  # [T, I]
    weights: Tensor,  # [T, P], float64 with float64 x, else float32
    patterns: Tensor,  # [P, O, I]
    bias: Tensor | None,  # [O]
    density: float,
) -> tuple[Tensor, Tensor]:  # [T, O] in weights' dtype; the share of connections that are active, 0-d float32
    device = x.device.type
    backend = _backends.choose(OP, device)
    x, patterns = x.to(weights.dtype), patterns.to(weights.dtype)
    with torch.autocast(device, enabled=False):
        threshold = density_threshold(weights.detach(), patterns.detach(), density, backend)
        arguments = x, weights, patterns, threshold, bias
        y, kept = reference(*arguments) if backend == "reference" else call(_op, _RouteFunction, *arguments)
    entries = max(1, x.shape[0] * patterns.shape[1] * patterns.shape[2])
    return y, kept.sum().double().div(entries).float()
