"""Exact k nearest neighbours. Read from top to bottom: check, schema, fake, backends, autograd, public."""

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, _native
from ._checks import (
    are_flags,
    compute_dtype,
    has_shape,
    is_float_tensor,
    is_index_tensor,
    is_integer,
    same_device,
    shaped,
)
from ._transforms import OpFunction, call, custom_op, on_its_device
from .packed import check_offset_values, check_sets
from .reference.knn import knn as reference

_backends.register("knn")
OP = "knn"
MOST_NEIGHBORS = 1024


class Neighbors(NamedTuple):
    indices: Tensor  # int64 [.., M, k], -1 where there is none
    sq_dists: Tensor  # [.., M, k], inf where there is none


# ---- check ----------------------------------------------------------------------------------------------------------
def _check(
    positions, k, queries, causal, include_self, lengths, query_lengths, warm=None, ptr=None, query_ptr=None
) -> None:
    is_float_tensor(OP, "positions", positions)
    if positions.ndim < 2:
        raise ValueError(f"{OP}: positions must have shape [.., N, D], got {list(positions.shape)}")
    *lead, N, D = positions.shape
    if D < 1:
        raise ValueError(f"{OP}: positions must have at least one dimension, [.., N, D] with D > 0, got D = {D}")
    if N >= 2**31:
        raise ValueError(f"{OP}: positions must be fewer than 2^31, got N = {N}")
    is_integer(OP, "k", k, 1, MOST_NEIGHBORS)
    M = N
    if queries is not None:
        is_float_tensor(OP, "queries", queries)
        if queries.ndim != positions.ndim:
            raise ValueError(f"{OP}: queries must have shape [.., M, D] like positions, got {list(queries.shape)}")
        M = queries.shape[-2]
        has_shape(OP, "queries", queries, (*lead, M, D), "[.., M, D]")
        if causal:
            raise ValueError(f"{OP}: causal must be False with queries: they have no place in the order of positions")
        if not include_self:
            raise ValueError(f"{OP}: include_self must be True with queries: no position is a query's self")
    elif query_lengths is not None:
        raise ValueError(f"{OP}: query_lengths must be None without queries: lengths counts both")
    for name, value in (("lengths", lengths), ("query_lengths", query_lengths)):
        if value is not None:
            is_index_tensor(OP, name, value)
            has_shape(OP, name, value, tuple(lead), "[..]")
    if warm is not None:
        is_index_tensor(OP, "warm.indices", warm)
        has_shape(OP, "warm.indices", warm, (*lead, M, k), "[.., M, k]")
    check_sets(OP, ptr, query_ptr, queries, lengths=lengths, query_lengths=query_lengths)
    same_device(OP, "positions", positions, queries=queries, lengths=lengths, query_lengths=query_lengths, warm=warm,
                ptr=ptr)  # fmt: skip


def _check_values(points, queries, lengths, query_lengths) -> None:
    """What only the values tell. CPU only: on a GPU it would wait for the device."""
    for name, x, count in (("positions", points, lengths), ("queries", queries, query_lengths)):
        if x is None:
            continue
        n = x.shape[1]
        length_name = "lengths" if name == "positions" else "query_lengths"
        if count is not None and ((count < 0) | (count > n)).any():
            raise ValueError(f"{OP}: {length_name} must be between 0 and {n}, got {count.tolist()}")
        # One pass without memory. Finite values may overflow the sum, so this is not the verdict.
        if math.isfinite(x.sum().item()):
            continue
        bad = ~x.isfinite().all(-1)
        if count is not None:
            bad &= torch.arange(n) < count.view(-1, 1)
        if bad.any():
            b, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{OP}: {name} must be finite, got {x[b, i].tolist()} in row {i} of batch {b}; "
                "check=False searches without such points"
            )


# ---- schema: everything [B, ...], points and queries both float32 or both float64 ------------------------------------
@custom_op("dfn::knn")
def _op(
    points: Tensor,  # [B, N, D]
    queries: Tensor | None,  # [B, M, D]
    lengths: Tensor | None,  # [B]
    query_lengths: Tensor | None,  # [B]
    k: int,
    causal: bool,
    include_self: bool,
    check: bool,
    warm: Tensor | None,  # [B, M, k]
    index: int,  # 0, or the number by which the backend knows these points' grid or trees
    backend: str,
    ptr: Tensor | None = None,  # [S + 1], of the points; without it lengths count
    query_ptr: Tensor | None = None,  # [S + 1], of the queries
    within: float | None = None,  # only distances below count
    absolute: bool = False,  # sums of absolute differences instead of squares
) -> tuple[Tensor, Tensor]:  # squared distances [B, M, k], indices [B, M, k]: floats first, as opcheck needs it
    points, queries, lengths, query_lengths, ptr, query_ptr = (
        None if x is None else x.contiguous() for x in (points, queries, lengths, query_lengths, ptr, query_ptr)
    )
    if points.device.type == "cpu":
        check_offset_values(OP, "ptr", ptr, points.shape[1])
        check_offset_values(OP, "query_ptr", query_ptr, 0 if queries is None else queries.shape[1])
        if check:
            _check_values(points, queries, lengths, query_lengths)
    arguments = points, queries, lengths, query_lengths, k, causal, include_self
    if backend == "reference" or absolute and backend != "native":
        indices, sq_dists = reference(*arguments, ptr, query_ptr, absolute)
    elif backend == "triton" and ptr is not None:
        from .triton.knn import brute

        indices, sq_dists = brute.search(*arguments, ptr, query_ptr)
    elif backend == "triton":
        from .triton.knn import knn as triton_knn

        indices, sq_dists = triton_knn(*arguments, None if warm is None else warm.contiguous(), index)
    else:
        indices, sq_dists = _native.cpu.knn(*arguments, index, ptr, query_ptr, within, absolute)
        within = None  # heeded by the search
    if within is not None:
        near = sq_dists < within
        indices, sq_dists = indices.where(near, -1), sq_dists.where(near, torch.inf)
    return sq_dists, indices


@custom_op("dfn::knn_backward")
def _backward_op(
    grad: Tensor,  # [B, M, k]
    points: Tensor,
    queries: Tensor | None,
    indices: Tensor,  # [B, M, k]
    absolute: bool,
    of_points: bool,
    of_queries: bool,
) -> tuple[Tensor, Tensor]:  # for points and queries; empty where not wanted, or where the points are the queries
    queries = None if queries is None else queries.contiguous()
    arguments = grad, points.contiguous(), queries, indices.contiguous(), absolute, of_points, of_queries
    return _native.cpu.knn_backward(*arguments)


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(points, queries, lengths, query_lengths, k, causal, include_self, check, warm, index, backend, *sets):
    shape = (points.shape[0], (points if queries is None else queries).shape[1], k)
    return points.new_empty(shape), points.new_empty(shape, dtype=torch.int64)


@_backward_op.register_fake
def _(grad, points, queries, indices, absolute, of_points, of_queries):
    return (
        points.new_empty(points.shape if of_points else 0),
        points.new_empty(queries.shape if of_queries else 0),
    )


# ---- autograd: shared by the registered op and the public Function --------------------------------------------------
class _BackwardFunction(OpFunction):
    op = _backward_op


def _setup_context(ctx, inputs, output) -> None:
    points, queries = inputs[:2]
    ctx.backend, ctx.absolute = inputs[10], len(inputs) > 14 and inputs[14]
    ctx.save_for_backward(points, queries, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nobody needs zeros for the indices


def _backward(ctx, grad, _):
    points, queries, indices = ctx.saved_tensors
    nothing = (None,) * 13
    of_points, of_queries = ctx.needs_input_grad[:2]
    if grad is None or points.shape[1] == 0:
        return (None, None, *nothing)
    if ctx.backend != "native" or torch.is_grad_enabled():  # a derivative of this one may be wanted
        return (*_gradient(grad, points, queries, indices, ctx.absolute), *nothing)
    arguments = grad, points, queries, indices, ctx.absolute, of_points, of_queries
    to_points, to_queries = call(_backward_op, _BackwardFunction, *arguments)
    return (to_points if of_points else None, to_queries if of_queries else None, *nothing)


def _gradient(grad, points, queries, indices, absolute) -> tuple[Tensor, Tensor | None]:
    """d |q - p|^2 = 2 (p - q) (dp - dq), in differentiable operations: the second derivative is right, too.

    Of absolute differences sign(p - q) (dp - dq), 0 where they are equal.
    """
    own = queries is None
    B, N, D = points.shape
    M, k = indices.shape[1:]
    missing = (indices < 0).unsqueeze(-1)
    flat = indices.clamp(min=0)
    if B > 1:
        flat = flat + torch.arange(0, B * N, N, device=points.device).view(B, 1, 1)
    flat = flat.flatten()
    neighbors = points.reshape(B * N, D).index_select(0, flat).view(B, M, k, D)
    away = (neighbors - (points if own else queries).unsqueeze(2)).masked_fill(missing, 0)
    slope = away.sign() if absolute else 2 * away
    push = grad.unsqueeze(-1).masked_fill(missing, 0) * slope  # [B, M, k, D]
    to_queries = -push.sum(2)
    to_points = to_queries if own else torch.zeros_like(points)
    # Not index_add: that takes eight times as long on the CPU, and on a GPU it adds in any order.
    to_points = to_points.reshape(B * N, D).index_put((flat,), push.reshape(-1, D), accumulate=True).view(B, N, D)
    return to_points, None if own else to_queries


_op.register_autograd(_backward, setup_context=_setup_context)


class KnnFunction(OpFunction):
    """The op as a torch.autograd.Function: the arguments of `torch.ops.dfn.knn`, in its order,
    and its outputs: squared distances, indices.

    For code that composes Functions by hand; `knn` checks, converts, and calls this or the registered op.
    """

    op = _op
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# ---- public ---------------------------------------------------------------------------------------------------------
def knn(
    positions: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    causal: bool = False,
    include_self: bool = True,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    ptr: Tensor | None = None,
    query_ptr: Tensor | None = None,
    check: bool = True,
) -> Neighbors:
    """Finds the k nearest positions of every query, exactly.

    ``indices[i] = the k smallest j by (|q[i] - p[j]|^2, j)``, where q is ``queries``, or ``positions`` without it. The
    order is total and the same on every backend, to the bit: squared distances are sums over the dimensions in order,
    ``((dx*dx) + dy*dy) + dz*dz``, rounded after every operation, and equal ones are ordered by index.

    Args:
        positions: p, ``[.., N, D]``. float16, bfloat16 and float32 are searched in float32, float64 in float64.
        k: 1 to 1024. Fewer than k candidates are no error: rows are padded.
        queries: q, ``[.., M, D]``, leading dims as in positions.
        causal: entity i sees only ``j <= i`` (``j < i`` without self).
        include_self: whether entity i may find itself. Excluded by its index, never by its distance; where it is
            allowed, positions at the same place and with a lower index come first and may displace it.
        lengths: int64 ``[..]``: positions from there on are padding; without queries their rows are padded, too.
        query_lengths: int64 ``[..]``: the same for queries.
        ptr: int64 ``[S + 1]``, instead of lengths: offsets of S sets that lie one after another along N, ascending
            from 0 to N, empty ones included. Nobody sees another set; indices count along N; ``causal`` means
            earlier ones of the set. Leading dims share it. Memory is linear in N + M whatever the sizes.
        query_ptr: int64 ``[S + 1]``: the same for queries, which are given with it.
        check: on the CPU, raise ValueError if a position or query is NaN or infinite, or a length out of range.
            Without the check, and always on a GPU, such points are nobody's neighbours and their own rows are padded.
            Offsets are always checked on the CPU, and never on a GPU.

    Returns:
        ``Neighbors(indices, sq_dists)``: int64 and float32 (float64 for float64 positions), both ``[.., M, k]``,
        ascending by (distance, index). Where there is no neighbour, or its squared distance overflows to infinity, the
        index is -1 and the distance inf.

    Gradients: ``sq_dists``, to positions and queries, twice if need be; a missing neighbour contributes 0.

    Raises: ValueError (shapes, k, causal or include_self=False with queries, values), TypeError (dtypes).

    >>> import torch
    >>> knn(torch.tensor([[0.0], [1.0], [5.0]]), 2)
    Neighbors(indices=tensor([[0, 1],
            [1, 0],
            [2, 1]]), sq_dists=tensor([[ 0.,  1.],
            [ 0.,  1.],
            [ 0., 16.]]))
    """
    are_flags(OP, causal=causal, include_self=include_self, check=check)
    _check(positions, k, queries, causal, include_self, lengths, query_lengths, None, ptr, query_ptr)
    return _search(
        positions, k, queries, causal, include_self, lengths, query_lengths, check, None, ptr=ptr, query_ptr=query_ptr
    )


def _search(
    positions, k, queries, causal, include_self, lengths, query_lengths, check, warm, grids=None, ptr=None,
    query_ptr=None, within=None, absolute=False,
) -> Neighbors:  # fmt: skip
    backend = _backends.choose(OP, positions.device.type)
    real = compute_dtype(positions, queries)
    *lead, N, D = positions.shape
    M = N if queries is None else queries.shape[-2]
    B = math.prod(positions.shape[:-2])
    sq_dists, indices = call(
        _op, KnnFunction,
        shaped(positions.to(real), B, N, D),
        None if queries is None else shaped(queries.to(real), B, M, D),
        None if lengths is None else shaped(lengths, B),
        None if query_lengths is None else shaped(query_lengths, B),
        k, bool(causal), bool(include_self), bool(check),
        None if warm is None else warm.reshape(B, M, k),
        (grids or {}).get(backend, 0),
        backend, ptr, query_ptr, within, absolute,
    )  # fmt: skip
    return Neighbors(shaped(indices, *lead, M, k), shaped(sq_dists, *lead, M, k))


class KNNIndex:
    """Positions to be searched more than once: ``KNNIndex(positions, lengths, ptr).query(k)``.

    Arguments and results are those of `knn`. The positions are sorted once, here, for any k; the first causal query
    sorts prefixes, too, for all that follow. The positions must not be changed in place while the index is in use.
    """

    def __init__(self, positions: Tensor, lengths: Tensor | None = None, ptr: Tensor | None = None):
        _check(positions, 1, None, False, True, lengths, None, None, ptr)
        check_offset_values(OP, "ptr", ptr, positions.shape[-2])
        self.positions = positions.to(compute_dtype(positions)).contiguous()
        self.lengths, self.ptr = lengths, None if ptr is None else ptr.contiguous()
        self._grids: dict[str, int] = {}  # backend: the number of the grid or trees it has built
        B, (N, D) = math.prod(positions.shape[:-2]), positions.shape[-2:]
        points = self.positions.detach().view(B, N, D)
        counts = None if lengths is None else lengths.reshape(B).contiguous()
        device = positions.device.type
        if device == "cpu" and _backends.missing(OP, "native", "cpu") is None:
            self._grids["native"] = _native.cpu.knn_index(points, counts, self.ptr)
            weakref.finalize(self, _native.cpu.knn_forget, self._grids["native"])
        if ptr is None and _backends.missing(OP, "triton", device) is None:
            from .triton.knn import forget, index

            self._grids["triton"] = on_its_device(index)(points, counts)
            weakref.finalize(self, forget, self._grids["triton"])

    def query(
        self,
        k: int,
        queries: Tensor | None = None,
        *,
        causal: bool = False,
        include_self: bool = True,
        query_ptr: Tensor | None = None,
        warm: Neighbors | None = None,
    ) -> Neighbors:
        """The k nearest positions of every query (of every position without queries), as `knn` gives them.

        `warm`: the neighbours found before for the same queries and k, for instance before the positions moved a
        little. On a GPU their new distances bound the search; the CPU's search finds a bound sooner than it could
        compute theirs, and does not look at them. The result is the same with any `warm`, right or wrong.
        """
        found = None if warm is None else warm.indices
        are_flags(OP, causal=causal, include_self=include_self)
        _check(self.positions, k, queries, causal, include_self, self.lengths, None, found, self.ptr, query_ptr)
        grids = self._grids if queries is None or queries.dtype != torch.float64 else None  # sorted in float32, perhaps
        return _search(
            self.positions,
            k,
            queries,
            causal,
            include_self,
            self.lengths,
            None,
            True,
            found,
            grids,
            self.ptr,
            query_ptr,
        )

    def __repr__(self) -> str:
        return f"KNNIndex(positions={list(self.positions.shape)}, {self.positions.dtype}, {self.positions.device})"
