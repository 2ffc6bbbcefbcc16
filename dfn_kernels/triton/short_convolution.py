"""The short convolution in Triton: one pass over the entities of all sequences, forward and backward.

With s bytes a value an entity moves 2 s d bytes forward and 3 s d backward, where the first cache gives what a tile
reads W times. For the weight's gradient every program leaves W sums a channel, of BN entities or, with W of 16 and
more, of so many times W / 8 that they are at most as large as x. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def rows_of(block, R, N, BN: tl.constexpr):
    """A block of entities of all sequences: where they lie, which there are, their sequences, their numbers in them."""
    row = (tl.zeros((BN,), tl.int64) + block) * BN + tl.arange(0, BN)
    return row, row < R, row // N, row % N


@triton.jit
def places_of(P, n, live, PACKED: tl.constexpr):
    """How many entities of the same sequence come before these; -1 where there is none.

    Wrong offsets, at which nobody looks on a GPU, may say more than there are: whoever looks back asks n as well.
    """
    return tl.load(P + n, mask=live, other=-1) if PACKED else tl.where(live, n, -1)


@triton.jit
def forward_kernel(
    X, C, P,  # inputs: entities, weight [W, d], places [N]
    Y,  # output
    R, N, d, sXb, sXn,  # entities of all sequences, shapes and strides
    W: tl.constexpr, PACKED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_c = tl.cdiv(d, BC)
    block, x = tl.program_id(0) // blocks_c, (tl.program_id(0) % blocks_c) * BC + tl.arange(0, BC)
    row, rows, b, n = rows_of(block, R, N, BN)
    channels = x < d
    place = places_of(P, n, rows, PACKED)
    X += b[:, None] * sXb
    total = tl.zeros((BN, BC), C.dtype.element_ty)
    for t in range(W):
        live = ((n >= t) & (place >= t))[:, None] & channels[None, :]
        c = tl.load(C + t * d + x, mask=channels, other=0.0)
        earlier = tl.load(X + (n - t)[:, None] * sXn + x[None, :], mask=live, other=0.0)
        total += tl.where(live, c[None, :] * earlier.to(total.dtype), 0.0)
    y = Y + row[:, None] * d + x[None, :]
    tl.store(y, total.to(Y.dtype.element_ty), mask=rows[:, None] & channels[None, :])


@triton.jit
def backward_kernel(
    G, X, C, P,  # inputs: gradient, entities, weight [W, d], places [N]
    GX, GC,  # outputs: gradient of the entities; sums for that of the weight [groups of blocks, W, d]
    R, N, d, blocks, sGb, sGn, sXb, sXn,  # entities of all sequences, shapes, blocks in a group, strides
    W: tl.constexpr, PACKED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_c = tl.cdiv(d, BC)
    group, x = tl.program_id(0) // blocks_c, (tl.program_id(0) % blocks_c) * BC + tl.arange(0, BC)
    channels = x < d
    for block in range(group * blocks, (group + 1) * blocks):
        row, rows, b, n = rows_of(block, R, N, BN)
        total = tl.zeros((BN, BC), C.dtype.element_ty)
        for t in range(W):
            c = tl.load(C + t * d + x, mask=channels, other=0.0)
            live = (places_of(P, n + t, rows & (n + t < N), PACKED) >= t)[:, None] & channels[None, :]
            later = tl.load(G + b[:, None] * sGb + (n + t)[:, None] * sGn + x[None, :], mask=live, other=0.0)
            total += tl.where(live, c[None, :] * later.to(total.dtype), 0.0)
        gx = GX + row[:, None] * d + x[None, :]
        tl.store(gx, total.to(GX.dtype.element_ty), mask=rows[:, None] & channels[None, :])
    GC += group.to(tl.int64) * W * d
    for t in range(W):
        total = tl.zeros((BN, BC), C.dtype.element_ty)
        for block in range(group * blocks, (group + 1) * blocks):
            _, rows, b, n = rows_of(block, R, N, BN)
            live = ((n >= t) & (places_of(P, n, rows, PACKED) >= t))[:, None] & channels[None, :]
            own = tl.load(G + b[:, None] * sGb + n[:, None] * sGn + x[None, :], mask=live, other=0.0)
            earlier = tl.load(X + b[:, None] * sXb + (n - t)[:, None] * sXn + x[None, :], mask=live, other=0.0)
            total += own.to(total.dtype) * earlier.to(total.dtype)
        tl.store(GC + t * d + x, tl.sum(total, axis=0), mask=channels)


# ---- launchers ------------------------------------------------------------------------------------------------------
TILE = {"BN": 32, "BC": 64}
FOR_BACKWARD = NO_SPILLS and {"maxnreg": 224}  # which float64 wants, and channels that no 16 bytes divide


def short_convolution(x: Tensor, weight: Tensor, place: Tensor | None) -> Tensor:
    B, N, d = x.shape
    out = x.new_empty(B, N, d)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(B * N, TILE["BN"]) * triton.cdiv(d, TILE["BC"]),)
    forward_kernel[grid](
        x, weight, weight if place is None else place,
        out,
        B * N, N, d, x.stride(0), x.stride(1),
        W=len(weight), PACKED=place is not None, **TILE, num_warps=8, **NO_SPILLS,
    )  # fmt: skip
    return out


def short_convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, d = x.shape
    W, _ = weight.shape
    grad_x = x.new_empty(B, N, d)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    blocks = max(1, W // 8)
    groups = triton.cdiv(B * N, TILE["BN"] * blocks)
    sums = weight.new_empty(groups, W, d)
    backward_kernel[(groups * triton.cdiv(d, TILE["BC"]),)](
        grad, x, weight, weight if place is None else place,
        grad_x, sums,
        B * N, N, d, blocks, grad.stride(0), grad.stride(1), x.stride(0), x.stride(1),
        W=W, PACKED=place is not None, **TILE, num_warps=8, **FOR_BACKWARD,
    )  # fmt: skip
    return grad_x, sums.sum(0)
