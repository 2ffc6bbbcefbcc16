"""Exact k nearest neighbours within packed sets in Triton: every query against every point of its own set.

As in knn/brute.py, the first pass over the set finds tau, the k-th smallest distance, and the second writes what is
nearer, and of what is at tau the first ones. Memory is linear in the rows; time is quadratic in the size of a set: a
grid for sets of many thousands of points is still to come.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import set_of_rows
from .knn.brute import EXACT, MOST_IN_REGISTERS, NOTHING, _bits, _distance, _visible, finish, list_length


@triton.jit
def lane_kernel(
    P, Q, FIRST, END,  # inputs: points, queries, the points of each query's set [M]
    KEYS,  # output [B, M, k], filled with the key of nothing; found ones ascend by index
    N, M, D, k,  # shapes
    CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    K: tl.constexpr,  # length of the lists, at least k
    BM: tl.constexpr,  # tunable
):  # fmt: skip
    """One query per thread. Neighbouring threads have the same set, or one nearby: all walk over all their sets."""
    blocks = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = (pid % blocks) * BM + tl.arange(0, BM)
    rows = i < M
    at = i.to(tl.int64)
    first = tl.load(FIRST + at, mask=rows, other=N).to(tl.int32)
    end = tl.load(END + at, mask=rows, other=0).to(tl.int32)
    if CAUSAL:
        end = tl.minimum(end, i + 1)
    start, stop = tl.min(tl.where(rows, first, N), axis=0), tl.max(end, axis=0)
    P += b * N * D
    Q += b * M * D
    inf = float("inf")

    best = ()
    for _ in tl.static_range(K):
        best = best + (tl.full((BM,), inf, tl.float32),)
    for j in range(start, stop):
        d = _distance(P, Q, at, tl.zeros((1,), tl.int64) + j, rows, True, D)
        seen = _visible(i, j, CAUSAL, INCLUDE_SELF) & (first <= j) & (j < end) & (d < inf)
        c = tl.where(seen, d, inf)
        bubbled = ()
        for s in tl.static_range(K):
            bubbled = bubbled + (tl.minimum(best[s], c),)
            c = tl.maximum(best[s], c)
        best = bubbled

    tau = best[0]
    for s in tl.static_range(1, K):
        tau = tl.where(s < k, best[s], tau)
    ties = tl.zeros((BM,), tl.int32) + k  # how many points at tau itself are wanted
    for s in tl.static_range(K):
        ties -= (best[s] < tau).to(tl.int32)

    count = tl.zeros((BM,), tl.int32)
    for j in range(start, stop):
        d = _distance(P, Q, at, tl.zeros((1,), tl.int64) + j, rows, True, D)
        seen = _visible(i, j, CAUSAL, INCLUDE_SELF) & (first <= j) & (j < end) & (d < inf)
        tie = seen & (d == tau) & (ties > 0)
        take = (seen & (d < tau)) | tie
        key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | j
        tl.store(KEYS + (b * M + at) * k + count, key, mask=take)
        count += take.to(tl.int32)
        ties -= tie.to(tl.int32)


@triton.jit
def row_kernel(
    P, Q, FIRST, END,  # inputs: points, queries, the points of each query's set [M]
    OUT_I, OUT_D,  # outputs [B, M, k], filled with -1 and inf; found ones ascend by index
    N, M, D, k,  # shapes
    CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    K: tl.constexpr,  # length of the list, a power of two, at least k
):  # fmt: skip
    """One query per program, for long lists and float64: K candidates at a time are merged into the K best."""
    pid = tl.program_id(0)
    b, i = (pid // M).to(tl.int64), pid % M
    at = i.to(tl.int64)
    first, end = tl.load(FIRST + at).to(tl.int32), tl.load(END + at).to(tl.int32)
    if CAUSAL:
        end = tl.minimum(end, i + 1)
    P += b * N * D
    Q += b * M * D
    lane = tl.arange(0, K)
    inf = float("inf")
    nothing = _bits(tl.full((K,), inf, P.dtype.element_ty))

    best = nothing  # ascending
    for start in range(first, end, K):
        j = start + lane
        d = _distance(P, Q, at, j.to(tl.int64), True, j < end, D)
        c = tl.where((j < end) & _visible(i, j, CAUSAL, INCLUDE_SELF) & (d < inf), _bits(d), nothing)
        if tl.min(c, axis=0) < tl.max(best, axis=0):
            best = tl.sort(tl.minimum(best, tl.sort(c, descending=True)))
    tau = tl.sum(tl.where(lane == k - 1, best, tl.zeros_like(best)), axis=0)
    ties = k - tl.sum((best < tau).to(tl.int32), axis=0)

    count = 0
    for start in range(first, end, K):
        j = start + lane
        d = _distance(P, Q, at, j.to(tl.int64), True, j < end, D)
        c = tl.where((j < end) & _visible(i, j, CAUSAL, INCLUDE_SELF) & (d < inf), _bits(d), nothing)
        tie = ((c == tau) & (c < nothing)).to(tl.int32)
        tie = tie * (tl.cumsum(tie, axis=0) <= ties).to(tl.int32)
        take = (c < tau).to(tl.int32) + tie
        place = (b * M + at) * k + count + tl.cumsum(take, axis=0) - 1
        tl.store(OUT_I + place, j.to(tl.int64), mask=take > 0)
        tl.store(OUT_D + place, d, mask=take > 0)
        count += tl.sum(take, axis=0)
        ties -= tl.sum(tie, axis=0)


# ---- launcher -------------------------------------------------------------------------------------------------------
def knn(
    points: Tensor, queries: Tensor | None, ptr: Tensor, query_ptr: Tensor | None, k: int, causal: bool,
    include_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and squared distances [B, M, k]."""
    B, N, D = points.shape
    asking = points if queries is None else queries
    M = asking.shape[1]
    K = list_length(k)
    in_registers = K <= MOST_IN_REGISTERS and points.dtype == torch.float32
    indices = points.new_full((B, M, k), NOTHING if in_registers else -1, dtype=torch.int64)
    empty = B * M * N == 0 or len(ptr) == 1
    if not empty:
        sets = set_of_rows(ptr if query_ptr is None else query_ptr, M)
        bounds = ptr.clamp(0, N)  # nobody looks at offsets on a GPU; these cannot leave the points
        inputs = points, asking, bounds[sets], bounds[sets + 1]
        flags = {"CAUSAL": causal, "INCLUDE_SELF": include_self}
    if in_registers and not empty:
        blocks = (B * triton.cdiv(M, 128),)
        lane_kernel[blocks](*inputs, indices, N, M, D, k, **flags, K=K, BM=128, num_warps=4, **EXACT)
        return finish(indices, ordered=False)
    indices.fill_(-1)
    sq_dists = points.new_full((B, M, k), torch.inf)
    if not empty:
        row_kernel[(B * M,)](*inputs, indices, sq_dists, N, M, D, k, **flags, K=max(K, 64), num_warps=4, **EXACT)
    # What was found ascends by index, so a stable sort by distance gives the order (distance, index).
    sq_dists, order = sq_dists.sort(dim=-1, stable=True)
    return indices.gather(-1, order), sq_dists
