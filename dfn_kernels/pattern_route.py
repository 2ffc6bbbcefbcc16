"""A weight matrix mixed per token from P patterns. Top to bottom: check, schema, fake, backends, autograd, public."""

import math

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import (
    FLOATS,
    are_flags,
    dense_rows,
    has_shape,
    is_float_tensor,
    is_integer,
    is_number,
    same_device,
    shaped,
)
from ._transforms import OpFunction, call, custom_op
from .reference.pattern_route import pattern_route as reference
from .route_density import route_with_density

OP = "pattern_route"
# Measured on Hopper (1.9 times as fast as Triton's); compiled for 8.x; on what came later they would not use its tensor
# cores' own instructions, which Triton does.
_backends.register(OP, cuda=True, cuda_first=lambda capability: capability < (10, 0))


# ---- check: shared with low_rank_route and the quantised patterns ---------------------------------------------------
def check_tokens(op: str, x, weights, bias, P: int, O: int, I: int) -> None:
    """The arguments that every routing op has, against the sizes of its patterns."""
    is_float_tensor(op, "x", x)
    is_float_tensor(op, "weights", weights)
    if x.ndim == 0 or x.shape[-1] != I:
        raise ValueError(f"{op}: x must have shape [..., I] with I = {I}, got {list(x.shape)}")
    if weights.ndim == 0 or weights.shape[-1] != P:
        raise ValueError(f"{op}: weights must have shape [..., P] with P = {P}, got {list(weights.shape)}")
    lead, own = x.shape[:-1], weights.shape[:-1]
    tail = lead[len(lead) - len(own) :]
    if len(own) > len(lead) or any(mine != 1 and mine != size for mine, size in zip(own, tail, strict=True)):
        raise ValueError(f"{op}: weights must have leading dimensions that broadcast to {list(lead)}, those of x, "
                         f"got {list(weights.shape)}")  # fmt: skip
    if bias is not None:
        is_float_tensor(op, "bias", bias)
        has_shape(op, "bias", bias, (O,), "[O]")
    same_device(op, "x", x, weights=weights, bias=bias)


def _check(x, weights, patterns, bias, top_k, density, out_dtype, return_share) -> None:
    is_float_tensor(OP, "patterns", patterns)
    if patterns.ndim != 3:
        raise ValueError(f"{OP}: patterns must have shape [P, O, I], got {list(patterns.shape)}")
    P, O, I = patterns.shape
    check_tokens(OP, x, weights, bias, P, O, I)
    same_device(OP, "x", x, patterns=patterns)
    if x.dtype != patterns.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{OP}: patterns must have the dtype of x, {x.dtype}, got {patterns.dtype}")
    if top_k is not None:
        is_integer(OP, "top_k", top_k, 1, P)
    if density is not None:
        is_number(OP, "density", density)
        if not 0 < density <= 1:
            raise ValueError(f"{OP}: density must be above 0 and at most 1, got {density}")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"{OP}: out_dtype must be float16, bfloat16, float32 or float64, got {out_dtype}")
    are_flags(OP, return_share=return_share)


# ---- schema: weights and bias in float64 with float64 x, else float32 -----------------------------------------------
@custom_op("dfn::pattern_route")
def _op(
    x: Tensor,  # [T, I]
    weights: Tensor,  # [T, P]
    patterns: Tensor,  # [P, O, I], in the dtype of x
    bias: Tensor | None,  # [O]
    chosen: Tensor | None,  # [T, k] int64, no duplicates in a row: weights are 0 elsewhere. None: all patterns
    blocks: Tensor | None,  # [P, ceil(O / 128), ceil(I / 64)] bool: blocks of the patterns that count. None: all
    wide: bool,  # the output in the dtype of weights, not rounded to that of x
    backend: str,
) -> Tensor:  # [T, O]
    skip, patterns = _masked(blocks, patterns, backend)
    return _launcher(backend, x).pattern_route(
        dense_rows(x), weights.contiguous(), dense_rows(patterns), _dense(bias), _dense(chosen), *skip, wide
    )


@custom_op("dfn::pattern_route_backward")
def _backward_op(
    grad: Tensor,  # [T, O], in the dtype of x, or that of weights if the output was wide
    x: Tensor,
    weights: Tensor,
    patterns: Tensor,
    chosen: Tensor | None,
    blocks: Tensor | None,
    need_tokens: bool,  # wanted: the gradients of x and weights, which come from the same product
    need_patterns: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # for x, weights, patterns, bias; empty where not wanted
    skip, patterns = _masked(blocks, patterns, backend)
    grads = _launcher(backend, x).pattern_route_backward(
        dense_rows(grad), dense_rows(x), weights.contiguous(), dense_rows(patterns), _dense(chosen), *skip,
        need_tokens, need_patterns, need_bias,
    )  # fmt: skip
    if need_patterns and blocks is not None and not skip:
        grads[2].masked_fill_(spread_blocks(~blocks, patterns), 0)
    return grads


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(x, weights, patterns, bias, chosen, blocks, wide, backend):
    return x.new_empty(x.shape[0], patterns.shape[1], dtype=weights.dtype if wide else x.dtype)


@_backward_op.register_fake
def _(grad, x, weights, patterns, chosen, blocks, need_tokens, need_patterns, need_bias, backend):
    return (
        x.new_empty(x.shape if need_tokens else 0),
        weights.new_empty(weights.shape if need_tokens else 0),
        patterns.new_empty(patterns.shape if need_patterns else 0),
        weights.new_empty(patterns.shape[1] if need_bias else 0),
    )


# ---- backends: all have the same two functions ----------------------------------------------------------------------
def _launcher(backend: str, x: Tensor):
    if backend == "triton":
        from .triton import pattern_route

        return pattern_route
    if x.device.type == "cpu":
        return _native.cpu
    from .cuda import pattern_route as cuda

    return cuda


BLOCK = (128, 64)


def spread_blocks(blocks: Tensor, patterns: Tensor) -> Tensor:
    """The mask of blocks as one of entries, [P, O, I]."""
    _, O, I = patterns.shape
    return blocks.repeat_interleave(BLOCK[0], 1)[:, :O].repeat_interleave(BLOCK[1], 2)[:, :, :I]


def kept(blocks: Tensor, patterns: Tensor) -> Tensor:
    """The patterns, 0 in the blocks that do not count: not by a product, for 0 times infinity is NaN."""
    return patterns.where(spread_blocks(blocks, patterns), 0)


def _masked(blocks: Tensor | None, patterns: Tensor, backend: str) -> tuple[tuple, Tensor]:
    """What a launcher is told of the blocks: the C++ kernels skip them, the others get patterns that are 0 there."""
    if backend == "native" and patterns.device.type == "cpu":
        return (_dense(blocks),), patterns
    return (), patterns if blocks is None else kept(blocks, patterns)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---- autograd: shared by the registered op and the public Function --------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    x, weights, patterns, bias, chosen, blocks, _, ctx.backend = inputs
    ctx.save_for_backward(x, weights, patterns, chosen, blocks)


def _backward(ctx, grad):
    need_x, need_weights, need_patterns, need_bias = ctx.needs_input_grad[:4]
    flags = need_x or need_weights, need_patterns, need_bias
    grads = call(_backward_op, _BackwardFunction, grad, *ctx.saved_tensors, *flags, ctx.backend)
    wanted = (need_x, need_weights, need_patterns, need_bias)
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


class PatternRouteFunction(OpFunction):
    """The op as a torch.autograd.Function: the arguments of `torch.ops.dfn.pattern_route`, in its order.

    For code that composes Functions by hand; `pattern_route` checks, converts, and calls this or the registered op.
    """

    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- public ---------------------------------------------------------------------------------------------------------
def per_token(x: Tensor, weights: Tensor, real: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as [T, I] and the broadcast weights as [T, P], in `real`."""
    T, I = math.prod(x.shape[:-1]), x.shape[-1]
    P = weights.shape[-1]
    weights = weights.to(real)
    if weights.shape[:-1] != x.shape[:-1]:
        weights = weights.expand(*x.shape[:-1], P)
    return shaped(x, T, I), shaped(weights, T, P)


def largest(weights: Tensor, k: int) -> Tensor:
    """[T, P] -> [T, k]: the places of the k largest weights, ascending; among equals the lower place wins."""
    order = torch.sort(weights, dim=-1, descending=True, stable=True).indices
    return torch.sort(order[:, :k], dim=-1).values


def pattern_route(
    x: Tensor,
    weights: Tensor,
    patterns: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int | None = None,
    density: float | None = None,
    out_dtype: torch.dtype | None = None,
    return_share: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multiplies each token by its own mixture of P weight matrices, without ever building that matrix.

    ``y[t] = sum(w[t, p] * P[p] for p in range(P)) @ x[t] + bias``. A soft mixture of linear layers, as in FlowNetwork,
    CondConv, dynamic convolution or a soft mixture of experts. Nothing of size [T, O, I], [T, P, O] or [T, P * I]
    exists, forward or backward, but for pieces of at most 32 MiB; the time is that of a matrix product
    [T, P * I] x [P * I, O]. In half precision the weights multiply float32 sums and are never rounded into x; only the
    gradient of the patterns, a sum over tokens, takes products of weights and rows that are rounded once.

    Args:
        x: ``[..., I]``, float16, bfloat16, float32 or float64. Under autocast, x and patterns are cast to its dtype.
        weights: w, ``[..., P]``: any float dtype and any values, zero and negative ones too; need not sum to 1. Leading
            dimensions broadcast to those of x, so ``[B, 1, P]`` gives each sequence its own mixture.
        patterns: ``[P, O, I]``, in the dtype of x.
        bias: ``[O]``, any float dtype, added in float32 (float64 for float64 x).
        top_k: use only the k largest weights of each token, ties to the lower pattern, without renormalising. The
            others get no gradient.
        density: keep only about this share, in (0, 1], of each token's mixed connections ``F[t]``, those of the largest
            magnitude; the choice counts as constant in the backward pass. Exact per token, and slower than the dense
            product: see `route_density`; `BlockDensity` is the fast way to sparse patterns.
        out_dtype: dtype of the result, that of x without it. float32 for half-precision inputs skips the last rounding.
        return_share: also return the share of the connections that were active, a 0-d float32 tensor.

    Returns:
        ``[..., O]``, or ``(y, share)``.

    Gradients: x, weights, patterns, bias; sums run in float32 (float64 for float64) in a fixed order. A second
    derivative raises RuntimeError, except on the reference backend.

    Raises: ValueError (shapes, ranges, devices), TypeError (dtypes).

    Source: the layer of FlowNetwork, ``F_t = sum_p w_tp P_p``, ``y_t = F_t x_t``.

    >>> import torch
    >>> patterns = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])  # identity, swap
    >>> pattern_route(torch.tensor([[3.0, 5.0]]), torch.tensor([[0.75, 0.25]]), patterns)
    tensor([[3.5000, 4.5000]])
    """
    return route(x, weights, patterns, bias, top_k, density, out_dtype, return_share)


def route(x, weights, patterns, bias, top_k, density, out_dtype, return_share, blocks=None, blocks_share=1.0):
    """`pattern_route`, with the blocks of `BlockDensity`."""
    _check(x, weights, patterns, bias, top_k, density, out_dtype, return_share)
    device = x.device.type
    P, O, _ = patterns.shape
    lead = x.shape[:-1]
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, patterns.dtype):
        x, patterns = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, patterns))
    elif x.dtype != patterns.dtype:
        x, patterns = x.double(), patterns.double()
    out_dtype = out_dtype or x.dtype
    wide = out_dtype != x.dtype
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weights = per_token(x, weights, real)
    bias = None if bias is None else bias.to(real)

    chosen = None
    share = blocks_share
    if top_k is not None and top_k < P:
        chosen = largest(weights.detach(), top_k)
        weights = torch.zeros_like(weights).scatter(1, chosen, weights.gather(1, chosen))
        share = share * (top_k / P)
    if density is not None and density < 1:
        y, share = route_with_density(x, weights, patterns, bias, density)
    else:
        backend = _backends.choose(OP, device, x.device.index)
        if backend == "reference":
            if blocks is not None:
                patterns = kept(blocks, patterns)
            with torch.autocast(device, enabled=False):
                y = reference(x, weights, patterns, bias)
        else:
            y = call(_op, PatternRouteFunction, x, weights, patterns, bias, chosen, blocks, wide, backend)
    y = shaped(y.to(out_dtype), *lead, O)
    if not return_share:
        return y
    return y, share if isinstance(share, Tensor) else torch.full((), share, dtype=torch.float32, device=y.device)
