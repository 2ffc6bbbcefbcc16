"""Gaussian gather in Triton, backward, in two passes. By query: dots_kernel reads the values, once, and edges_kernel
makes of the dots what every edge weighs, and the gradients of queries and sigma. By entity: entities_kernel walks the
edges that point to each entity, once, for the gradients of values, positions and influence.

Lists longer than HUB are cut at multiples of HUB. A piece is served like an entity, into `parts`; hubs_kernel adds the
pieces in their order. So every sum has one order, whatever the lists, and the same bits come out in every run.
Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS
from .gather_plan import slot_bits, transpose_neighbors
from .gaussian_gather import (
    _group,
    _in_order,
    _rows,
    _weights,
    _width,
    _write_zeros,
    aligned,
    as_values,
    edge_tiles,
    edge_warps,
    edge_weights,
    limit,
    row_of_zeros,
    row_strides,
    tiles,
    unrolled,
)

HUB = 512  # edges


@triton.jit
def dots_kernel(
    V, I, G, ORDER,  # inputs: values, indices, gradient of the output, order of the queries  # noqa: E741
    A,  # output [.., M, k]: <g_m, v_j>, along which the weight of the edge moves the loss
    H, LH, N, M, c, k, sVb, sVh, sVn, sGb, sGh, sGm,  # shapes and strides
    BM: tl.constexpr, BC: tl.constexpr, K: tl.constexpr,  # tunable; K edges at once
):  # fmt: skip
    group, b, h, list_, block = _group(tl.program_id(0), tl.cdiv(M, BM), H, LH)
    turn = block * BM + tl.arange(0, BM)
    rows = turn < M
    if ORDER is not None:
        ORDER += list_ * M
    m = _in_order(ORDER, turn, rows)
    V += b * sVb + h * sVh
    G += b * sGb + h * sGh
    for first in range(0, k, K):
        s = first + tl.arange(0, K)
        at = m[:, None] * k + tl.minimum(s, k - 1)[None, :]
        j = tl.load(I + list_ * M * k + at)
        there = (j >= 0) & (j < N)
        row = tl.where(there, j, 0).to(tl.int32).to(tl.int64) * sVn
        dots = tl.zeros((BM, K), A.dtype.element_ty)
        for start in range(0, c, BC):
            x = start + tl.arange(0, BC)
            g = tl.load(G + (m * sGm)[:, None] + x[None, :], mask=(x < c)[None, :], other=0.0)
            v = tl.load(V + row[:, :, None] + x[None, None, :], mask=(x < c)[None, None, :], other=0.0)
            dots += tl.sum(g.to(dots.dtype)[:, None, :] * v.to(dots.dtype), axis=2)
        tl.store(A + group * M * k + at, tl.where(there, dots, 0.0), mask=rows[:, None] & (s < k)[None, :])


@triton.jit
def edges_kernel(
    P, Q, I, SQ, S, W, A,  # inputs  # noqa: E741
    EW, ES, EI,  # outputs by edge: weight, slope, influence's part
    GQ, GS, ZEROS,  # outputs: gradient of queries, of sigma by program; [256]
    H, LH, N, M, D, k,  # shapes
    NORMALIZE: tl.constexpr,
    BM: tl.constexpr, K: tl.constexpr,  # tunable; K >= k
):  # fmt: skip
    pid = tl.program_id(0)
    group, b, h, list_, block = _group(pid, tl.cdiv(M, BM), H, LH)
    m = block * BM + tl.arange(0, BM).to(tl.int64)
    s = tl.arange(0, K)
    rows = m < M
    P += group * N * D
    Q += group * M * D
    edges = group * M * k
    at = m[:, None] * k + s[None, :]
    inside = rows[:, None] & (s < k)[None, :]
    width = _width(tl.load(S + h))
    scale = -0.5 / (width * width)
    if SQ is not None:
        SQ += edges
    if W is not None:
        W += group * N
    j, valid, exponent, gauss, weight = _weights(P, Q, I + list_ * M * k, SQ, W, m, rows, s, scale, N, D, k, NORMALIZE)
    along = tl.load(A + edges + at, mask=inside, other=0.0)
    if NORMALIZE:
        along -= tl.sum(weight * along, axis=1)[:, None]  # what the sum of the weights takes back
    slope = weight * along
    if EW is not None:
        tl.store(EW + edges + at, weight, mask=inside)
    if ES is not None:
        tl.store(ES + edges + at, slope, mask=inside)
    if EI is not None:
        tl.store(EI + edges + at, gauss * along, mask=inside)
    if GS is not None:
        tl.store(GS + pid, tl.sum(slope * tl.where(valid, -2.0 * exponent, 0.0)) / width)
    _write_zeros(ZEROS)
    if GQ is not None:
        GQ += group * M * D
        moves = valid & (slope != 0)  # one too far may be infinitely so
        for start in range(0, D, 4):
            for u in tl.static_range(4):
                a = start + u
                q = tl.load(Q + m * D + a, mask=rows & (a < D), other=0.0)
                step = q[:, None] - tl.load(P + j * D + a, mask=valid & (a < D), other=0.0)
                grad_q = tl.sum(tl.where(moves, slope * step, 0.0), axis=1)
                tl.store(GQ + m * D + a, 2.0 * scale * grad_q, mask=rows & (a < D))


@triton.jit
def _share(STARTS, EDGES, I, ORDER, turn, N, k, shift, pieces, HUB: tl.constexpr):  # noqa: E741
    """What each row of a tile serves: entity, first edge, number of edges; whether it is a whole list; or a piece.

    Entities come first, in their order. Then come two places for every HUB edges: for the list of the first of them,
    and for that of the last if it begins among them. Other long lists than these two cannot be there.
    """
    own, piece = turn < N, (turn >= N) & (turn < N + pieces)
    place = turn - N
    cut = (place // 2).to(tl.int64) * HUB
    end = tl.load(STARTS + N)
    piece = piece & (cut < end)
    edge = tl.load(EDGES + tl.where(place % 2 == 0, cut, tl.minimum(cut + HUB, end) - 1), mask=piece, other=0)
    slot = (edge >> shift).to(tl.int64) * k + (edge & ((1 << shift) - 1))
    n = tl.where(own, _in_order(ORDER, turn, own), tl.load(I + slot, mask=piece, other=0))
    first = tl.load(STARTS + n, mask=own | piece, other=0)
    last = tl.load(STARTS + n + 1, mask=own | piece, other=0)
    long = last - first > HUB
    own, piece = own & (long == 0), piece & long & ((place % 2 == 0) | (first > cut))
    first = tl.where(piece, tl.maximum(first, cut), first)
    last = tl.where(piece, tl.minimum(last, cut + HUB), last)
    return n, first, ((last - first) * (own | piece).to(tl.int64)).to(tl.int32), own, piece


@triton.jit
def entities_kernel(
    P, Q, I, S, G, EW, ES, EI, ZEROS,  # inputs: as above, [BC] zeros  # noqa: E741
    STARTS, EDGES, ORDER,  # inputs: the transposed lists, order of the entities
    GV, GP, GI,  # outputs: gradients of values, positions, influence
    PARTS_V, PARTS_P, PARTS_I,  # outputs: sums of the pieces [.., pieces, (c or D)]
    H, LH, N, M, D, c, k, shift, pieces, sGb, sGh, sGm, sVb, sVh, sVn,  # shapes and strides
    HUB: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,  # tunable; U edges at once
):  # fmt: skip
    # A program has a block of the channels and a block of the dimensions, as far as there are any.
    blocks = tl.maximum(tl.maximum(tl.cdiv(c, BC), tl.cdiv(D, BD)), 1)
    group, b, h, list_, block = _group(tl.program_id(0), tl.cdiv(N + pieces, BN) * blocks, H, LH)
    turn = (block // blocks) * BN + tl.arange(0, BN)
    left = (block % blocks) * BC
    x = tl.arange(0, BC)
    a = (block % blocks) * BD + tl.arange(0, BD)
    channels, dims = left + x < c, (a < D)[None, :]
    if ORDER is not None:
        ORDER += list_ * N
    STARTS += list_ * (N + 1)
    EDGES += list_ * M * k
    n, first, count, own, piece = _share(STARTS, EDGES, I + list_ * M * k, ORDER, turn, N, k, shift, pieces, HUB)
    at = group * pieces + turn - N  # of a piece
    edges = group * M * k
    final = tl.cast(M, tl.int64) * k - 1
    real: tl.constexpr = S.dtype.element_ty
    values = tl.zeros((BN, BC), real)
    positions = tl.zeros((BN, BD), real)
    influence = tl.zeros((BN,), real)
    p = tl.zeros((BN, BD), real)
    if GV is not None:
        G += b * sGb + h * sGh + left
    if GP is not None:
        Q += group * M * D
        p = tl.load(P + ((group * N + n) * D)[:, None] + a[None, :], mask=dims, other=0.0)
    for start in range(0, tl.max(count), U):
        for u in tl.static_range(U):
            there = start + u < count
            edge = tl.load(EDGES + tl.minimum(first + (start + u), final))
            m = (edge >> shift).to(tl.int64)
            slot = edges + m * k + (edge & ((1 << shift) - 1))
            if GV is not None:
                weight = tl.where(there, tl.load(EW + slot), 0.0)
                g = _rows(G, m, sGm, there, ZEROS, x, channels)
                values += weight[:, None] * g.to(real)
            if GP is not None:
                step = tl.load(Q + (m * D)[:, None] + a[None, :], mask=dims, other=0.0) - p
                slope = tl.where(there, tl.load(ES + slot), 0.0)[:, None]
                positions += tl.where(slope != 0, slope * step, 0.0)  # one too far may be infinitely so
            if GI is not None:
                influence += tl.where(there, tl.load(EI + slot), 0.0)
    if GV is not None:
        GV += b * sVb + h * sVh + left
        value = values.to(GV.dtype.element_ty)
        tl.store(GV + (n * sVn)[:, None] + x[None, :], value, mask=own[:, None] & channels[None, :])
        tl.store(PARTS_V + (at * c + left)[:, None] + x[None, :], values, mask=piece[:, None] & channels[None, :])
    if GP is not None:
        width = _width(tl.load(S + h))
        positions = positions / (width * width)
        tl.store(GP + ((group * N + n) * D)[:, None] + a[None, :], positions, mask=own[:, None] & dims)
        tl.store(PARTS_P + (at * D)[:, None] + a[None, :], positions, mask=piece[:, None] & dims)
    if GI is not None:
        once = left == 0
        tl.store(GI + group * N + n, influence, mask=own & once)
        tl.store(PARTS_I + at, influence, mask=piece & once)


@triton.jit
def _sum_pieces(PARTS, b, last, inside, n_columns, x, R: tl.constexpr, BC: tl.constexpr):
    """Sum of a hub's pieces, in columns x: those of blocks b .. last, of which the first has its place at b.

    `inside`: whether the hub began in the block rather than with it."""
    total = tl.zeros((R, BC), PARTS.dtype.element_ty)
    for start in range(b, last + 1, R):
        block = start + tl.arange(0, R)[:, None]
        place = 2 * block + (inside & (block == b)).to(tl.int32)
        total += tl.load(PARTS + place * n_columns + x, mask=(block <= last) & (x < n_columns), other=0.0)
    return tl.sum(total, axis=0)[None, :]


@triton.jit
def hubs_kernel(
    I, STARTS, EDGES, PARTS_V, PARTS_P, PARTS_I,  # inputs  # noqa: E741
    GV, GP, GI,  # outputs: the rows of hubs
    H, LH, N, M, D, c, k, shift, pieces, sVb, sVh, sVn,  # shapes and strides
    HUB: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,  # tunable; R pieces at once
):  # fmt: skip
    blocks = tl.maximum(tl.maximum(tl.cdiv(c, BC), tl.cdiv(D, BD)), 1)
    group, b, h, list_, block = _group(tl.program_id(0), (pieces // 2) * blocks, H, LH)
    STARTS += list_ * (N + 1)
    begin = (block // blocks).to(tl.int64)
    end = tl.load(STARTS + N)
    if (begin + 1) * HUB <= end:  # a hub fills the block that it begins in
        edge = tl.load(EDGES + list_ * M * k + (begin + 1) * HUB - 1).to(tl.int64)
        n = tl.load(I + (list_ * M + (edge >> shift)) * k + (edge & ((1 << shift) - 1)))
        first, last = tl.load(STARTS + n), tl.load(STARTS + n + 1)
        if (first >= begin * HUB) & (last - first > HUB):
            inside = first > begin * HUB
            final = (last - 1) // HUB
            x = (block % blocks) * BC + tl.arange(0, BC)[None, :]
            a = (block % blocks) * BD + tl.arange(0, BD)[None, :]
            if GV is not None:
                total = _sum_pieces(PARTS_V + group * pieces * c, begin, final, inside, c, x, R, BC)
                tl.store(GV + b * sVb + h * sVh + n * sVn + x, total.to(GV.dtype.element_ty), mask=x < c)
            if GP is not None:
                total = _sum_pieces(PARTS_P + group * pieces * D, begin, final, inside, D, a, R, BD)
                tl.store(GP + (group * N + n) * D + a, total, mask=a < D)
            if GI is not None:
                one = tl.arange(0, 1)[None, :]
                total = _sum_pieces(PARTS_I + group * pieces, begin, final, inside, 1, one, R, 1)
                tl.store(GI + group * N + n + one, total, mask=block % blocks == 0)


# ---- launcher -------------------------------------------------------------------------------------------------------
def dots_tiles(values: Tensor, grad: Tensor) -> dict[str, int]:
    """Rows of 512 bytes at most, which a warp reads at once: a sum over a row then stays within the warp.

    Read number by number, every number of a tile has an address and a mask in registers: a quarter of the rows."""
    size = values.dtype.itemsize
    channels = min(tiles(values.shape[3], values.dtype)["channels"], 512 // size)
    rows = min(4096 // (channels * size), 32)
    return {"BM": rows if aligned(values) and aligned(grad) else rows // 4, "BC": channels, "K": 4}


def dims_tile(D: int) -> int:
    return 4 if D <= 4 else 16


def entities_options(channels: int, influence: bool) -> dict[str, int]:
    """A limit on registers above what a tile needs, as compiling has shown: ptxas spills without one."""
    return NO_SPILLS and {"maxnreg": 128 if channels <= 64 and not influence else 192}


def _by_query(
    grad, positions, queries, values, indices, sigma, influence, sq_dists, query_order, normalize, wanted
) -> tuple[Tensor | None, ...]:
    """Weight, slope and influence's part of every edge, a row of zeros; gradients of queries and sigma.

    What nobody wants is None."""
    B, H, N, D = positions.shape
    LH, M, k = indices.shape[1:]
    c = values.shape[3]
    if wanted == 4:
        weights, zeros = edge_weights(positions, queries, indices, sigma, influence, sq_dists, normalize)
        return weights, None, None, zeros, None, None

    def edges_if(bit: int) -> Tensor | None:
        return positions.new_empty(B, H, M, k) if wanted & bit else None

    along, weights, slopes, parts = positions.new_empty(B, H, M, k), edges_if(4), edges_if(1), edges_if(16)
    zeros = row_of_zeros(positions)
    tile = dots_tiles(values, grad)
    dots_kernel[(B * H * triton.cdiv(M, tile["BM"]),)](
        values, indices, grad, query_order,
        along,
        H, LH, N, M, c, k, *row_strides(values), *row_strides(grad),
        **tile, num_warps=4, **limit(values.dtype),
    )  # fmt: skip
    tile = edge_tiles(k)
    programs = triton.cdiv(M, tile["BM"])
    grad_queries = torch.empty_like(queries) if wanted & 2 else None
    grad_sigma = positions.new_empty(B, H, programs) if wanted & 8 else None
    edges_kernel[(B * H * programs,)](
        positions, queries, indices, sq_dists, sigma, influence, along,
        weights, slopes, parts, grad_queries, grad_sigma, zeros,
        H, LH, N, M, D, k,
        NORMALIZE=normalize, **tile, num_warps=edge_warps(tile["K"]), **limit(positions.dtype),
    )  # fmt: skip
    return weights, slopes, parts, zeros, grad_queries, None if grad_sigma is None else grad_sigma.sum((0, 2))


def _by_entity(
    grad,
    positions,
    queries,
    values,
    indices,
    sigma,
    weights,
    slopes,
    parts,
    zeros,
    entity_order,
    starts,
    edges,
    wanted,
) -> tuple[Tensor | None, ...]:
    """Gradients of values, positions and influence; what nobody wants is None."""
    B, H, N, D = positions.shape
    LH, M, k = indices.shape[1:]
    c = values.shape[3]
    pieces = 2 * triton.cdiv(M * k, HUB) if M * k > HUB else 0
    grad_values = values.new_empty(B, N, H, c).transpose(1, 2) if wanted & 4 else None
    grad_positions = torch.empty_like(positions) if wanted & 1 else None
    grad_influence = positions.new_empty(B, H, N) if wanted & 16 else None
    parts_values = positions.new_empty(B, H, pieces, c) if wanted & 4 else None
    parts_positions = positions.new_empty(B, H, pieces, D) if wanted & 1 else None
    parts_influence = positions.new_empty(B, H, pieces) if wanted & 16 else None
    tile, dims, shift = tiles(c, values.dtype), dims_tile(D), slot_bits(k)
    strides = row_strides(values if grad_values is None else grad_values)

    def blocks(channels: int) -> int:
        return B * H * max(triton.cdiv(c, channels), triton.cdiv(D, dims), 1)

    rows = tile["rows"] // 4  # lists have different lengths: few rows wait for the longest
    entities_kernel[(triton.cdiv(N + pieces, rows) * blocks(tile["channels"]),)](
        positions, queries, indices, sigma, grad, weights, slopes, parts, as_values(zeros, values),
        starts, edges, entity_order,
        grad_values, grad_positions, grad_influence,
        parts_values, parts_positions, parts_influence,
        H, LH, N, M, D, c, k, shift, pieces, *row_strides(grad), *strides,
        HUB=HUB, BN=rows, BC=tile["channels"], BD=dims, U=unrolled(8, grad),
        num_warps=4, **entities_options(tile["channels"], grad_influence is not None),
    )  # fmt: skip
    if pieces:
        hubs_kernel[(pieces // 2 * blocks(128),)](
            indices, starts, edges, parts_values, parts_positions, parts_influence,
            grad_values, grad_positions, grad_influence,
            H, LH, N, M, D, c, k, shift, pieces, *strides,
            HUB=HUB, R=16, BC=128, BD=dims, num_warps=4, **NO_SPILLS,
        )  # fmt: skip
    return grad_values, grad_positions, grad_influence


def gaussian_gather_backward(
    grad: Tensor, positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor,
    influence: Tensor | None, sq_dists: Tensor | None, query_order: Tensor | None, entity_order: Tensor | None,
    starts: Tensor | None, edges: Tensor | None, normalize: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, N, _ = positions.shape
    M, c = indices.shape[2], values.shape[3]
    if influence is None:
        wanted &= ~16
    grads = [None] * 5
    if B * H * N * indices.numel() == 0:
        grad_values = values.new_zeros(B, N, H, c).transpose(1, 2)
        zeros = (
            *map(torch.zeros_like, (positions, queries)),
            grad_values,
            torch.zeros_like(sigma),
            sigma.new_zeros(B, H, N),
        )
        grads = [x if wanted >> i & 1 else None for i, x in enumerate(zeros)]
    elif wanted:
        weights, slopes, parts, zeros, grads[1], grads[3] = _by_query(
            grad, positions, queries, values, indices, sigma, influence, sq_dists, query_order, normalize, wanted
        )
        if wanted & (1 | 4 | 16):
            if starts is None:
                starts, edges = transpose_neighbors(indices, query_order, entity_order, N)
            if entity_order is None and N == M and queries.data_ptr() == positions.data_ptr():
                entity_order = query_order
            grads[2], grads[0], grads[4] = _by_entity(
                grad, positions, queries, values, indices, sigma, weights, slopes, parts, zeros, entity_order,
                starts, edges, wanted,
            )  # fmt: skip
    likes = positions, queries, values, sigma, sigma
    return tuple(like.new_empty(0) if x is None else x for x, like in zip(grads, likes, strict=True))
