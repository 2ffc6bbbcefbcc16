"""Every query against every point, for any number of dimensions.

Points are cut into slices, so that few queries fill a GPU, too: a program takes LANES queries, one a lane, and a slice.
Where there are several slices, a second kernel merges what they found.

Packed sets: every query has its own first and last point. Queries side by side have the same set or one nearby, so a
program walks from the first point of any of them to the last. Time is quadratic in the size of a set.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...packed import set_of_rows
from . import lists
from .lists import FAR, forget, merge_list, merge_sorted, write
from .tree import JIT

GROUP = 8  # points at a time
SHORTEST = 128  # points in a slice
REGISTERS = 176
PROGRAMS = 2048  # at most, of blocks of queries times slices
EXACT = {"enable_fp_fusion": False} | ({} if torch.version.hip else {"maxnreg": 255})  # ptxas spills without a limit


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
def _bits(d):
    """Integers that order like these distances, which are not negative."""
    if d.dtype == tl.float64:
        return d.to(tl.int64, bitcast=True)
    else:
        return d.to(tl.int32, bitcast=True)


@triton.jit(**JIT)
def row_kernel(
    P, Q, LP, LQ,  # inputs: points, queries, how many of each are in use; SETS: first point of each query [M], its end
    OUT_I, OUT_D,  # outputs [B, M, k]: ascending by index, not by distance; then -1 and inf
    N, M, D, k,  # shapes
    HAS_LP: tl.constexpr, HAS_LQ: tl.constexpr, SETS: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    K: tl.constexpr,  # length of the list, a power of two, at least k
):  # fmt: skip
    """One query per program, for float64. Two passes: K candidates at a time are sorted and merged into the K best,
    whose k-th is tau; then the points nearer than tau are written in the order of their indices, and of those at tau
    the first.
    """
    pid = tl.program_id(0)
    b, i = (pid // M).to(tl.int64), pid % M
    first, n = 0, N
    if SETS:
        first, n = tl.load(LP + i).to(tl.int32), tl.load(LQ + i).to(tl.int32)
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
    for start in range(first, n, K):
        j = start + lane
        d = _distance(P, Q, at, j.to(tl.int64), True, j < n, D)
        c = tl.where((j < n) & _visible(i, j, CAUSAL, INCLUDE_SELF) & (d < inf), _bits(d), nothing)
        if tl.min(c, axis=0) < tl.max(best, axis=0):
            best = tl.sort(tl.minimum(best, tl.sort(c, descending=True)))
    tau = tl.sum(tl.where(lane == k - 1, best, tl.zeros_like(best)), axis=0)
    ties = k - tl.sum((best < tau).to(tl.int32), axis=0)

    count = 0
    for start in range(first, n, K):
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
    rest = (b * M + at) * k + lane
    tl.store(OUT_I + rest, tl.zeros_like(lane).to(tl.int64) - 1, mask=(lane >= count) & (lane < k))
    tl.store(OUT_D + rest, tl.zeros_like(lane).to(OUT_D.dtype.element_ty) + inf, mask=(lane >= count) & (lane < k))


@triton.jit(**JIT)
def slice_kernel(
    P, Q, LP, LQ,  # inputs: points [B, N, D], queries [B, M, D], LP and LQ as above
    MEMORY, BEST,  # scratch: lists [programs, CAP, LANES]; best keys [programs or items, kept, LANES]
    OUT_I, OUT_D,  # outputs [B, M, k], if there is one slice
    N, M, D, k, kept, items, slices, size,  # shapes; items: blocks of queries times slices; size: points in a slice
    HAS_LP: tl.constexpr, HAS_LQ: tl.constexpr, SETS: tl.constexpr, CAUSAL: tl.constexpr, INCLUDE_SELF: tl.constexpr,
    SLICED: tl.constexpr, ONE: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr,
    GROUP: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    pid = tl.program_id(0).to(tl.int64)
    LIST = MEMORY + pid * (CAP * LANES) + lane
    blocks = tl.cdiv(M, LANES)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        part = pid
        if SLICED:
            part = pid * 0 + item
        block = item // slices
        b = (block // blocks).to(tl.int64)
        i = (block % blocks) * LANES + lane
        rows = i < M
        asks = rows
        if HAS_LQ:
            asks = asks & (i < tl.load(LQ + b))
        end = N
        if HAS_LP:
            end = tl.minimum(end, tl.load(LP + b).to(tl.int32))
        if CAUSAL:
            end = tl.minimum(end, (block % blocks) * LANES + LANES)
        start = (item % slices) * size
        end = tl.minimum(end, start + size)
        if SETS:
            first = tl.load(LP + i, mask=rows, other=N).to(tl.int32)
            after = tl.load(LQ + i, mask=rows, other=0).to(tl.int32)
            start, end = tl.maximum(start, tl.min(first, axis=0)), tl.minimum(end, tl.max(after, axis=0))
        points = P + b * N * D
        queries = Q + (b * M + i) * D
        MINE = BEST + part * kept * LANES + lane
        forget(MINE, b + i, kept, k, LANES)
        worst = tl.where(asks, tl.zeros_like(b + i) + FAR, -1)
        count = tl.zeros_like(i)
        longest = tl.max(count, axis=0)
        for j in range(start, end, GROUP):
            at = b * 0 + j  # 64 bits wide
            d = ()
            for _ in tl.static_range(GROUP):
                d = d + (tl.zeros((LANES,), tl.float32),)
            for a in range(D):
                x = tl.load(queries + a, mask=asks, other=0.0)
                sums = ()
                for c in tl.static_range(GROUP):
                    step = tl.load(points + (at + c) * D + a, mask=j + c < end, other=float("inf")) - x
                    sums = sums + (d[c] + step * step,)
                d = sums
            for c in tl.static_range(GROUP):
                key = (d[c].to(tl.int32, bitcast=True).to(tl.int64) << 32) | (at + c)
                wanted = (d[c] < float("inf")) & (key < worst) & _visible(i, j + c, CAUSAL, INCLUDE_SELF)
                if SETS:
                    wanted = wanted & (first <= j + c) & (j + c < after)
                tl.store(LIST + count * LANES, key, mask=wanted)
                count += wanted.to(tl.int32)
            longest = tl.max(count, axis=0)
            if (longest > CAP - GROUP) | (j + GROUP >= end):
                found = merge_list(LIST, MINE, count, longest, kept, ONE, LANES, K, LOG)
                worst = tl.where(asks, found, -1)
                count = tl.zeros_like(i)
        if not SLICED:
            write(BEST + part * kept * LANES, OUT_I, OUT_D, (b * M + i) * k, rows, kept, k, LANES)


@triton.jit(**JIT)
def merge_kernel(
    BEST,  # input [blocks, slices, kept, LANES], and scratch
    OUT_I, OUT_D,  # outputs [B, M, k]
    M, k, kept, slices,
    ONE: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a block: the other slices' keys are merged into those of the first."""
    lane = tl.arange(0, LANES)
    block = tl.program_id(0)
    blocks = tl.cdiv(M, LANES)
    i = (block % blocks) * LANES + lane
    stride = block.to(tl.int64) * 0 + kept * LANES
    FIRST = BEST + block * slices * stride
    for part in range(1, slices):
        OTHER = FIRST + part * stride + (kept - k) * LANES + lane
        for chunk in range(0, k, K):
            new = ()
            for e in tl.static_range(K):
                new = new + (tl.load(OTHER + (chunk + e) * LANES, mask=chunk + e < k, other=FAR),)
            merge_sorted(new, FIRST + lane, kept, ONE, LANES, K, LOG)
    write(FIRST, OUT_I, OUT_D, ((block // blocks).to(tl.int64) * M + i) * k, i < M, kept, k, LANES)


# ---- launchers ------------------------------------------------------------------------------------------------------
def cut(items: int, N: int, kept: int) -> tuple[int, int]:
    """How many slices, and of how many points: as many as fill a GPU, if they are not too short."""
    most = min(PROGRAMS // items, N // SHORTEST, lists.MOST_MEMORY // (items * kept * lists.LANES * 8))
    size = triton.cdiv(triton.cdiv(N, max(1, most)), GROUP) * GROUP
    return triton.cdiv(N, size), size


def search(
    points: Tensor, queries: Tensor | None, lengths: Tensor | None, query_lengths: Tensor | None, k: int, causal: bool,
    include_self: bool, ptr: Tensor | None = None, query_ptr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and squared distances [B, M, k]. With `ptr`, offsets of packed sets [S + 1], there are no lengths."""
    B, N, D = points.shape
    if queries is None:
        queries, query_lengths, query_ptr = points, lengths, ptr
    M, device = queries.shape[1], points.device
    if B * M == 0 or N == 0 or ptr is not None and len(ptr) == 1:
        return points.new_full((B, M, k), -1, dtype=torch.int64), points.new_full((B, M, k), torch.inf)
    indices = torch.empty(B, M, k, dtype=torch.int64, device=device)
    sq_dists = points.new_empty(B, M, k)
    inputs = points, queries, points if lengths is None else lengths, points if query_lengths is None else query_lengths
    if ptr is not None:
        sets, ptr = (
            set_of_rows(query_ptr, M),
            ptr.clamp(0, N),
        )  # a GPU looks at no offsets; these stay within the points
        inputs = points, queries, ptr[sets], ptr[sets + 1]
    flags = {"HAS_LP": lengths is not None, "HAS_LQ": query_lengths is not None, "SETS": ptr is not None,
             "CAUSAL": causal, "INCLUDE_SELF": include_self}  # fmt: skip
    if points.dtype == torch.float64:
        K = max(64, triton.next_power_of_2(k))
        row_kernel[(B * M,)](*inputs, indices, sq_dists, N, M, D, k, **flags, K=K, num_warps=4, **EXACT)
        # What was found ascends by index, so a stable sort by distance gives the order (distance, index).
        sq_dists, order = sq_dists.sort(dim=-1, stable=True)
        return indices.gather(-1, order), sq_dists

    (K, kept), CAP = lists.sizes(k), 32 + GROUP
    blocks = B * triton.cdiv(M, lists.LANES)
    slices, size = cut(blocks, N, kept)
    items = blocks * slices
    programs = lists.programs(items, CAP + kept, PROGRAMS)
    memory = torch.empty(programs * CAP * lists.LANES, dtype=torch.int64, device=device)
    parts = items if slices > 1 else programs
    best = torch.empty(parts * kept * lists.LANES, dtype=torch.int64, device=device)
    lengths_of_lists = {"ONE": kept == K, "K": K, "LOG": K.bit_length() - 1, "LANES": lists.LANES}
    slice_kernel[(programs,)](
        *inputs, memory, best, indices, sq_dists, N, M, D, k, kept, items, slices, size,
        **flags, **lengths_of_lists, SLICED=slices > 1, GROUP=GROUP, CAP=CAP, **lists.options(REGISTERS),
    )  # fmt: skip
    if slices > 1:
        merge_kernel[(blocks,)](
            best, indices, sq_dists, M, k, kept, slices, **lengths_of_lists, **lists.options(REGISTERS)
        )
    return indices, sq_dists
