"""FlowNorm in Triton: one pass over the states; a kernel for the means before it, one for their gradient after it.

The means are summed in float64 and in an order that the shape decides. A block of `BLOCK` entities adds up what lies
before it (after it, for the gradient) on its own: the energies themselves up to `DIRECT` entities, sums of blocks
beyond. So no later entity can change a bit of an earlier one, and nobody waits for another program.

With s bytes a state an entity moves 2 s d bytes forward and 3 s d backward, and some 20 beside them. Not yet run on a
GPU; a prototype was.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def sums_kernel(
    E, L,  # inputs: energy [B, N], lengths
    P,  # output: sums of blocks [B, blocks]
    N,  # shape
    HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    n = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    length = tl.minimum(tl.load(L + b), N) if HAS_LENGTHS else N
    energy = tl.load(E + b * N + n, mask=n < length, other=0.0).to(tl.float64)
    tl.store(P + pid, tl.sum(energy, axis=0))


@triton.jit
def scale_kernel(
    E, P, L,  # inputs: energy [B, N], sums of blocks [B, blocks] (unless DIRECT), lengths
    R,  # output: 1 / sqrt(mean + eps) [B, N]; 0 where there is padding
    N, eps: tl.float64,
    MODE: tl.constexpr, DIRECT: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    b, block = pid // blocks, pid % blocks
    n = block * BLOCK + tl.arange(0, BLOCK)
    length = tl.minimum(tl.load(L + b), N) if HAS_LENGTHS else N
    inside = n < length
    mean = tl.load(E + b * N + n, mask=inside, other=0.0).to(tl.float64)
    if MODE != "entity":
        if DIRECT:
            P = E + b * N
            stop = tl.minimum(block * BLOCK, length) if MODE == "causal" else length
        else:
            P += b * blocks
            stop = block if MODE == "causal" else blocks
        lanes = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, stop, BLOCK):
            k = first + tl.arange(0, BLOCK)
            lanes += tl.load(P + k, mask=k < stop, other=0.0).to(tl.float64)
        total = tl.sum(lanes, axis=0)
        if MODE == "causal":
            mean = (total + tl.cumsum(mean, axis=0)) / (n + 1).to(tl.float64)
        else:
            mean = tl.zeros((BLOCK,), tl.float64) + total / tl.maximum(length, 1)
    scale = tl.where(inside, 1.0 / tl.sqrt(mean + eps), 0.0)
    tl.store(R + b * N + n, scale.to(R.dtype.element_ty), mask=n < N)


@triton.jit
def forward_kernel(
    S, R, L,  # inputs: states, scale [B, N], lengths
    Y,  # output
    N, d, sSb, sSn,  # shapes and strides
    HAS_LENGTHS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_n, blocks_c = tl.cdiv(N, BN), tl.cdiv(d, BC)
    pid = tl.program_id(0)
    b = (pid // (blocks_n * blocks_c)).to(tl.int64)
    n = ((pid // blocks_c) % blocks_n) * BN + tl.arange(0, BN).to(tl.int64)
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    rows, channels = n < N, x < d
    live = rows & (n < tl.load(L + b)) if HAS_LENGTHS else rows
    scale = tl.load(R + b * N + n, mask=live, other=0.0)
    s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=live[:, None] & channels[None, :], other=0.0)
    y = (scale[:, None] * s.to(scale.dtype)).to(Y.dtype.element_ty)
    tl.store(Y + b * N * d + n[:, None] * d + x[None, :], y, mask=rows[:, None] & channels[None, :])


@triton.jit
def by_mean(scale, along, n, CAUSAL: tl.constexpr):
    """The derivative by the mean, from that by the scale; where means run, shared out to what each is the mean of."""
    scale64 = scale.to(tl.float64)
    found = -0.5 * scale64 * scale64 * scale64 * along.to(tl.float64)
    if CAUSAL:
        found *= (1.0 / (n + 1).to(scale.dtype)).to(tl.float64)
    return found


@triton.jit
def backward_kernel(
    G, S, R, L,  # inputs: gradient, states, scale [B, N], lengths
    GS, A, P,  # outputs: gradient of states; <grad_i, s_i> [B, N]; sums of the derivatives by the mean [B, chunks]
    N, d, sGb, sGn, sSb, sSn, chunk,  # shapes and strides; entities per program
    MODE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    chunks = tl.cdiv(N, chunk)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    length = tl.minimum(tl.load(L + b), N) if HAS_LENGTHS else N
    total = tl.zeros((BN,), tl.float64)
    for first in range(0, chunk, BN):
        n = (pid % chunks) * chunk + first + tl.arange(0, BN)
        rows, live = n < N, n < length
        scale = tl.load(R + b * N + n, mask=live, other=0.0)
        along = tl.zeros((BN,), R.dtype.element_ty)
        for start in range(0, d, BC):
            x = start + tl.arange(0, BC)
            inside = live[:, None] & (x < d)[None, :]
            g = tl.load(G + b * sGb + n[:, None] * sGn + x[None, :], mask=inside, other=0.0).to(scale.dtype)
            s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=inside, other=0.0).to(scale.dtype)
            along += tl.sum(g * s, axis=1)
            out = (scale[:, None] * g).to(GS.dtype.element_ty)
            tl.store(GS + b * N * d + n[:, None] * d + x[None, :], out, mask=rows[:, None] & (x < d)[None, :])
        tl.store(A + b * N + n, along, mask=rows)
        if MODE != "entity":
            total += by_mean(scale, along, n, MODE == "causal")
    if MODE != "entity":
        tl.store(P + pid, tl.sum(total, axis=0))


@triton.jit
def energy_kernel(
    R, A, P, L,  # inputs: scale, <grad_i, s_i> [B, N]; sums of the derivatives by the mean [B, chunks]; lengths
    GE,  # output: gradient of energy [B, N]
    N, chunk,  # shape; entities per sum, a divisor of BLOCK
    MODE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks, chunks = tl.cdiv(N, BLOCK), tl.cdiv(N, chunk)
    pid = tl.program_id(0).to(tl.int64)
    b, block = pid // blocks, pid % blocks
    n = block * BLOCK + tl.arange(0, BLOCK)
    length = tl.minimum(tl.load(L + b), N) if HAS_LENGTHS else N
    inside = n < length
    scale = tl.load(R + b * N + n, mask=inside, other=0.0)
    grad = by_mean(scale, tl.load(A + b * N + n, mask=inside, other=0.0), n, MODE == "causal")
    if MODE != "entity":
        lanes = tl.zeros((BLOCK,), tl.float64)
        begin = (block + 1) * (BLOCK // chunk) if MODE == "causal" else 0
        for first in range(begin, chunks, BLOCK):
            k = first + tl.arange(0, BLOCK)
            lanes += tl.load(P + b * chunks + k, mask=k < chunks, other=0.0)
        total = tl.sum(lanes, axis=0)
        if MODE == "causal":
            grad = total + tl.cumsum(grad, axis=0, reverse=True)
        else:
            grad = tl.zeros((BLOCK,), tl.float64) + total / tl.maximum(length, 1)
    tl.store(GE + b * N + n, tl.where(inside, grad, 0.0).to(GE.dtype.element_ty), mask=n < N)


# ---- launchers ------------------------------------------------------------------------------------------------------
BLOCK = 1024
DIRECT = 16_384  # so many energies are read by every block, rather than summed by a kernel of their own


def row_tile(d: int) -> dict[str, int]:
    """Whole rows, up to 512 channels. Few values: all of them are compiled ahead of time by the tests."""
    BC = min(max(triton.next_power_of_2(d), 64), 512)
    return {"BN": max(1024 // BC, 4), "BC": BC}


def backward_warps(tile: dict[str, int]) -> int:
    return 8 if tile["BC"] == 512 else 4


def backward_registers(tile: dict[str, int]) -> dict[str, int]:
    """Narrow rows are unrolled: ptxas wants more registers for them, or spills."""
    return NO_SPILLS and {"maxnreg": 224} if tile["BC"] <= 128 else NO_SPILLS


def chunk_of(N: int, block: int) -> int:
    """Entities per program in the backward pass: one tile, more where a sequence had over 4,096 of them."""
    return min(max(triton.next_power_of_2(triton.cdiv(N, 4096)), block), BLOCK)


def _scale(energy: Tensor, lengths: Tensor | None, eps: float, mode: str) -> Tensor:
    B, N = energy.shape
    scale = torch.empty_like(energy)
    blocks, direct = triton.cdiv(N, BLOCK), N <= DIRECT or mode == "entity"
    options = {"HAS_LENGTHS": lengths is not None, "BLOCK": BLOCK, "num_warps": 4}
    lengths = energy if lengths is None else lengths
    sums = energy
    if not direct:
        sums = energy.new_empty(B, blocks, dtype=torch.float64)
        sums_kernel[(B * blocks,)](energy, lengths, sums, N, **options)
    scale_kernel[(B * blocks,)](energy, sums, lengths, scale, N, eps, MODE=mode, DIRECT=direct, **options)
    return scale


def flow_norm(states: Tensor, energy: Tensor, lengths: Tensor | None, eps: float, mode: str) -> Tensor:
    B, N, d = states.shape
    out = states.new_empty(B, N, d)
    if out.numel() == 0:
        return out
    scale = _scale(energy, lengths, eps, mode)
    tile = row_tile(d)
    forward_kernel[(B * triton.cdiv(N, tile["BN"]) * triton.cdiv(d, tile["BC"]),)](
        states, scale, scale if lengths is None else lengths,
        out,
        N, d, states.stride(0), states.stride(1),
        HAS_LENGTHS=lengths is not None, **tile, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    return out


def flow_norm_backward(
    grad: Tensor, states: Tensor, energy: Tensor, lengths: Tensor | None, eps: float, mode: str
) -> tuple[Tensor, Tensor]:
    B, N, d = states.shape
    grad_states, grad_energy = states.new_empty(B, N, d), torch.empty_like(energy)
    if B * N == 0:
        return grad_states, grad_energy
    scale, along = _scale(energy, lengths, eps, mode), torch.empty_like(energy)
    tile = row_tile(d)
    chunk = chunk_of(N, tile["BN"])
    chunks = triton.cdiv(N, chunk)
    sums = energy.new_empty(B, chunks, dtype=torch.float64)
    options = {"MODE": mode, "HAS_LENGTHS": lengths is not None}
    lengths = energy if lengths is None else lengths
    backward_kernel[(B * chunks,)](
        grad, states, scale, lengths,
        grad_states, along, sums,
        N, d, grad.stride(0), grad.stride(1), states.stride(0), states.stride(1), chunk,
        **options, **tile, num_warps=backward_warps(tile), **backward_registers(tile),
    )  # fmt: skip
    energy_kernel[(B * triton.cdiv(N, BLOCK),)](
        scale, along, sums, lengths,
        grad_energy,
        N, chunk,
        **options, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return grad_states, grad_energy
