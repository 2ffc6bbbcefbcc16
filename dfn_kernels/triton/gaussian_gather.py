"""Gaussian gather in Triton, forward: weights_kernel makes the weights of all edges, gather_kernel walks them with
whole rows in a tile and the walk unrolled, so that many rows are on their way at once. Nothing is tuned at run time.

A list is what heads that share their neighbours share: [B, LH] lists for [B, H] groups, LH = H or 1. An argument that
is not given is None in a kernel, too. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def _group(pid, blocks, H, LH):
    """What a program works on: group, batch, head, list, and its number within the group."""
    group = (pid // blocks).to(tl.int64)
    b, h = group // H, group % H
    return group, b, h, b * LH + h % LH, pid % blocks


@triton.jit
def _in_order(ORDER, turn, inside):
    """Who has its turn; the first where nobody has."""
    if ORDER is None:
        return tl.where(inside, turn, 0).to(tl.int64)
    else:
        return tl.load(ORDER + turn, mask=inside, other=0).to(tl.int64)


@triton.jit
def _width(sigma):
    """sigma within WIDTHS of reference/gaussian_gather.py."""
    low: tl.constexpr = 2.0**-496 if sigma.dtype == tl.float64 else 2.0**-56
    high: tl.constexpr = 2.0**511 if sigma.dtype == tl.float64 else 2.0**63
    size = tl.abs(sigma)
    width = tl.where(size < low, low, tl.where(size > high, high, size)).to(sigma.dtype)
    return tl.where(sigma < 0, -width, width)


@triton.jit
def _weights(
    P, Q, I, SQ, W, m, rows, s, scale, N, D, k,  # positions .. influence of the group; queries and slots  # noqa: E741
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Of queries m [BM], slots s [K]: entity, whether there is one, exponent, and weight without and with influence.

    With NORMALIZE exponents are relative to the row's nearest; where the weights sum to zero, all are zero.
    """
    at = m[:, None] * k + s[None, :]
    inside = rows[:, None] & (s < k)[None, :]
    j = tl.load(I + at, mask=inside, other=-1)
    valid = (j >= 0) & (j < N)
    sq_dist = tl.zeros(j.shape, Q.dtype.element_ty)
    if SQ is not None:
        sq_dist = tl.load(SQ + at, mask=valid, other=0.0)
    else:
        for start in range(0, D, 4):
            for u in tl.static_range(4):
                a = start + u
                q = tl.load(Q + m * D + a, mask=rows & (a < D), other=0.0)
                step = q[:, None] - tl.load(P + j * D + a, mask=valid & (a < D), other=0.0)
                sq_dist += step * step
    if NORMALIZE:  # before the scale, with which both may be infinite
        least = tl.min(tl.where(valid, sq_dist, float("inf")), axis=1)
        sq_dist -= tl.where(least == float("inf"), 0.0, least)[:, None]
    exponent = scale * sq_dist
    exponent = tl.where(valid, tl.where(exponent < -1e4, -1e4, exponent), float("-inf"))  # of either, exp is 0
    gauss = tl.exp(exponent)
    influence = tl.full(j.shape, 1.0, Q.dtype.element_ty)
    if W is not None:
        influence = tl.load(W + j, mask=valid, other=0.0)
    if NORMALIZE:
        total = tl.sum(gauss * influence, axis=1)
        gauss = gauss * tl.where(total != 0, 1.0 / tl.where(total == 0, 1.0, total), 0.0)[:, None]
    return j, valid, exponent, gauss, gauss * influence


@triton.jit
def _write_zeros(ZEROS):
    if ZEROS is not None:
        if tl.program_id(0) == 0:
            tl.store(ZEROS + tl.arange(0, 256), tl.zeros((256,), ZEROS.dtype.element_ty))


@triton.jit
def weights_kernel(
    P, Q, I, SQ, S, W,  # inputs: positions, queries, indices, squared distances, sigma, influence  # noqa: E741
    EW, ZEROS,  # outputs: weights [.., M, k], [256]
    H, LH, N, M, D, k,  # shapes
    NORMALIZE: tl.constexpr,
    BM: tl.constexpr, K: tl.constexpr,  # tunable; K >= k
):  # fmt: skip
    group, b, h, list_, block = _group(tl.program_id(0), tl.cdiv(M, BM), H, LH)
    m = block * BM + tl.arange(0, BM).to(tl.int64)
    s = tl.arange(0, K)
    rows = m < M
    width = _width(tl.load(S + h))
    if SQ is not None:
        SQ += group * M * k
    if W is not None:
        W += group * N
    _, _, _, _, weight = _weights(
        P + group * N * D, Q + group * M * D, I + list_ * M * k, SQ, W, m, rows, s, -0.5 / (width * width), N, D, k,
        NORMALIZE,
    )  # fmt: skip
    at = m[:, None] * k + s[None, :]
    tl.store(EW + group * M * k + at, weight, mask=rows[:, None] & (s < k)[None, :])
    _write_zeros(ZEROS)


@triton.jit
def _rows(base, row, stride, there, ZEROS, x, channels):
    """Rows of base, zeros where there is none: a mask by rows would cost registers, and so loads on their way."""
    offset = row.to(tl.int32).to(tl.int64) * stride  # 32 bits times 32: one instruction
    if ZEROS is None:
        at = tl.where(there, offset, 0)[:, None] + x[None, :]
        found = tl.load(base + at, mask=there[:, None] & channels[None, :], other=0.0)
    else:
        start = tl.where(there, base + offset, ZEROS)
        found = tl.load(start[:, None] + x[None, :], mask=channels[None, :], other=0.0)
    return found


@triton.jit
def gather_kernel(
    V, I, EW, ZEROS, ORDER,  # inputs: values, indices, weights of the edges, [BC] zeros, order of queries  # noqa: E741
    Y,  # output
    H, LH, N, M, c, k, sVb, sVh, sVn, sYb, sYh, sYm,  # shapes and strides
    BM: tl.constexpr, BC: tl.constexpr, U: tl.constexpr,  # tunable; U edges at once
):  # fmt: skip
    blocks_c = tl.cdiv(c, BC)
    group, b, h, list_, block = _group(tl.program_id(0), tl.cdiv(M, BM) * blocks_c, H, LH)
    turn = (block // blocks_c) * BM + tl.arange(0, BM)
    left = (block % blocks_c) * BC
    x = tl.arange(0, BC)
    rows, channels = turn < M, left + x < c
    if ORDER is not None:
        ORDER += list_ * M
    m = _in_order(ORDER, turn, rows)
    V += b * sVb + h * sVh + left
    I += list_ * M * k  # noqa: E741
    EW += group * M * k
    acc = tl.zeros((BM, BC), EW.dtype.element_ty)
    for start in range(0, k, U):
        for u in tl.static_range(U):
            at = m * k + tl.minimum(start + u, k - 1)
            j = tl.load(I + at)
            weight = tl.load(EW + at)
            there = (j >= 0) & (j < N) & (start + u < k)
            value = _rows(V, j, sVn, there, ZEROS, x, channels)
            acc += weight[:, None] * value.to(acc.dtype)
    Y += b * sYb + h * sYh + left
    tl.store(Y + m[:, None] * sYm + x[None, :], acc.to(Y.dtype.element_ty), mask=rows[:, None] & channels[None, :])


# ---- launcher -------------------------------------------------------------------------------------------------------
ROW_OF_ZEROS = not torch.version.hip  # whose compiler fails where one of two pointers is chosen; it gets a mask


def row_of_zeros(like: Tensor) -> Tensor | None:
    return like.new_empty(256) if ROW_OF_ZEROS else None


def as_values(zeros: Tensor | None, values: Tensor) -> Tensor | None:
    return None if zeros is None else zeros.view(values.dtype)


# Every value that these functions give is compiled ahead of time by the tests, up to 1024 channels and edges.
def tiles(c: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and channels of a program: whole rows up to 256 channels, 8 KiB in all."""
    most = 128 if dtype == torch.float64 else 256
    channels = min(max(triton.next_power_of_2(c), 32), most)
    if -c % channels >= 128:
        channels = 128
    return {"rows": min(8192 // (channels * dtype.itemsize), 32), "channels": channels}


def aligned(x: Tensor) -> bool:
    """Whether the compiler knows that it may read the rows of x 16 bytes at once, not number by number."""
    return all(n % 16 == 0 for n in (x.shape[3], *row_strides(x)))


def unrolled(k: int, x: Tensor) -> int:
    """Edges that are walked at once."""
    return (8 if k > 4 else 4) if aligned(x) else 2


def gather_tiles(x: Tensor) -> dict[str, int]:
    """Of gather_kernel. Read number by number, every number has an address and a mask in registers: fewer rows."""
    tile = tiles(x.shape[3], x.dtype)
    return {"BM": tile["rows"] if aligned(x) else tile["rows"] // 4, "BC": tile["channels"]}


def gather_options(x: Tensor) -> dict[str, int]:
    """What keeps ptxas from spilling, as compiling has shown: nothing where rows of many channels are read at once."""
    if x.dtype == torch.float64 and aligned(x):
        return limit(x.dtype)
    if aligned(x) and x.shape[3] > 32:
        return NO_SPILLS and {"maxnreg": 168} if x.shape[3] <= 64 and x.itemsize == 2 else {}
    return NO_SPILLS


def limit(dtype: torch.dtype) -> dict[str, int]:
    """On registers, of the other kernels."""
    return NO_SPILLS and {"maxnreg": 255 if dtype == torch.float64 else 128}


def edge_tiles(k: int) -> dict[str, int]:
    """Queries of a program that holds all of their edges, and edges of each."""
    width = 16 if k <= 16 else 64 if k <= 64 else 256 if k <= 256 else max(triton.next_power_of_2(k), 1024)
    return {"BM": max(512 // width, 1), "K": width}


def edge_warps(K: int) -> int:
    """Of a program with such tiles: what keeps ptxas from spilling up to 2048 edges, as compiling has shown."""
    return 4 if K <= 1024 else 8


def row_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def edge_weights(
    positions: Tensor, queries: Tensor, indices: Tensor, sigma: Tensor, influence: Tensor | None,
    sq_dists: Tensor | None, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights [B, H, M, k], 0 where there is no neighbour; and a row of zeros, to be read where there is none."""
    B, H, N, D = positions.shape
    LH, M, k = indices.shape[1:]
    weights, zeros = positions.new_empty(B, H, M, k), row_of_zeros(positions)
    if weights.numel():
        tile = edge_tiles(k)
        weights_kernel[(B * H * triton.cdiv(M, tile["BM"]),)](
            positions, queries, indices, sq_dists, sigma, influence,
            weights, zeros,
            H, LH, N, M, D, k,
            NORMALIZE=normalize, **tile, num_warps=edge_warps(tile["K"]), **limit(positions.dtype),
        )  # fmt: skip
    return weights, zeros


def gaussian_gather(
    positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor, influence: Tensor | None,
    sq_dists: Tensor | None, query_order: Tensor | None, normalize: bool,
) -> Tensor:  # fmt: skip
    B, H, N, c = values.shape
    LH, M, k = indices.shape[1:]
    out = values.new_empty(B, M, H, c).transpose(1, 2)
    if out.numel() == 0:
        return out
    weights, zeros = edge_weights(positions, queries, indices, sigma, influence, sq_dists, normalize)
    tile = gather_tiles(values)
    grid = (B * H * triton.cdiv(M, tile["BM"]) * triton.cdiv(c, tile["BC"]),)
    gather_kernel[grid](
        values, indices, weights, as_values(zeros, values), query_order,
        out,
        H, LH, N, M, c, k, *row_strides(values), *row_strides(out),
        **tile, U=unrolled(k, values), num_warps=4, **gather_options(values),
    )  # fmt: skip
    return out
