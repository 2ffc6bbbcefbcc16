"""Gaussian gather in Triton. A program serves a block of queries (or entities) and a block of channels; nothing is
tuned at run time, so that a new length costs nothing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def _exponent(P, Q, j, m, valid, scale, D):
    """scale * |q_m - p_j|^2 with scale = -1 / (2 sigma^2); -inf where there is no neighbour."""
    total = tl.zeros(j.shape, Q.dtype.element_ty)
    for a in range(D):
        step = tl.load(Q + m * D + a, mask=valid, other=0.0) - tl.load(P + j * D + a, mask=valid, other=0.0)
        total += step * step
    return tl.where(valid, scale * total, float("-inf"))


@triton.jit
def _top(P, Q, I, m, rows, scale, N, D, k):  # noqa: E741
    """The largest exponent of each row, 0 for a row without neighbours: normalised weights are relative to it."""
    top = tl.full(m.shape, float("-inf"), Q.dtype.element_ty)
    for s in range(k):
        j = tl.load(I + m * k + s, mask=rows, other=-1)
        top = tl.maximum(top, _exponent(P, Q, j, m, rows & (j >= 0) & (j < N), scale, D))
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _influence(W, j, valid, HAS_INFLUENCE: tl.constexpr):
    if HAS_INFLUENCE:
        return tl.load(W + j, mask=valid, other=0.0)
    else:
        return 1.0


@triton.jit
def forward_kernel(
    P, Q, V, I, S, W,  # inputs: positions, queries, values, indices, sigma, influence  # noqa: E741
    Y,  # output
    H, N, M, D, c, k, sVb, sVh, sVn, sYb, sYh, sYm,  # shapes and strides
    HAS_INFLUENCE: tl.constexpr, NORMALIZE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_m, blocks_c = tl.cdiv(M, BM), tl.cdiv(c, BC)
    pid = tl.program_id(0)
    group = (pid // (blocks_m * blocks_c)).to(tl.int64)
    m = ((pid // blocks_c) % blocks_m) * BM + tl.arange(0, BM).to(tl.int64)
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    rows, channels = m < M, x < c
    b, h = group // H, group % H
    P += group * N * D
    Q += group * M * D
    I += group * M * k  # noqa: E741
    W += group * N
    V += b * sVb + h * sVh
    Y += b * sYb + h * sYh
    sigma = tl.load(S + h)
    scale = -0.5 / (sigma * sigma)

    top = tl.zeros((BM,), Q.dtype.element_ty)
    if NORMALIZE:
        top = _top(P, Q, I, m, rows, scale, N, D, k)
    total = tl.zeros((BM,), Q.dtype.element_ty)
    acc = tl.zeros((BM, BC), Q.dtype.element_ty)
    for s in range(k):
        j = tl.load(I + m * k + s, mask=rows, other=-1)
        valid = rows & (j >= 0) & (j < N)
        weight = tl.exp(_exponent(P, Q, j, m, valid, scale, D) - top) * _influence(W, j, valid, HAS_INFLUENCE)
        weight = tl.where(valid, weight, 0.0)
        total += weight
        value = tl.load(V + j[:, None] * sVn + x[None, :], mask=valid[:, None] & channels[None, :], other=0.0)
        acc += weight[:, None] * value.to(acc.dtype)
    if NORMALIZE:
        acc = acc * tl.where(total != 0, 1.0 / tl.where(total == 0, 1.0, total), 0.0)[:, None]
    tl.store(Y + m[:, None] * sYm + x[None, :], acc.to(Y.dtype.element_ty), mask=rows[:, None] & channels[None, :])


@triton.jit
def backward_along_kernel(
    V, I, G,  # inputs: values, indices, gradient of the output  # noqa: E741
    A,  # output [.., M, k]: <g_m, v_j>, along which the weight of the edge moves the loss
    H, N, M, c, k, sVb, sVh, sVn, sGb, sGh, sGm,  # shapes and strides
    BM: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    group = (pid // blocks_m).to(tl.int64)
    m = (pid % blocks_m) * BM + tl.arange(0, BM).to(tl.int64)
    x = tl.arange(0, BC)
    rows = m < M
    b, h = group // H, group % H
    V += b * sVb + h * sVh
    G += b * sGb + h * sGh
    for s in range(k):
        j = tl.load(I + (group * M + m) * k + s, mask=rows, other=-1)
        valid = rows & (j >= 0) & (j < N)
        along = tl.zeros((BM,), A.dtype.element_ty)
        for start in range(0, c, BC):
            inside = valid[:, None] & (start + x < c)[None, :]
            g = tl.load(G + m[:, None] * sGm + start + x[None, :], mask=inside, other=0.0)
            v = tl.load(V + j[:, None] * sVn + start + x[None, :], mask=inside, other=0.0)
            along += tl.sum(g.to(along.dtype) * v.to(along.dtype), axis=1)
        tl.store(A + (group * M + m) * k + s, along, mask=rows)


@triton.jit
def backward_edges_kernel(
    P, Q, I, S, W,  # inputs  # noqa: E741
    EW, ES, EI, GQ, GS,  # outputs: edge weight, slope (holds <g, v> before), influence; gradients of queries, sigma
    H, N, M, D, k,  # shapes
    HAS_INFLUENCE: tl.constexpr, NORMALIZE: tl.constexpr,
    BM: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    group = (pid // blocks_m).to(tl.int64)
    m = (pid % blocks_m) * BM + tl.arange(0, BM).to(tl.int64)
    rows = m < M
    P += group * N * D
    Q += group * M * D
    I += group * M * k  # noqa: E741
    EW += group * M * k
    ES += group * M * k
    W += group * N
    sigma = tl.load(S + group % H)
    scale = -0.5 / (sigma * sigma)

    top = tl.zeros((BM,), Q.dtype.element_ty)
    factor = tl.full((BM,), 1.0, Q.dtype.element_ty)
    mean = tl.zeros((BM,), Q.dtype.element_ty)  # <g, y>: the part that normalisation takes away
    if NORMALIZE:
        top = _top(P, Q, I, m, rows, scale, N, D, k)
        total = tl.zeros((BM,), Q.dtype.element_ty)
        for s in range(k):
            j = tl.load(I + m * k + s, mask=rows, other=-1)
            valid = rows & (j >= 0) & (j < N)
            weight = tl.exp(_exponent(P, Q, j, m, valid, scale, D) - top) * _influence(W, j, valid, HAS_INFLUENCE)
            total += tl.where(valid, weight, 0.0)
            mean += tl.where(valid, weight * tl.load(ES + m * k + s, mask=rows, other=0.0), 0.0)
        factor = tl.where(total != 0, 1.0 / tl.where(total == 0, 1.0, total), 0.0)
        mean = mean * factor
    grad_sigma = tl.zeros((BM,), Q.dtype.element_ty)
    for s in range(k):
        j = tl.load(I + m * k + s, mask=rows, other=-1)
        valid = rows & (j >= 0) & (j < N)
        exponent = _exponent(P, Q, j, m, valid, scale, D)
        gauss = tl.where(valid, tl.exp(exponent - top) * factor, 0.0)
        weight = gauss * _influence(W, j, valid, HAS_INFLUENCE)
        rest = tl.load(ES + m * k + s, mask=rows, other=0.0) - mean
        tl.store(EW + m * k + s, weight, mask=rows)
        tl.store(ES + m * k + s, weight * rest, mask=rows)
        if HAS_INFLUENCE:
            tl.store(EI + group * M * k + m * k + s, gauss * rest, mask=rows)
        grad_sigma -= weight * rest * tl.where(valid, 2.0 * exponent, 0.0)
    tl.store(GS + group * M + m, grad_sigma / sigma, mask=rows)
    for a in range(D):
        q = tl.load(Q + m * D + a, mask=rows, other=0.0)
        grad_q = tl.zeros((BM,), Q.dtype.element_ty)
        for s in range(k):
            j = tl.load(I + m * k + s, mask=rows, other=-1)
            valid = rows & (j >= 0) & (j < N)
            slope = tl.load(ES + m * k + s, mask=valid, other=0.0)
            grad_q -= slope * (q - tl.load(P + j * D + a, mask=valid, other=0.0))
        tl.store(GQ + group * M * D + m * D + a, -2.0 * scale * grad_q, mask=rows)


@triton.jit
def backward_values_kernel(
    G, STARTS, EDGES, EW,  # inputs: gradient of the output, transposed list, edge weights
    GV,  # output: gradient of values
    H, N, M, c, k, sGb, sGh, sGm, sVb, sVh, sVn,  # shapes and strides
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_n, blocks_c = tl.cdiv(N, BN), tl.cdiv(c, BC)
    pid = tl.program_id(0)
    group = (pid // (blocks_n * blocks_c)).to(tl.int64)
    n = ((pid // blocks_c) % blocks_n) * BN + tl.arange(0, BN).to(tl.int64)
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    rows, channels = n < N, x < c
    b, h = group // H, group % H
    EDGES += group * M * k
    EW += group * M * k
    G += b * sGb + h * sGh
    GV += b * sVb + h * sVh
    first = tl.load(STARTS + group * (N + 1) + n, mask=rows, other=0)
    count = tl.load(STARTS + group * (N + 1) + n + 1, mask=rows, other=0) - first
    count = count.to(tl.int32)
    acc = tl.zeros((BN, BC), EW.dtype.element_ty)
    for t in range(tl.max(count, axis=0)):
        live = (t < count)[:, None]  # columns from here on: Triton 3.7 fails to lay out the same loads as rows
        edge = tl.load(EDGES + first[:, None] + t, mask=live, other=0)
        weight = tl.load(EW + edge, mask=live, other=0.0)
        g = tl.load(G + (edge // k) * sGm + x[None, :], mask=live & channels[None, :], other=0.0)
        acc += weight * g.to(acc.dtype)
    tl.store(GV + n[:, None] * sVn + x[None, :], acc.to(GV.dtype.element_ty), mask=rows[:, None] & channels[None, :])


@triton.jit
def backward_positions_kernel(
    P, Q, S, STARTS, EDGES, ES, EI,  # inputs
    GP, GI,  # outputs: gradients of positions and influence
    H, N, M, D, k,  # shapes
    HAS_INFLUENCE: tl.constexpr,
    BN: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    group = (pid // blocks_n).to(tl.int64)
    n = (pid % blocks_n) * BN + tl.arange(0, BN).to(tl.int64)
    rows = n < N
    P += group * N * D
    Q += group * M * D
    EDGES += group * M * k
    ES += group * M * k
    sigma = tl.load(S + group % H)
    first = tl.load(STARTS + group * (N + 1) + n, mask=rows, other=0)
    count = tl.load(STARTS + group * (N + 1) + n + 1, mask=rows, other=0) - first
    count = count.to(tl.int32)
    most = tl.max(count, axis=0)
    for a in range(D):
        p = tl.load(P + n * D + a, mask=rows, other=0.0)
        acc = tl.zeros((BN,), P.dtype.element_ty)
        for t in range(most):
            live = t < count
            edge = tl.load(EDGES + first + t, mask=live, other=0)
            slope = tl.load(ES + edge, mask=live, other=0.0)
            step = tl.load(Q + (edge // k) * D + a, mask=live, other=0.0) - p
            acc += tl.where(live, slope * step, 0.0)  # p may be NaN where nobody lists it
        tl.store(GP + group * N * D + n * D + a, acc / (sigma * sigma), mask=rows)
    if HAS_INFLUENCE:
        acc = tl.zeros((BN,), P.dtype.element_ty)
        for t in range(most):
            live = t < count
            edge = tl.load(EDGES + first + t, mask=live, other=0)
            acc += tl.load(EI + group * M * k + edge, mask=live, other=0.0)
        tl.store(GI + group * N + n, acc, mask=rows)


# ---- launchers ------------------------------------------------------------------------------------------------------
def tiles(c: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and channels of a program. A function of the channel count alone; every value it gives is compiled ahead of
    time by the tests."""
    channels = 32 if c <= 32 else 64 if c <= 64 else 128
    if dtype == torch.float64:
        channels = 32
    return {"rows": max(512 // channels, 8), "channels": channels}


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def gaussian_gather(
    positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor, influence: Tensor | None,
    normalize: bool,
) -> Tensor:  # fmt: skip
    B, H, N, D = positions.shape
    indices = indices.expand(B, H, -1, -1).contiguous()
    M, k = indices.shape[2:]
    c = values.shape[3]
    out = values.new_empty(B, M, H, c).transpose(1, 2)
    if out.numel() == 0:
        return out
    tile = tiles(c, values.dtype)
    grid = (B * H * triton.cdiv(M, tile["rows"]) * triton.cdiv(c, tile["channels"]),)
    forward_kernel[grid](
        positions, queries, values, indices, sigma, positions if influence is None else influence,
        out,
        H, N, M, D, c, k, *_row_strides(values), *_row_strides(out),
        HAS_INFLUENCE=influence is not None, NORMALIZE=normalize,
        BM=tile["rows"], BC=tile["channels"], num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    return out


def transpose_neighbors(indices: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """For every entity the edges (query * k + slot) that point to it, ascending: starts [B,H,N+1], edges [B,H,M*k].

    Indices outside [0, N) are left out. No host synchronisation; a stable sort, so the order is always the same.
    """
    flat = indices.flatten(2)
    ends = flat.where((flat >= 0) & (flat < N), N)
    ordered, edges = torch.sort(ends, dim=-1, stable=True)
    wanted = torch.arange(N + 1, device=indices.device).expand(*indices.shape[:2], N + 1).contiguous()
    return torch.searchsorted(ordered, wanted), edges


def _only(wanted: int, *grads: Tensor) -> tuple[Tensor, ...]:
    """Bit i of `wanted` keeps grads[i]; the others become empty."""
    return tuple(x if wanted >> i & 1 else x.new_empty(0) for i, x in enumerate(grads))


def gaussian_gather_backward(
    grad: Tensor, positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor,
    influence: Tensor | None, normalize: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, N, D = positions.shape
    indices = indices.expand(B, H, -1, -1).contiguous()
    M, k = indices.shape[2:]
    c = values.shape[3]
    has_influence = influence is not None
    grad_positions = torch.zeros_like(positions)
    grad_queries = torch.zeros_like(queries)
    grad_values = values.new_empty(B, N, H, c).transpose(1, 2)
    grad_influence = torch.zeros_like(influence) if has_influence else positions.new_empty(0)
    if B * H * N * M * k == 0:
        return _only(wanted, grad_positions, grad_queries, grad_values.zero_(), torch.zeros_like(sigma), grad_influence)
    edge_weight = positions.new_empty(B, H, M, k)
    edge_slope = positions.new_empty(B, H, M, k)
    edge_influence = positions.new_empty(B, H, M, k) if has_influence else edge_slope
    sigma_rows = positions.new_empty(B, H, M)
    tile = tiles(c, values.dtype)
    rows, channels = tile["rows"], tile["channels"]
    backward_along_kernel[(B * H * triton.cdiv(M, rows),)](
        values, indices, grad,
        edge_slope,
        H, N, M, c, k, *_row_strides(values), *_row_strides(grad),
        BM=rows, BC=channels, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    backward_edges_kernel[(B * H * triton.cdiv(M, 128),)](
        positions, queries, indices, sigma, influence if has_influence else positions,
        edge_weight, edge_slope, edge_influence, grad_queries, sigma_rows,
        H, N, M, D, k,
        HAS_INFLUENCE=has_influence, NORMALIZE=normalize, BM=128, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    starts, edges = transpose_neighbors(indices, N)
    if c > 0 and wanted & 4:
        backward_values_kernel[(B * H * triton.cdiv(N, rows) * triton.cdiv(c, channels),)](
            grad, starts, edges, edge_weight,
            grad_values,
            H, N, M, c, k, *_row_strides(grad), *_row_strides(grad_values),
            BN=rows, BC=channels, num_warps=4, **NO_SPILLS,
        )  # fmt: skip
    if wanted & (1 | 16):
        backward_positions_kernel[(B * H * triton.cdiv(N, 128),)](
            positions, queries, sigma, starts, edges, edge_slope, edge_influence,
            grad_positions, grad_influence,
            H, N, M, D, k,
            HAS_INFLUENCE=has_influence, BN=128, num_warps=4, **NO_SPILLS,
        )  # fmt: skip
    return _only(wanted, grad_positions, grad_queries, grad_values, sigma_rows.sum((0, 2)), grad_influence)
