"""The short convolution in Triton: one pass over the entities, forward and backward.

With s bytes a value an entity moves 2 s d bytes forward and 3 s d backward, where the first cache gives what a tile
reads W times, and 4 W d / BN bytes of sums for the weight's gradient beside them. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def where(N, d, BN: tl.constexpr, BC: tl.constexpr):
    """Which tile a program has: its sequence, its block of entities, their numbers, their channels."""
    blocks_n, blocks_c = tl.cdiv(N, BN), tl.cdiv(d, BC)
    pid = tl.program_id(0)
    b = (pid // (blocks_n * blocks_c)).to(tl.int64)
    block = (pid // blocks_c) % blocks_n
    n = block * BN + tl.arange(0, BN).to(tl.int64)
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    return b, block, n, x


@triton.jit
def places_of(P, n, N, PACKED: tl.constexpr):
    """How many entities of the same sequence come before these; -1 beyond the last one.

    Wrong offsets, at which nobody looks on a GPU, may say more than there are: whoever looks back asks n as well.
    """
    return tl.load(P + n, mask=n < N, other=-1) if PACKED else tl.where(n < N, n, -1)


@triton.jit
def forward_kernel(
    X, C, P,  # inputs: entities, weight [W, d], places [N]
    Y,  # output
    N, d, W, sXb, sXn,  # shapes and strides
    PACKED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    b, _, n, x = where(N, d, BN, BC)
    channels = x < d
    place = places_of(P, n, N, PACKED)
    total = tl.zeros((BN, BC), C.dtype.element_ty)
    for t in range(W):
        live = ((n >= t) & (place >= t))[:, None] & channels[None, :]
        c = tl.load(C + t * d + x, mask=channels, other=0.0)
        earlier = tl.load(X + b * sXb + (n - t)[:, None] * sXn + x[None, :], mask=live, other=0.0)
        total += c[None, :] * earlier.to(total.dtype)
    inside = (n < N)[:, None] & channels[None, :]
    tl.store(Y + b * N * d + n[:, None] * d + x[None, :], total.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    G, X, C, P,  # inputs: gradient, entities, weight [W, d], places [N]
    GX, GC,  # outputs: gradient of the entities; sums for that of the weight [B, blocks, W, d]
    N, d, W, sGb, sGn, sXb, sXn,  # shapes and strides
    PACKED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    b, block, n, x = where(N, d, BN, BC)
    channels = x < d
    inside = (n < N)[:, None] & channels[None, :]
    place = places_of(P, n, N, PACKED)
    G += b * sGb
    own = tl.load(G + n[:, None] * sGn + x[None, :], mask=inside, other=0.0).to(C.dtype.element_ty)
    total = tl.zeros((BN, BC), C.dtype.element_ty)
    GC += (b * tl.cdiv(N, BN) + block) * W * d
    for t in range(W):
        c = tl.load(C + t * d + x, mask=channels, other=0.0)
        live = (places_of(P, n + t, N, PACKED) >= t)[:, None] & channels[None, :]
        later = tl.load(G + (n + t)[:, None] * sGn + x[None, :], mask=live, other=0.0)
        total += c[None, :] * later.to(total.dtype)
        live = ((n >= t) & (place >= t))[:, None] & channels[None, :]
        earlier = tl.load(X + b * sXb + (n - t)[:, None] * sXn + x[None, :], mask=live, other=0.0)
        tl.store(GC + t * d + x, tl.sum(own * earlier.to(total.dtype), axis=0), mask=channels)
    tl.store(GX + b * N * d + n[:, None] * d + x[None, :], total.to(GX.dtype.element_ty), mask=inside)


# ---- launchers ------------------------------------------------------------------------------------------------------
TILE = {"BN": 32, "BC": 64}


def _registers(dtype: torch.dtype) -> dict[str, int]:
    """The backward pass in float64 wants more of them, or spills."""
    return NO_SPILLS and {"maxnreg": 224} if dtype == torch.float64 else NO_SPILLS


def _grid(B: int, N: int, d: int) -> tuple[int]:
    return (B * triton.cdiv(N, TILE["BN"]) * triton.cdiv(d, TILE["BC"]),)


def short_convolution(x: Tensor, weight: Tensor, place: Tensor | None) -> Tensor:
    B, N, d = x.shape
    out = x.new_empty(B, N, d)
    if out.numel() == 0:
        return out
    forward_kernel[_grid(B, N, d)](
        x, weight, weight if place is None else place,
        out,
        N, d, len(weight), x.stride(0), x.stride(1),
        PACKED=place is not None, **TILE, num_warps=8, **NO_SPILLS,
    )  # fmt: skip
    return out


def short_convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, d = x.shape
    W, _ = weight.shape
    grad_x = x.new_empty(B, N, d)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    sums = weight.new_empty(B * triton.cdiv(N, TILE["BN"]), W, d)
    backward_kernel[_grid(B, N, d)](
        grad, x, weight, weight if place is None else place,
        grad_x, sums,
        N, d, W, grad.stride(0), grad.stride(1), x.stride(0), x.stride(1),
        PACKED=place is not None, **TILE, num_warps=8, **_registers(x.dtype),
    )  # fmt: skip
    return grad_x, sums.sum(0)
