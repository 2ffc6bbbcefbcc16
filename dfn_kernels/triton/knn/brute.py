"""Every query against every point, for any number of dimensions.

Two passes. The first finds only tau, the k-th smallest distance. The second visits the points again in the order of
their indices and writes those nearer than tau, and of those at tau the first ones: ties go to the lower index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False} | ({} if torch.version.hip else {"maxnreg": 255})  # ptxas spills without a limit
# One compilation serves all sizes: without this there would be others for 1 and for multiples of 16.
JIT = {"do_not_specialize": [
    "N", "M", "k", "rows", "queries", "total", "slots", "pitch", "boxes", "C", "L", "slabs", "cells", "hash_bits",
    "copies", "causal", "include_self", "warm", "budget",
]}  # fmt: skip
MOST_IN_REGISTERS = 64  # longest list that one thread keeps


@triton.jit
def _visible(i, j, CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr):
    """May query i see point j?"""
    if CAUSAL:
        if INCLUDE_SELF:
            return j <= i
        else:
            return j < i
    else:
        if INCLUDE_SELF:
            return (i == i) & (j == j)
        else:
            return j != i


@triton.jit
def _distance(P, Q, i, j, i_ok, j_ok, D):
    """|q_i - p_j|^2 as ((dx*dx) + dy*dy) + ...; inf or NaN if one of them is not finite."""
    step = tl.load(P + j * D, mask=j_ok, other=0.0) - tl.load(Q + i * D, mask=i_ok, other=0.0)
    total = step * step
    for a in range(1, D):
        step = tl.load(P + j * D + a, mask=j_ok, other=0.0) - tl.load(Q + i * D + a, mask=i_ok, other=0.0)
        total = total + step * step
    return total


@triton.jit
def lane_kernel(
    P, Q, LP, LQ,  # inputs: points, queries, how many of each are in use
    KEYS,  # output [B, M, k], filled with the key of nothing; found ones ascend by index
    N, M, D, k,  # shapes
    HAS_LP: tl.constexpr, HAS_LQ: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    K: tl.constexpr,  # length of the lists, at least k
    BM: tl.constexpr,  # tunable
):  # fmt: skip
    """One query per thread; its K best distances live in registers, a candidate passes through them like a bubble."""
    blocks = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = (pid % blocks) * BM + tl.arange(0, BM)
    rows = i < M
    if HAS_LQ:
        rows = rows & (i < tl.load(LQ + b))
    n = N
    if HAS_LP:
        n = tl.minimum(n, tl.load(LP + b).to(tl.int32))
    if CAUSAL:
        n = tl.minimum(n, (pid % blocks) * BM + BM)
    P += b * N * D
    Q += b * M * D
    at = i.to(tl.int64)
    inf = float("inf")

    best = ()
    for _ in tl.static_range(K):
        best = best + (tl.full((BM,), inf, tl.float32),)
    for j in range(0, n):
        d = _distance(P, Q, at, j, rows, True, D)
        c = tl.where(_visible(i, j, CAUSAL, INCLUDE_SELF) & rows & (d < inf), d, inf)
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
    for j in range(0, n):
        d = _distance(P, Q, at, j, rows, True, D)
        seen = _visible(i, j, CAUSAL, INCLUDE_SELF) & rows & (d < inf)
        tie = seen & (d == tau) & (ties > 0)
        take = (seen & (d < tau)) | tie
        key = (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | j
        tl.store(KEYS + (b * M + at) * k + count, key, mask=take)
        count += take.to(tl.int32)
        ties -= tie.to(tl.int32)


@triton.jit
def _bits(d):
    """Integers that order like these distances, which are not negative."""
    if d.dtype == tl.float64:
        return d.to(tl.int64, bitcast=True)
    else:
        return d.to(tl.int32, bitcast=True)


@triton.jit
def row_kernel(
    P, Q, LP, LQ,  # inputs: points, queries, how many of each are in use
    OUT_I, OUT_D,  # outputs [B, M, k], filled with -1 and inf; found ones ascend by index
    N, M, D, k,  # shapes
    HAS_LP: tl.constexpr, HAS_LQ: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    K: tl.constexpr,  # length of the list, a power of two, at least k
):  # fmt: skip
    """One query per program, for long lists: K candidates at a time are sorted and merged into the K best."""
    pid = tl.program_id(0)
    b, i = (pid // M).to(tl.int64), pid % M
    n = N
    if HAS_LP:
        n = tl.minimum(n, tl.load(LP + b).to(tl.int32))
    if CAUSAL:
        n = tl.minimum(n, i + 1)
    if HAS_LQ:
        n = tl.where(i < tl.load(LQ + b), n, 0)
    P += b * N * D
    Q += b * M * D
    at = i.to(tl.int64)
    lane = tl.arange(0, K)
    inf = float("inf")
    nothing = _bits(tl.full((K,), inf, P.dtype.element_ty))

    best = nothing  # ascending
    for start in range(0, n, K):
        j = start + lane
        d = _distance(P, Q, at, j.to(tl.int64), True, j < n, D)
        c = tl.where((j < n) & _visible(i, j, CAUSAL, INCLUDE_SELF) & (d < inf), _bits(d), nothing)
        if tl.min(c, axis=0) < tl.max(best, axis=0):
            best = tl.sort(tl.minimum(best, tl.sort(c, descending=True)))
    tau = tl.sum(tl.where(lane == k - 1, best, tl.zeros_like(best)), axis=0)
    ties = k - tl.sum((best < tau).to(tl.int32), axis=0)

    count = 0
    for start in range(0, n, K):
        j = start + lane
        d = _distance(P, Q, at, j.to(tl.int64), True, j < n, D)
        c = tl.where((j < n) & _visible(i, j, CAUSAL, INCLUDE_SELF) & (d < inf), _bits(d), nothing)
        tie = ((c == tau) & (c < nothing)).to(tl.int32)
        tie = tie * (tl.cumsum(tie, axis=0) <= ties).to(tl.int32)
        take = (c < tau).to(tl.int32) + tie
        place = (b * M + at) * k + count + tl.cumsum(take, axis=0) - 1
        tl.store(OUT_I + place, j.to(tl.int64), mask=take > 0)
        tl.store(OUT_D + place, d, mask=take > 0)
        count += tl.sum(take, axis=0)
        ties -= tl.sum(tie, axis=0)


@triton.jit(**JIT)
def finish_kernel(
    KEYS,  # input keys [rows, k], output indices
    DISTS,  # output [rows, k]
    rows, k,
    SORT: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    s = tl.arange(0, K)[None, :]
    ok = (row < rows) & (s < k)
    at = row.to(tl.int64) * k + s
    key = tl.load(KEYS + at, mask=ok, other=0x7FFFFFFFFFFFFFFF)
    if SORT:
        key = tl.sort(key, dim=1)
    tl.store(DISTS + at, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=ok)
    tl.store(KEYS + at, (key << 32) >> 32, mask=ok)  # the low half with its sign: -1 if there is nothing


# ---- launchers ------------------------------------------------------------------------------------------------------
NOTHING = 0x7F800000FFFFFFFF  # key of a missing neighbour: distance inf, index -1


def list_length(k: int) -> int:
    return max(4, triton.next_power_of_2(k))


def finish(keys: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """Keys [B, M, k] become indices, in place, and squared distances, ascending by (distance, index)."""
    sq_dists = torch.empty_like(keys, dtype=torch.float32)
    k, K = keys.shape[2], list_length(keys.shape[2])
    rows, BM = keys.shape[0] * keys.shape[1], max(1, 2048 // K)
    finish_kernel[(triton.cdiv(rows, BM),)](keys, sq_dists, rows, k, SORT=not ordered, K=K, BM=BM, num_warps=4)
    return keys, sq_dists


def search(
    points: Tensor, queries: Tensor | None, lengths: Tensor | None, query_lengths: Tensor | None, k: int, causal: bool,
    include_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, N, D = points.shape
    if queries is None:
        queries, query_lengths = points, lengths
    M = queries.shape[1]
    K = list_length(k)
    in_registers = K <= MOST_IN_REGISTERS and points.dtype == torch.float32
    indices = points.new_full((B, M, k), NOTHING if in_registers else -1, dtype=torch.int64)
    inputs = points, queries, points if lengths is None else lengths, points if query_lengths is None else query_lengths
    flags = {"HAS_LP": lengths is not None, "HAS_LQ": query_lengths is not None, "CAUSAL": causal,
             "INCLUDE_SELF": include_self}  # fmt: skip
    if in_registers and indices.numel() and N:
        blocks = (B * triton.cdiv(M, 128),)
        lane_kernel[blocks](*inputs, indices, N, M, D, k, **flags, K=K, BM=128, num_warps=4, **EXACT)
        return finish(indices, ordered=False)
    indices.fill_(-1)
    sq_dists = points.new_full((B, M, k), torch.inf)
    if indices.numel() and N:
        row_kernel[(B * M,)](*inputs, indices, sq_dists, N, M, D, k, **flags, K=max(K, 64), num_warps=4, **EXACT)
    # What was found ascends by index, so a stable sort by distance gives the order (distance, index).
    sq_dists, order = sq_dists.sort(dim=-1, stable=True)
    return indices.gather(-1, order), sq_dists
