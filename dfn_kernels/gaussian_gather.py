"""Gaussian-weighted gather over given neighbours. Top to bottom: check, schema, fake, backends, autograd, public."""

from itertools import compress

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import (
    are_flags,
    compute_dtype,
    dense_rows,
    has_shape,
    is_float_tensor,
    is_index_tensor,
    is_number,
    same_device,
)
from ._transforms import OpFunction, call, custom_op, per_head
from .gather_plan import GatherPlan, fits, shared_heads, spatial_order, with_heads, without_heads
from .reference.gaussian_gather import gaussian_gather as reference

_backends.register("gaussian_gather", cuda=True)
OP = "gaussian_gather"
WANTED = {"positions": 1, "queries": 2, "values": 4, "sigma": 8, "influence": 16}  # gradients that are asked for


# ---- check ----------------------------------------------------------------------------------------------------------
def _check(positions, values, indices, sigma, influence, query_positions) -> None:
    for name, value in (("positions", positions), ("values", values)):
        is_float_tensor(OP, name, value)
    is_index_tensor(OP, "indices", indices)
    if values.ndim not in (2, 3, 4):
        raise ValueError(f"{OP}: values must have shape [N, c], [B, N, c] or [B, H, N, c], got {list(values.shape)}")
    lead = values.shape[:-2]
    letters = {0: "[", 1: "[B, ", 2: "[B, H, "}[len(lead)]
    if positions.ndim != values.ndim:
        raise ValueError(f"{OP}: positions must have shape {letters}N, D] like values, got {list(positions.shape)}")
    *lead, N, D = positions.shape
    has_shape(OP, "values", values, (*lead, N, values.shape[-1]), letters + "N, c]")
    if indices.ndim != values.ndim:
        raise ValueError(f"{OP}: indices must have shape {letters}M, k] like values, got {list(indices.shape)}")
    M, k = indices.shape[-2:]
    has_shape(OP, "indices", indices, (*lead, M, k), letters + "M, k]")
    if query_positions is not None:
        is_float_tensor(OP, "query_positions", query_positions)
        has_shape(OP, "query_positions", query_positions, (*lead, M, D), letters + "M, D]")
    elif M != N:
        raise ValueError(f"{OP}: indices must have one row per position, [.., N, k] with N = {N}, got {M} rows; "
                         "pass query_positions for another set of queries")  # fmt: skip
    if influence is not None:
        is_float_tensor(OP, "influence", influence)
        if tuple(influence.shape) != (*lead[:1], N):
            has_shape(OP, "influence", influence, (*lead, N), letters + "N]")
    same_device(OP, "values", values, positions=positions, indices=indices, influence=influence,
                query_positions=query_positions)  # fmt: skip
    if isinstance(sigma, Tensor):
        is_float_tensor(OP, "sigma", sigma)
        if sigma.ndim > 0:
            has_shape(OP, "sigma", sigma, lead[1:] or (1,), "[H]" if len(lead) == 2 else "[] or [1]")
        same_device(OP, "values", values, sigma=sigma)
    else:
        is_number(OP, "sigma", sigma)
        if not 0 < sigma < float("inf"):
            raise ValueError(f"{OP}: sigma must be positive and finite, got {sigma}")


# ---- schema: everything [B, H, ..], or all but sigma and the plan's without these; positions, queries, sigma and ---
# ---- influence in float32, or all in float64 ------------------------------------------------------------------------
@custom_op("dfn::gaussian_gather")
def _op(
    positions: Tensor,  # [B, H, N, D]; or [B, N, D] or [N, D], and so on
    queries: Tensor,  # [B, H, M, D]
    values: Tensor,  # [B, H, N, c]
    indices: Tensor,  # [B, H, M, k]; [B, 1, M, k] if the heads share them
    sigma: Tensor,  # [H]
    influence: Tensor | None,  # [B, H, N]
    normalize: bool,
    backend: str,
    sq_dists: Tensor | None = None,  # [B, H, M, k] |q - p|^2, if a search knows them; their gradient is the positions'
    query_order: Tensor | None = None,  # this and the next three: see GatherPlan
    entity_order: Tensor | None = None,
    starts: Tensor | None = None,
    edges: Tensor | None = None,
) -> Tensor:  # [B, H, M, c]
    launcher = _launcher(backend, values)
    tensors = positions, queries, values, indices, sigma, influence, sq_dists, query_order
    return without_heads(launcher.gaussian_gather(*_laid_out(launcher, *tensors), normalize), values.ndim)


@custom_op("dfn::gaussian_gather_backward")
def _backward_op(
    grad: Tensor,  # [B, H, M, c]
    positions: Tensor,
    queries: Tensor,
    values: Tensor,
    indices: Tensor,
    sigma: Tensor,
    influence: Tensor | None,
    normalize: bool,
    wanted: int,  # sum of the bits of WANTED
    backend: str,
    sq_dists: Tensor | None = None,
    query_order: Tensor | None = None,
    entity_order: Tensor | None = None,
    starts: Tensor | None = None,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # for positions, queries, values, sigma, influence; or empty
    launcher = _launcher(backend, values, backward=True)
    tensors = positions, queries, values, indices, sigma, influence, sq_dists, query_order, entity_order, starts, edges
    grad = dense_rows(grad if launcher is _native.cpu else with_heads(grad))
    grads = launcher.gaussian_gather_backward(grad, *_laid_out(launcher, *tensors), normalize, wanted)
    if launcher is _native.cpu:
        return grads
    p, q, v, s, w = grads
    p, q, v = (x if x.ndim == 1 else without_heads(x, values.ndim) for x in (p, q, v))
    return p, q, v, s, w if w.ndim == 1 else without_heads(w, values.ndim - 1)


# ---- fake -----------------------------------------------------------------------------------------------------------
def empty_rows(like: Tensor, B: int, H: int, n: int, c: int) -> Tensor:
    """[B, H, n, c], stored as [B, n, H, c]: what a model reshapes to [B, n, H*c] without a copy."""
    return like.new_empty(B, n, H, c).transpose(1, 2)


def _empty_like_values(values: Tensor, n: int) -> Tensor:
    *lead, _, c = values.shape
    return empty_rows(values, *lead, n, c) if len(lead) == 2 else values.new_empty(*lead, n, c)


@_op.register_fake
def _(positions, queries, values, indices, sigma, influence, normalize, backend, *reuse):
    return _empty_like_values(values, indices.shape[-2])


@_backward_op.register_fake
def _(grad, positions, queries, values, indices, sigma, influence, normalize, wanted, backend, *reuse):
    return (
        positions.new_empty(positions.shape if wanted & WANTED["positions"] else 0),
        queries.new_empty(queries.shape if wanted & WANTED["queries"] else 0),
        _empty_like_values(values, values.shape[-2]) if wanted & WANTED["values"] else values.new_empty(0),
        sigma.new_empty(sigma.shape if wanted & WANTED["sigma"] else 0),
        sigma.new_empty(influence.shape if influence is not None and wanted & WANTED["influence"] else 0),
    )


# ---- backends: all have the same two functions ----------------------------------------------------------------------
def _launcher(backend: str, like: Tensor, backward: bool = False):
    if backend == "triton":
        from .triton import gaussian_gather, gaussian_gather_backward

        return gaussian_gather_backward if backward else gaussian_gather
    if like.device.type == "cpu":
        return _native.cpu
    from .cuda import gaussian_gather as cuda

    return cuda


def _laid_out(launcher, positions, queries, values, indices, sigma, influence, sq_dists, *plan) -> tuple:
    """Dense, and [B, H, ..] except for the CPU's C++: there a view takes as long as a hundred edges. Indices that are
    expanded over the heads as [B, 1, M, k], so that they are prepared once."""
    if launcher is not _native.cpu:
        positions, queries, values, indices = map(with_heads, (positions, queries, values, indices))
        influence = None if influence is None else with_heads(influence, 3)
        sq_dists = None if sq_dists is None else with_heads(sq_dists)
    if values.ndim == 4 and shared_heads(indices):
        indices = indices[:, :1]
    return (
        positions.contiguous(),
        queries.contiguous(),
        dense_rows(values),
        indices.contiguous(),
        sigma.contiguous(),
        *(None if x is None else x.contiguous() for x in (influence, sq_dists, *plan)),
    )


# ---- autograd: shared by the registered ops and the public Function -------------------------------------------------
MOST_ROWS = 2**24  # numbers in the [m, k, c] of a piece, where the second derivative recomputes


def _setup_second(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.normalize, ctx.wanted = inputs[7:9]


def _second(ctx, *moves):
    """The op's second derivative. What the backward pass returns are the gradients of <grad, y>; along `moves`, the
    gradients to them, they add up to <grad, dy>, where dy is how y moves with its inputs. The reference says how, for
    pieces of the queries: nothing larger than a piece exists."""
    *tensors, sigma, influence = ctx.saved_tensors
    dims = tensors[3].ndim
    grad, positions, queries, values, indices = map(with_heads, tensors)
    real, (B, H, N, c) = positions.dtype, values.shape
    influence = positions.new_ones(B, H, N) if influence is None else with_heads(influence, 3)
    inputs = positions, queries, values.to(real), sigma, influence
    moving = [i for i, bit in enumerate(WANTED.values()) if ctx.wanted & bit and moves[i] is not None]
    if not moving:
        return (None,) * 15
    directions = tuple(moves[i].to(real).view_as(inputs[i]) for i in moving)
    (M, k), indices = indices.shape[2:], indices.expand(B, H, -1, -1)
    step = max(1, MOST_ROWS // max(1, B * H * k * max(c, 1)))
    grads_of_grad, grads = [], [torch.zeros_like(x) for x in inputs]
    for rows in (slice(m, m + step) for m in range(0, max(M, 1), step)):

        def y(*given: Tensor, rows: slice = rows) -> Tensor:
            p, q, v, s, w = given
            return reference(p, q[:, :, rows], v, indices[:, :, rows], s, w, ctx.normalize)

        def dy(*given: Tensor, y=y) -> Tensor:
            def moved(*some: Tensor) -> Tensor:
                every = list(given)
                for i, x in zip(moving, some, strict=True):
                    every[i] = x
                return y(*every)

            return torch.func.jvp(moved, tuple(given[i] for i in moving), directions)[1]

        out, pull = torch.func.vjp(dy, *inputs)
        grads_of_grad.append(out)
        for i, more in enumerate(pull(grad[:, :, rows].to(real))):
            grads[i] = grads[i] + more
    p, q, v, s, w = grads
    to_grad, p, q, v = (without_heads(x, dims) for x in (torch.cat(grads_of_grad, 2), p, q, v))
    given = to_grad.to(grad.dtype), p, q, v.to(values.dtype), None, s, without_heads(w, dims - 1)
    given = tuple(x if needed else None for x, needed in zip(given, ctx.needs_input_grad, strict=False))
    return *given, *(None,) * 8


_backward_op.register_autograd(_second, setup_context=_setup_second)


class _BackwardFunction(OpFunction):
    op = _backward_op
    setup_context = staticmethod(_setup_second)
    backward = staticmethod(_second)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.normalize, ctx.backend = inputs[:8]
    ctx.save_for_backward(*tensors, *inputs[8:])


def _backward(ctx, grad):
    needs = ctx.needs_input_grad
    asked = (*needs[:3], *needs[4:6])
    wanted = sum(compress(WANTED.values(), asked))
    saved = ctx.saved_tensors  # once: checkpointing lets a tensor be unpacked a single time
    options = ctx.normalize, wanted, ctx.backend
    grads = call(_backward_op, _BackwardFunction, grad, *saved[:6], *options, *saved[6:])
    grads = [x if needed else None for x, needed in zip(grads, asked, strict=True)]
    return *grads[:3], None, *grads[3:], *(None,) * 7


_op.register_autograd(_backward, setup_context=_setup_context)


class GaussianGatherFunction(OpFunction):
    """The op as a torch.autograd.Function: the arguments of `torch.ops.dfn.gaussian_gather`, in its order.

    For code that composes Functions by hand; `gaussian_gather` checks, converts, and calls this or the registered op.
    """

    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- without checks: what flow_attention calls, too -----------------------------------------------------------------
def gather(
    positions: Tensor, queries: Tensor, values: Tensor, plan: GatherPlan, sigma: float | Tensor,
    influence: Tensor | None, normalize: bool, sq_dists: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op on everything [B, H, ..], [B, ..] or neither. A plan without orders and lists is one of indices alone."""
    *lead, N, c = values.shape
    H = lead[1] if len(lead) == 2 else 1
    real, out_dtype = compute_dtype(positions, values, queries), values.dtype
    own = queries is positions
    positions = positions.to(real)
    queries = positions if own else queries.to(real)
    if influence is not None:
        influence = influence.to(real)
        if len(lead) == 2:
            influence = with_heads(influence, 3).expand(*lead, N)
    if isinstance(sigma, Tensor):
        sigma = sigma.to(real).expand(H)
    else:
        sigma = per_head(sigma, H, values, real)
    if real == torch.float64:
        values = values.double()

    backend = _backends.choose(OP, values.device.type)
    indices = plan.indices
    if backend == "reference":
        whole = map(with_heads, (positions, queries, values, indices))
        influence = None if influence is None else with_heads(influence, 3)
        return without_heads(reference(*whole, sigma, influence, normalize), values.ndim).to(out_dtype)
    reuse = plan[1:5] if plan.backend == backend else (None,) * 4
    # Once, for the forward and the backward pass. Triton's is a sort: only beside a search, which costs more than that.
    if reuse[0] is None and (backend == "native" or sq_dists is not None):
        row_bytes = c * values.itemsize
        query_order = spatial_order(queries, indices, row_bytes, backend)
        later = own or values.device.type == "cpu" or not torch.is_grad_enabled()  # the CPU's backward pass sees to it
        entity_order = None if later else spatial_order(positions, indices, row_bytes, backend)
        reuse = query_order, query_order if own else entity_order, None, None
    if sq_dists is not None:
        sq_dists = sq_dists.detach() if sq_dists.dtype == real else None
    if len(lead) == 2 and shared_heads(indices):
        indices = indices[:, :1]
    arguments = positions, queries, values, indices, sigma, influence, normalize, backend, sq_dists, *reuse
    return call(_op, GaussianGatherFunction, *arguments).to(out_dtype)


# ---- public ---------------------------------------------------------------------------------------------------------
def gaussian_gather(
    positions: Tensor,
    values: Tensor,
    indices: Tensor | GatherPlan,
    sigma: float | Tensor,
    *,
    influence: Tensor | None = None,
    query_positions: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Sums the values of given neighbours, weighted by a Gaussian of their distance.

    ``y[i] = sum(w[j] * exp(-|q[i] - p[j]|^2 / (2 * sigma^2)) * v[j] for j in indices[i])``, where q is
    ``query_positions``, or ``positions`` without it. With ``normalize`` the sum is divided by the sum of its weights,
    computed relative to the nearest neighbour, so that distant ones do not underflow; where the weights sum to 0, the
    output is 0. No [M, k, c] tensor exists, forward or backward: memory is O(M (c + k)).

    Args:
        positions: p, ``[N, D]``, ``[B, N, D]`` or, with heads, ``[B, H, N, D]``. float16, bfloat16, float32 or float64.
        values: v, ``[.., N, c]``, leading dims as in positions. Under autocast they are cast to its dtype.
        indices: int64 ``[.., M, k]``, as `knn` returns them. -1 is padding. Another index outside [0, N) raises
            IndexError on the CPU and counts as padding on a GPU. Or what `gather_plan` made of them, for several calls.
        sigma: width of the Gaussian: a positive float, a 0-d tensor, or one per head, ``[H]``. A tensor's sign is not
            checked. Of any size: beyond what squares hold it behaves as its limit (docs/numerics.md).
        influence: w, ``[B, N]`` (shared by the heads) or ``[B, H, N]``; 1 without it. May be 0 or negative.
        query_positions: q, ``[.., M, D]``. Without it M = N and entity i is query i.
        normalize: divide by the sum of the weights.

    Returns:
        ``[.., M, c]`` in values' dtype; sums run in float32, or float64 if positions or values are float64.
        With heads it is stored as ``[B, M, H, c]``, so ``y.transpose(1, 2).flatten(2)`` costs nothing.

    Gradients: positions, query_positions, values, influence and sigma, if a tensor. The backward pass walks a
    transposed neighbour list in fixed order: the same bits in every run. Second derivatives recompute by the reference
    backend, piece by piece: for forces and their like, in some ten times the time of a backward pass.

    Raises: ValueError (shapes, range of sigma, devices), TypeError (dtypes), IndexError.

    Source: the message of a Dynamic Flow Network layer, ``y_i = sum_{j in N_k(i)} w_j g(|p_i - p_j|) W_v s_j``.

    >>> import torch
    >>> p, v = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    >>> gaussian_gather(p, v, torch.tensor([[0, 1], [1, -1]]), sigma=1.0)  # 1 + 2 exp(-1/2), 2
    tensor([[2.2131],
            [2.0000]])
    """
    plan = indices if isinstance(indices, GatherPlan) else GatherPlan(indices)
    are_flags(OP, normalize=normalize)
    _check(positions, values, plan.indices, sigma, influence, query_positions)
    fits(OP, plan, values.shape[-2])
    device = values.device.type
    if torch.is_autocast_enabled(device) and values.dtype != torch.float64:
        values = values.to(torch.get_autocast_dtype(device))
    queries = positions if query_positions is None else query_positions
    return gather(positions, queries, values, plan, sigma, influence, normalize)
