"""Gaussian gather in Triton, backward: along the edges of each query, then over the edges that point to each entity.

Long lists (hubs: many points in one place) are cut into pieces of HUB edges. A piece is served like an entity, into
`parts`; hub_kernel adds the pieces in their order. So the same bits come out in every run. Not yet run on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS
from .gather_plan import HUB, hub_pieces, transpose_neighbors
from .gaussian_gather import _exponent, _influence, _top, order_or_all, row_strides, tiles


@triton.jit
def backward_along_kernel(
    V, I, G, ORDER,  # inputs: values, indices, gradient of the output, order  # noqa: E741
    A,  # output [.., M, k]: <g_m, v_j>, along which the weight of the edge moves the loss
    H, LH, N, M, c, k, sO, sVb, sVh, sVn, sGb, sGh, sGm,  # shapes and strides
    BM: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    group = (pid // blocks_m).to(tl.int64)
    b, h = group // H, group % H
    list_ = b * LH + h % LH
    turn = (pid % blocks_m) * BM + tl.arange(0, BM)
    x = tl.arange(0, BC)
    rows = turn < M
    m = tl.load(ORDER + list_ * sO + turn, mask=rows, other=0).to(tl.int64)
    V += b * sVb + h * sVh
    G += b * sGb + h * sGh
    for s in range(k):
        j = tl.load(I + (list_ * M + m) * k + s, mask=rows, other=-1)
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
    H, LH, N, M, D, k,  # shapes
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
    I += ((group // H) * LH + group % LH) * M * k  # noqa: E741
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
def _edges_of(STARTS, ORDER, PIECES, NUMBERS, turn, list_, N, pieces, sO, HUB: tl.constexpr):
    """Entity, first edge and number of edges of each turn: entities in their order, then the pieces of hubs."""
    own, piece = turn < N, (turn >= N) & (turn < N + pieces)
    n = tl.load(ORDER + list_ * sO + turn, mask=own, other=-1).to(tl.int64)
    n = tl.where(piece, tl.load(PIECES + list_ * pieces + turn - N, mask=piece, other=-1), n)
    start = tl.load(STARTS + list_ * (N + 1) + n, mask=n >= 0, other=0)
    count = tl.load(STARTS + list_ * (N + 1) + n + 1, mask=n >= 0, other=0) - start
    number = tl.load(NUMBERS + list_ * pieces + turn - N, mask=piece, other=0)
    left = tl.where(piece, tl.minimum(count - number * HUB, HUB), tl.where(count > HUB, 0, count))
    return n, start + number * HUB, left.to(tl.int32), own & (count <= HUB), piece & (n >= 0)


@triton.jit
def backward_values_kernel(
    G, STARTS, EDGES, EW, ORDER, PIECES, NUMBERS,  # inputs: gradient, transposed list, edge weights, order, hubs
    GV, PARTS,  # outputs: gradient of values; sums of the pieces [.., pieces, c]
    H, LH, N, M, c, k, pieces, sO, sGb, sGh, sGm, sVb, sVh, sVn,  # shapes and strides
    BN: tl.constexpr, BC: tl.constexpr, HUB: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_n, blocks_c = tl.cdiv(N + pieces, BN), tl.cdiv(c, BC)
    pid = tl.program_id(0)
    group = (pid // (blocks_n * blocks_c)).to(tl.int64)
    b, h = group // H, group % H
    list_ = b * LH + h % LH
    # Columns from the start: Triton 3.7 fails to lay out the loads of the loop as rows.
    turn = ((pid // blocks_c) % blocks_n) * BN + tl.arange(0, BN)[:, None]
    x = (pid % blocks_c) * BC + tl.arange(0, BC)[None, :]
    n, first, count, own, piece = _edges_of(STARTS, ORDER, PIECES, NUMBERS, turn, list_, N, pieces, sO, HUB)
    EDGES += list_ * M * k
    EW += group * M * k
    G += b * sGb + h * sGh
    acc = tl.zeros((BN, BC), EW.dtype.element_ty)
    for t in range(tl.max(tl.max(count, axis=1), axis=0)):
        live = t < count
        edge = tl.load(EDGES + first + t, mask=live, other=0)
        weight = tl.load(EW + edge, mask=live, other=0.0)
        g = tl.load(G + (edge // k) * sGm + x, mask=live & (x < c), other=0.0)
        acc += weight * g.to(acc.dtype)
    tl.store(GV + b * sVb + h * sVh + n * sVn + x, acc.to(GV.dtype.element_ty), mask=own & (x < c))
    tl.store(PARTS + (group * pieces + turn - N) * c + x, acc, mask=piece & (x < c))


@triton.jit
def backward_positions_kernel(
    P, Q, S, STARTS, EDGES, ES, EI, ORDER, PIECES, NUMBERS,  # inputs
    GP, GI, PARTS, PARTS_I,  # outputs: gradients of positions and influence; sums of the pieces
    H, LH, N, M, D, k, pieces, sO,  # shapes
    HAS_INFLUENCE: tl.constexpr,
    BN: tl.constexpr, HUB: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_n = tl.cdiv(N + pieces, BN)
    pid = tl.program_id(0)
    group = (pid // blocks_n).to(tl.int64)
    list_ = (group // H) * LH + group % LH
    turn = (pid % blocks_n) * BN + tl.arange(0, BN)
    n, first, count, own, piece = _edges_of(STARTS, ORDER, PIECES, NUMBERS, turn, list_, N, pieces, sO, HUB)
    P += group * N * D
    Q += group * M * D
    EDGES += list_ * M * k
    ES += group * M * k
    sigma = tl.load(S + group % H)
    place = group * pieces + turn - N
    most = tl.max(count, axis=0)
    for a in range(D):
        p = tl.load(P + n * D + a, mask=n >= 0, other=0.0)
        acc = tl.zeros((BN,), P.dtype.element_ty)
        for t in range(most):
            live = t < count
            edge = tl.load(EDGES + first + t, mask=live, other=0)
            slope = tl.load(ES + edge, mask=live, other=0.0)
            step = tl.load(Q + (edge // k) * D + a, mask=live, other=0.0) - p
            acc += tl.where(live, slope * step, 0.0)  # p may be NaN where nobody lists it
        acc = acc / (sigma * sigma)
        tl.store(GP + (group * N + n) * D + a, acc, mask=own)
        tl.store(PARTS + place * D + a, acc, mask=piece)
    if HAS_INFLUENCE:
        acc = tl.zeros((BN,), P.dtype.element_ty)
        for t in range(most):
            live = t < count
            edge = tl.load(EDGES + first + t, mask=live, other=0)
            acc += tl.load(EI + group * M * k + edge, mask=live, other=0.0)
        tl.store(GI + group * N + n, acc, mask=own)
        tl.store(PARTS_I + place, acc, mask=piece)


@triton.jit
def hub_kernel(
    PARTS, PIECES, NUMBERS,  # inputs: sums of the pieces [.., pieces, c], their entities (-1: none) and numbers
    OUT,  # output: the row of each hub
    H, LH, c, pieces, sOb, sOh, sOn,  # shapes and strides
    BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_c = tl.cdiv(c, BC)
    pid = tl.program_id(0)
    group = (pid // (pieces * blocks_c)).to(tl.int64)
    piece = (pid // blocks_c) % pieces
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    b, h = group // H, group % H
    PIECES += (b * LH + h % LH) * pieces
    n = tl.load(PIECES + piece)
    if (n >= 0) & (tl.load(NUMBERS + (b * LH + h % LH) * pieces + piece) == 0):
        acc = tl.zeros((BC,), PARTS.dtype.element_ty)
        more = piece < pieces
        while more:
            acc += tl.load(PARTS + (group * pieces + piece) * c + x, mask=x < c, other=0.0)
            piece += 1
            more = tl.load(PIECES + piece, mask=piece < pieces, other=-1) == n
        tl.store(OUT + b * sOb + h * sOh + n * sOn + x, acc.to(OUT.dtype.element_ty), mask=x < c)


# ---- launcher -------------------------------------------------------------------------------------------------------
def _only(wanted: int, *grads: Tensor) -> tuple[Tensor, ...]:
    """Bit i of `wanted` keeps grads[i]; the others become empty."""
    return tuple(x if wanted >> i & 1 else x.new_empty(0) for i, x in enumerate(grads))


def gaussian_gather_backward(
    grad: Tensor, positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor,
    influence: Tensor | None, sq_dists: Tensor | None, query_order: Tensor | None, entity_order: Tensor | None,
    starts: Tensor | None, edges: Tensor | None, normalize: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, N, D = positions.shape
    LH, M, k = indices.shape[1:]
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
    order, step = order_or_all(query_order, M, indices)
    backward_along_kernel[(B * H * triton.cdiv(M, rows),)](
        values, indices, grad, order,
        edge_slope,
        H, LH, N, M, c, k, step, *row_strides(values), *row_strides(grad),
        BM=rows, BC=channels, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    backward_edges_kernel[(B * H * triton.cdiv(M, 128),)](
        positions, queries, indices, sigma, influence if has_influence else positions,
        edge_weight, edge_slope, edge_influence, grad_queries, sigma_rows,
        H, LH, N, M, D, k,
        HAS_INFLUENCE=has_influence, NORMALIZE=normalize, BM=128, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    if starts is None:
        if entity_order is None and N == M and queries.data_ptr() == positions.data_ptr():
            entity_order = query_order
        starts, edges = transpose_neighbors(indices, query_order, entity_order, N)
    order, step = order_or_all(entity_order, N, indices)
    entity, number = hub_pieces(starts, M * k)
    pieces = entity.shape[2]

    def add_pieces(parts: Tensor, out: Tensor) -> None:
        if pieces:
            n_channels = parts.shape[3]
            hub_kernel[(B * H * pieces * triton.cdiv(n_channels, 128),)](
                parts, entity, number,
                out,
                H, LH, n_channels, pieces, *row_strides(out),
                BC=128, num_warps=4, **NO_SPILLS,
            )  # fmt: skip

    if c > 0 and wanted & 4:
        parts = positions.new_empty(B, H, pieces, c)
        backward_values_kernel[(B * H * triton.cdiv(N + pieces, rows) * triton.cdiv(c, channels),)](
            grad, starts, edges, edge_weight, order, entity, number,
            grad_values, parts,
            H, LH, N, M, c, k, pieces, step, *row_strides(grad), *row_strides(grad_values),
            BN=rows, BC=channels, HUB=HUB, num_warps=4, **NO_SPILLS,
        )  # fmt: skip
        add_pieces(parts, grad_values)
    if wanted & (1 | 16):
        parts, parts_influence = positions.new_empty(B, H, pieces, D), positions.new_empty(B, H, pieces, 1)
        backward_positions_kernel[(B * H * triton.cdiv(N + pieces, 128),)](
            positions, queries, sigma, starts, edges, edge_slope, edge_influence, order, entity, number,
            grad_positions, grad_influence, parts, parts_influence,
            H, LH, N, M, D, k, pieces, step,
            HAS_INFLUENCE=has_influence, BN=128, HUB=HUB, num_warps=4, **NO_SPILLS,
        )  # fmt: skip
        add_pieces(parts, grad_positions)
        if has_influence:
            add_pieces(parts_influence, grad_influence.unsqueeze(-1))
    return _only(wanted, grad_positions, grad_queries, grad_values, sigma_rows.sum((0, 2)), grad_influence)
