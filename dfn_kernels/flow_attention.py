"""Drift, search and gather in one call. Read from top to bottom: check, parts, public."""

import torch
from torch import Tensor

from . import _backends
from ._checks import (
    are_flags,
    compute_dtype,
    has_shape,
    is_float_tensor,
    is_index_tensor,
    is_integer,
    is_number,
    same_device,
)
from ._transforms import per_head
from .flow_drift import Drift, drift_heads
from .gather_plan import GatherPlan
from .gaussian_gather import gather
from .knn import MOST_NEIGHBORS, Neighbors
from .knn import _search as search
from .packed import check_offset_values, check_sets
from .reference.flow_attention import flow_attention as reference

_backends.register("flow_attention")
OP = "flow_attention"


# ---- check ----------------------------------------------------------------------------------------------------------
def _check(
    states, positions, flow_weight, values, sigma, k, flow_bias, alpha, query_weight, query_bias, influence, lengths,
    extra_positions, extra_values, extra_influence, warm, ptr,
) -> None:  # fmt: skip
    required = {"states": states, "positions": positions, "flow_weight": flow_weight, "values": values}
    optional = {
        "flow_bias": flow_bias, "query_weight": query_weight, "query_bias": query_bias, "influence": influence,
        "extra_positions": extra_positions, "extra_values": extra_values, "extra_influence": extra_influence,
    }  # fmt: skip
    for name, value in {**required, **{n: x for n, x in optional.items() if x is not None}}.items():
        is_float_tensor(OP, name, value)
    if states.ndim not in (2, 3):
        raise ValueError(f"{OP}: states must have shape [N, d] or [B, N, d], got {list(states.shape)}")
    if flow_weight.ndim not in (2, 3):
        raise ValueError(f"{OP}: flow_weight must have shape [D, d] or [H, D, d], got {list(flow_weight.shape)}")
    *lead, N, d = states.shape
    heads, D = flow_weight.shape[:-2], positions.shape[-1] if positions.ndim else 0
    before, head = "[B, " if lead else "[", "H, " if heads else ""

    def per_entity(name: str, x: Tensor, n: int, letter: str, after: tuple, last: str) -> None:
        """[B, H, n, ..], or [B, n, ..] for all heads."""
        if not heads or x.ndim != len(lead) + 1 + len(after):
            has_shape(OP, name, x, (*lead, *heads, n, *after), f"{before}{head}{letter}{last}]")
        else:
            has_shape(OP, name, x, (*lead, n, *after), f"{before}{letter}{last}]")

    def per_head(name: str, x: object, number: bool) -> None:
        if isinstance(x, Tensor):
            is_float_tensor(OP, name, x)
            if x.ndim > 0:
                has_shape(OP, name, x, tuple(heads) or (1,), "[H]" if heads else "[] or [1]")
            same_device(OP, "states", states, **{name: x})
        elif number:
            is_number(OP, name, x)

    per_entity("positions", positions, N, "N", (D,), ", D")
    has_shape(OP, "flow_weight", flow_weight, (*heads, D, d), f"[{head}D, d]")
    c = values.shape[-1] if values.ndim else 0
    has_shape(OP, "values", values, (*lead, *heads, N, c), f"{before}{head}N, c]")
    if query_weight is not None:
        has_shape(OP, "query_weight", query_weight, (*heads, D, d), f"[{head}D, d]")
    for name, bias in (("flow_bias", flow_bias), ("query_bias", query_bias)):
        if bias is not None:
            has_shape(OP, name, bias, (*heads, D), f"[{head}D]")
    if influence is not None:
        per_entity("influence", influence, N, "N", (), "")
    if (extra_positions is None) != (extra_values is None):
        given, missing = ("extra_values", "extra_positions")[:: 1 if extra_positions is None else -1]
        raise ValueError(f"{OP}: {missing} must be given together with {given}, got None")
    if extra_positions is not None:
        E = extra_positions.shape[-2] if extra_positions.ndim > 1 else 0
        per_entity("extra_positions", extra_positions, E, "E", (D,), ", D")
        per_entity("extra_values", extra_values, E, "E", (c,), ", c")
        if extra_influence is not None:
            per_entity("extra_influence", extra_influence, E, "E", (), "")
    elif extra_influence is not None:
        raise ValueError(f"{OP}: extra_influence must be None without extra_positions")
    is_integer(OP, "k", k, 1, MOST_NEIGHBORS)
    per_head("alpha", alpha, True)
    per_head("sigma", sigma, True)
    if not isinstance(sigma, Tensor) and not 0 < sigma < float("inf"):
        raise ValueError(f"{OP}: sigma must be positive and finite, got {sigma}")
    if lengths is not None:
        is_index_tensor(OP, "lengths", lengths)
        has_shape(OP, "lengths", lengths, tuple(lead), "[B]" if lead else "[]")
    if warm is not None:
        if not isinstance(warm, tuple) or len(warm) != 2:
            raise TypeError(f"{OP}: warm must be Neighbors, got {type(warm).__name__}")
        is_index_tensor(OP, "warm.indices", warm[0])
        has_shape(OP, "warm.indices", warm[0], (*lead, *heads, N, k), f"{before}{head}N, k]")
        optional["warm"] = warm[0]
    check_sets(OP, ptr, None, None, lengths=lengths)
    same_device(OP, "states", states, positions=positions, flow_weight=flow_weight, values=values, lengths=lengths,
                ptr=ptr, **optional)  # fmt: skip


# ---- parts: everything [B, H, ..] -----------------------------------------------------------------------------------
def _drift(states, positions, weight, bias, alpha, query_weight, query_bias) -> tuple[Drift, Tensor | None]:
    """The drift, and where the receiving side stands if that is somewhere else. One pass over the states."""
    if query_weight is None:
        drift = drift_heads(states, positions, weight, bias, alpha)
        return drift, None if query_bias is None else drift.positions + query_bias[:, None]
    H = weight.shape[0]
    both = drift_heads(
        states, torch.cat([positions, positions], 1), torch.cat([weight, weight + query_weight]),
        None if bias is None else torch.cat([bias, bias]), torch.cat([alpha, alpha]),
    )  # fmt: skip
    queries = both.positions[:, H:]
    return Drift(*(x[:, :H] for x in both)), queries if query_bias is None else queries + query_bias[:, None]


def _search(points, queries, extra, k, causal, include_self, lengths, warm, ptr) -> Neighbors:
    """Query i belongs to entity i, so causal and include_self have a meaning for queries, too."""
    B, H, N, _ = points.shape
    rows = None if lengths is None else lengths.unsqueeze(1).expand(B, H)
    of_queries = None if queries is None else rows
    of_sets = None if queries is None else ptr
    found = search(points, k, queries, causal, include_self, rows, of_queries, True, warm, ptr=ptr, query_ptr=of_sets)
    if extra is None:
        return found
    # Extra entities have the higher indices, and the sort is stable: ties stay in the order of indices.
    asking = points if queries is None else queries
    more = search(extra, k, asking, False, True, None, rows, True, None)
    indices = torch.cat([found.indices, more.indices.where(more.indices < 0, more.indices + N)], -1)
    sq_dists, order = torch.cat([found.sq_dists, more.sq_dists], -1).sort(dim=-1, stable=True)
    return Neighbors(indices.gather(-1, order[..., :k]), sq_dists[..., :k])


def _with_extra(x: Tensor | None, extra: Tensor | None, like: Tensor, more: Tensor) -> Tensor | None:
    """Influence of own and extra entities; None where neither has one."""
    if x is None and extra is None:
        return None
    x = like.new_ones(like.shape[:3]) if x is None else x
    return torch.cat([x, more.new_ones(more.shape[:3]) if extra is None else extra], 2)


# ---- public ---------------------------------------------------------------------------------------------------------
def flow_attention(
    states: Tensor,
    positions: Tensor,
    flow_weight: Tensor,
    values: Tensor,
    sigma: float | Tensor,
    k: int,
    *,
    flow_bias: Tensor | None = None,
    alpha: float | Tensor = 0.1,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    influence: Tensor | None = None,
    causal: bool = False,
    include_self: bool = True,
    lengths: Tensor | None = None,
    normalize: bool = False,
    extra_positions: Tensor | None = None,
    extra_values: Tensor | None = None,
    extra_influence: Tensor | None = None,
    warm: Neighbors | None = None,
    ptr: Tensor | None = None,
) -> tuple[Tensor, Drift, Neighbors]:
    """Dynamic Flow Attention: entities drift, find their nearest neighbours, and gather what those have to say.

    ``flow = flow_weight @ states + flow_bias``, ``p' = positions + alpha * flow``,
    ``context[i] = sum(w[j] * exp(-|q[i] - p'[j]|^2 / (2 * sigma^2)) * values[j] for j in N_k(i))``, where N_k(i) are
    the k entities nearest to q[i], as `knn` orders them. The receiving side may stand elsewhere,
    ``q = p' + alpha * (query_weight @ states) + query_bias``; without those two q is p'. See `flow_drift`, `knn` and
    `gaussian_gather` for the parts.

    Args:
        states: ``[N, d]`` or ``[B, N, d]``.
        positions: ``[(B,) N, D]`` or, with heads, ``[(B,) H, N, D]``; without H they are shared by the heads.
        flow_weight: ``[D, d]`` or ``[H, D, d]``; this says whether there are heads.
        values: ``[(B,) (H,) N, c]``.
        sigma: a positive number, a 0-d tensor, or one per head, ``[H]``.
        k: 1 to 1024 neighbours.
        flow_bias, query_bias: ``[D]`` or ``[H, D]``.
        alpha: step length: a number, a 0-d tensor, or ``[H]``.
        query_weight: like flow_weight.
        influence: w, ``[(B,) N]`` or ``[(B,) H, N]``; 1 without it.
        causal: entity i sees entities ``j <= i`` only (``j < i`` without self).
        include_self: whether an entity may be its own neighbour.
        lengths: int64 ``[B]``: entities from there on are padding: nobody sees them, and their context is 0.
        normalize: divide by the sum of the weights.
        extra_positions, extra_values, extra_influence: E more entities (a memory), ``[(B,) (H,) E, ..]``. They do not
            drift, are visible to every query, also when causal, and have the indices N..N+E-1.
        warm: the neighbours of an earlier call: they may bound the search (`KNNIndex.query` says where), and never
            change the result.
        ptr: int64 ``[S + 1]``, instead of lengths: offsets of S sets that lie one after another along N, ascending
            from 0 to N, as for `knn`: an entity sees its own set only, and the extra entities.

    Returns:
        ``(context, Drift(positions, flow, energy), Neighbors(indices, sq_dists))``: context ``[(B,) (H,) N, c]`` in
        values' dtype, the others as in `flow_drift` and `knn`.

    Gradients: all float tensors, from all outputs; indices are constant. No output i depends on an input j > i if
    causal.

    Raises: ValueError (shapes, k, sigma, positions that are not finite on the CPU), TypeError (dtypes).

    Source: Dynamic Flow Networks, ``f_i = W_f s_i``, ``p_i' = p_i + alpha f_i``,
    ``y_i = sum_{j in N_k(i)} w_j g(|p_i' - p_j'|) W_v s_j``.

    >>> import torch
    >>> s, p = torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [1.0]])
    >>> context, drift, found = flow_attention(s, p, torch.ones(1, 1), s, sigma=1.0, k=1)
    >>> drift.positions.tolist(), found.indices.tolist(), context.tolist()
    ([[0.0], [2.0]], [[0], [1]], [[0.0], [10.0]])
    """
    are_flags(OP, causal=causal, include_self=include_self, normalize=normalize)
    _check(states, positions, flow_weight, values, sigma, k, flow_bias, alpha, query_weight, query_bias, influence,
           lengths, extra_positions, extra_values, extra_influence, warm, ptr)  # fmt: skip
    device = states.device.type
    if torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        states, values = (x if x.dtype == torch.float64 else x.to(to) for x in (states, values))
    real = compute_dtype(states, positions)
    heads = flow_weight.ndim == 3
    batched = states.ndim == 3
    if not batched:
        states = states[None]
    B, N, _ = states.shape
    H = flow_weight.shape[0] if heads else 1

    def as_bhn(x: Tensor | None, after: int) -> Tensor | None:
        if x is None:
            return None
        x = x if batched else x[None]
        if x.ndim < 3 + after:
            x = x.unsqueeze(1)
        return x.expand(B, H, *x.shape[2:])

    def as_h(x: float | Tensor | None, after: int) -> Tensor | None:
        if x is None:
            return None
        if not isinstance(x, Tensor):
            return per_head(x, H, states, real)
        x = x.to(real)
        return x.expand(H) if after == 0 else x if heads else x[None]

    positions, values = as_bhn(positions.to(real), 1), as_bhn(values, 1)
    influence, extra_influence = as_bhn(influence, 0), as_bhn(extra_influence, 0)
    extra_positions, extra_values = as_bhn(extra_positions, 1), as_bhn(extra_values, 1)
    if extra_positions is not None:
        extra_positions, extra_values = extra_positions.to(real), extra_values.to(values.dtype)
    flow_weight, query_weight = as_h(flow_weight, 2), as_h(query_weight, 2)
    flow_bias, query_bias = as_h(flow_bias, 1), as_h(query_bias, 1)
    alpha, sigma = as_h(alpha, 0), as_h(sigma, 0)
    if lengths is not None and not batched:
        lengths = lengths[None]

    if _backends.choose(OP, device) == "reference":
        check_offset_values(OP, "ptr", ptr, N)
        wide = compute_dtype(positions, values)
        context, *found = reference(
            states, positions.to(wide), flow_weight.to(wide), values, sigma.to(wide), k,
            None if flow_bias is None else flow_bias.to(wide), alpha.to(wide),
            None if query_weight is None else query_weight.to(wide),
            None if query_bias is None else query_bias.to(wide),
            None if influence is None else influence.to(wide), causal, include_self, lengths, normalize,
            None if extra_positions is None else extra_positions.to(wide), extra_values,
            None if extra_influence is None else extra_influence.to(wide), ptr,
        )  # fmt: skip
        moved, flow, energy, indices, sq_dists = found
        drift = Drift(moved.to(real), flow.to(real), energy.to(real))
        neighbors = Neighbors(indices, sq_dists.to(real))
    else:
        drift, queries = _drift(states, positions, flow_weight, flow_bias, alpha, query_weight, query_bias)
        known = None if warm is None else warm[0].reshape(B, H, N, k)
        neighbors = _search(drift.positions, queries, extra_positions, k, causal, include_self, lengths, known, ptr)
        points = drift.positions
        queries = points if queries is None else queries
        if extra_positions is not None:
            influence = _with_extra(influence, extra_influence, points, extra_positions)
            points, values = torch.cat([points, extra_positions], 2), torch.cat([values, extra_values], 2)
        context = gather(
            points, queries, values, GatherPlan(neighbors.indices), sigma, influence, normalize, neighbors.sq_dists
        )

    def strip(x: Tensor) -> Tensor:
        x = x if heads else x.squeeze(1)  # whose gradient is a view, not memory filled with zeros
        return x if batched else x.squeeze(0)

    return strip(context), Drift(*map(strip, drift)), Neighbors(*map(strip, neighbors))
