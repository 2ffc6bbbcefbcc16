"""Gaussian gather in Triton, forward. A program serves some channels of queries that follow each other in the order;
nothing is tuned at run time, so that a new length costs nothing. A list is what heads that share their neighbours
share: [B, LH] lists for [B, H] groups, LH = H or 1. Not yet run on a GPU."""

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
    P, Q, V, I, S, W, ORDER,  # inputs: positions, queries, values, indices, sigma, influence, order  # noqa: E741
    Y,  # output
    H, LH, N, M, D, c, k, sO, sVb, sVh, sVn, sYb, sYh, sYm,  # shapes and strides
    HAS_INFLUENCE: tl.constexpr, NORMALIZE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_m, blocks_c = tl.cdiv(M, BM), tl.cdiv(c, BC)
    pid = tl.program_id(0)
    group = (pid // (blocks_m * blocks_c)).to(tl.int64)
    b, h = group // H, group % H
    list_ = b * LH + h % LH
    turn = ((pid // blocks_c) % blocks_m) * BM + tl.arange(0, BM)
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    rows, channels = turn < M, x < c
    m = tl.load(ORDER + list_ * sO + turn, mask=rows, other=0).to(tl.int64)
    P += group * N * D
    Q += group * M * D
    I += list_ * M * k  # noqa: E741
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


# ---- launcher -------------------------------------------------------------------------------------------------------
def tiles(c: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and channels of a program. A function of the channel count alone; every value it gives is compiled ahead of
    time by the tests."""
    channels = 32 if c <= 32 else 64 if c <= 64 else 128
    if dtype == torch.float64:
        channels = 32
    return {"rows": 512 // channels, "channels": channels}


def row_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def order_or_all(order: Tensor | None, n: int, like: Tensor) -> tuple[Tensor, int]:
    """An order and how far apart those of two lists are. Without one, things come as they are."""
    if order is None:
        return torch.arange(n, dtype=torch.int32, device=like.device), 0
    return order, n


def gaussian_gather(
    positions: Tensor, queries: Tensor, values: Tensor, indices: Tensor, sigma: Tensor, influence: Tensor | None,
    sq_dists: Tensor | None, query_order: Tensor | None, normalize: bool,
) -> Tensor:  # fmt: skip
    """`sq_dists` is left alone: a load of k distances costs what a load of k positions from the cache does."""
    B, H, N, D = positions.shape
    LH, M, k = indices.shape[1:]
    c = values.shape[3]
    out = values.new_empty(B, M, H, c).transpose(1, 2)
    if out.numel() == 0:
        return out
    tile = tiles(c, values.dtype)
    order, step = order_or_all(query_order, M, indices)
    grid = (B * H * triton.cdiv(M, tile["rows"]) * triton.cdiv(c, tile["channels"]),)
    forward_kernel[grid](
        positions, queries, values, indices, sigma, positions if influence is None else influence, order,
        out,
        H, LH, N, M, D, c, k, step, *row_strides(values), *row_strides(out),
        HAS_INFLUENCE=influence is not None, NORMALIZE=normalize,
        BM=tile["rows"], BC=tile["channels"], num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    return out
