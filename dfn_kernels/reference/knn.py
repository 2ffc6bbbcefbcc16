"""The k nearest points of every query by (squared distance, index), in plain PyTorch: all pairs, a block at a time."""

import torch
from torch import Tensor

BLOCK = 1 << 22  # pairs compared at once


def knn(
    points: Tensor,  # [B, N, D]
    queries: Tensor | None,  # [B, M, D]; None: the points
    lengths: Tensor | None,  # [B] points in use
    query_lengths: Tensor | None,  # [B] queries in use
    k: int,
    causal: bool,
    include_self: bool,
    ptr: Tensor | None = None,  # [S + 1] offsets of the sets, shared by the batch
    query_ptr: Tensor | None = None,  # [S + 1]
    absolute: bool = False,  # sums of absolute differences instead of squares
) -> tuple[Tensor, Tensor]:  # indices [B, M, k], squared distances [B, M, k]
    if ptr is not None:
        return _each_set(points, queries, ptr.tolist(), query_ptr, k, causal, include_self, absolute)
    B, N, _ = points.shape
    own = queries is None
    queries = points if own else queries
    M = queries.shape[1]
    device = points.device
    ids = torch.arange(N, device=device)
    rows = torch.arange(M, device=device)
    usable = points.isfinite().all(-1)  # [B, N]
    asking = queries.isfinite().all(-1)  # [B, M]
    if lengths is not None:
        usable &= ids < lengths.view(B, 1)
    if own:
        asking = usable
    elif query_lengths is not None:
        asking &= rows < query_lengths.view(B, 1)

    indices = torch.full((B, M, k), -1, dtype=torch.int64, device=device)
    sq_dists = torch.full((B, M, k), torch.inf, dtype=points.dtype, device=device)
    width = min(k, N)
    step = max(1, BLOCK // max(1, N))
    for b in range(B if width else 0):
        for first in range(0, M, step):
            row = rows[first : first + step, None]
            total = _distances(queries[b, first : first + step], points[b], absolute)
            visible = usable[b] & asking[b, first : first + step, None]
            if causal:
                visible = visible & (ids <= row)
            if not include_self:
                visible = visible & (ids != row)
            total = total.masked_fill(~visible, torch.inf)
            values, order = total.sort(dim=1, stable=True)
            sq_dists[b, first : first + step, :width] = values[:, :width]
            indices[b, first : first + step, :width] = order[:, :width].masked_fill(values[:, :width] == torch.inf, -1)
    return indices, sq_dists


def _each_set(points, queries, ptr, query_ptr, k, causal, include_self, absolute) -> tuple[Tensor, Tensor]:
    own = queries is None
    query_ptr = ptr if own else query_ptr.tolist()
    shape = (points.shape[0], (points if own else queries).shape[1], k)
    indices = torch.full(shape, -1, dtype=torch.int64, device=points.device)
    sq_dists = torch.full(shape, torch.inf, dtype=points.dtype, device=points.device)
    for s in range(len(ptr) - 1):
        of_set, asking = slice(ptr[s], ptr[s + 1]), slice(query_ptr[s], query_ptr[s + 1])
        those = None if own else queries[:, asking]
        options = k, causal, include_self, None, None, absolute
        found, sq_dists[:, asking] = knn(points[:, of_set], those, None, None, *options)
        indices[:, asking] = found.where(found < 0, found + ptr[s])
    return indices, sq_dists


def _distances(queries: Tensor, points: Tensor, absolute: bool) -> Tensor:
    """((dx*dx) + dy*dy) + ..., each operation rounded by itself: the order of sums is part of the result."""
    total = torch.zeros(queries.shape[0], points.shape[0], dtype=points.dtype, device=points.device)
    for d in range(points.shape[1]):
        step = points[:, d] - queries[:, d, None]
        total = total + (step.abs() if absolute else step * step)
    return total
