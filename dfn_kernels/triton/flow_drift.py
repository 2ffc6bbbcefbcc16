"""Flow drift in Triton: one pass over the states, forward and backward. The H * D outputs of an entity (at most 32, see
`WIDE` in the op's file) lie in one tile, so a small matrix product does the work."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(
    S, P, W, B, A,  # inputs: states, positions, weight, bias, alpha
    PN, F, E,  # outputs: positions, flow, energy
    H, N, D, d, sSb, sSn,  # shapes and strides
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,  # BJ: H * D, padded; the others are tunable
):  # fmt: skip
    real: tl.constexpr = P.dtype.element_ty
    blocks_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    b = (pid // blocks_n).to(tl.int64)
    n = (pid % blocks_n) * BN + tl.arange(0, BN).to(tl.int64)
    j = tl.arange(0, BJ)
    h = j // D
    rows, outputs = n < N, j < H * D
    acc = tl.zeros((BN, BJ), real)
    for start in range(0, d, BC):
        x = start + tl.arange(0, BC)
        channels = x < d
        s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=rows[:, None] & channels[None, :], other=0.0)
        w = tl.load(W + j[None, :] * d + x[:, None], mask=outputs[None, :] & channels[:, None], other=0.0)
        acc += tl.dot(s.to(real), w, input_precision="ieee", out_dtype=real)
    if HAS_BIAS:
        acc += tl.load(B + j, mask=outputs, other=0.0)[None, :]
    inside = rows[:, None] & outputs[None, :]
    at = b * H * N * D + (h * N)[None, :].to(tl.int64) * D + n[:, None] * D + (j % D)[None, :]
    alpha = tl.load(A + h, mask=outputs, other=0.0)
    tl.store(F + at, acc, mask=inside)
    tl.store(PN + at, tl.load(P + at, mask=inside, other=0.0) + alpha[None, :] * acc, mask=inside)
    acc = tl.where(inside, acc, 0.0)
    for head in range(H):
        energy = tl.sum(tl.where((h == head)[None, :], acc * acc, 0.0), axis=1)
        tl.store(E + (b * H + head) * N + n, energy, mask=rows)


@triton.jit
def backward_kernel(
    GP, GF, GE, S, W, A, F,  # inputs: gradients of the outputs; states, weight, alpha; the flow
    GS, PW, PB, PA,  # outputs: gradient of states; partial sums for weight, bias and alpha, per chunk and output
    H, N, D, d, sSb, sSn, chunk, chunks, blocks_c,  # shapes and strides; entities per chunk, chunks per sequence
    BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = F.dtype.element_ty
    pid = tl.program_id(0)
    part = (pid // blocks_c).to(tl.int64)
    b, begin = part // chunks, (part % chunks) * chunk
    x = (pid % blocks_c) * BC + tl.arange(0, BC)
    channels = x < d
    j = tl.arange(0, BJ)
    h = j // D
    outputs = j < H * D
    alpha = tl.load(A + h, mask=outputs, other=0.0)
    w = tl.load(W + j[:, None] * d + x[None, :], mask=outputs[:, None] & channels[None, :], other=0.0)
    sum_weight = tl.zeros((BJ, BC), real)
    sum_bias = tl.zeros((BJ,), real)
    sum_alpha = tl.zeros((BJ,), real)
    for first in range(0, chunk, BN):
        n = begin + first + tl.arange(0, BN)
        rows = n < N
        inside = rows[:, None] & outputs[None, :]
        place = b * H * N + (h * N)[None, :] + n[:, None]
        at = place * D + (j % D)[None, :]
        flow = tl.load(F + at, mask=inside, other=0.0)
        by_position = tl.load(GP + at, mask=inside, other=0.0)
        by_energy = tl.load(GE + place, mask=inside, other=0.0)
        total = alpha[None, :] * by_position + tl.load(GF + at, mask=inside, other=0.0) + 2 * by_energy * flow
        sum_bias += tl.sum(total, axis=0)
        sum_alpha += tl.sum(by_position * flow, axis=0)
        tile = rows[:, None] & channels[None, :]
        s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=tile, other=0.0)
        sum_weight += tl.dot(tl.trans(total), s.to(real), input_precision="ieee", out_dtype=real)
        grad = tl.dot(total, w, input_precision="ieee", out_dtype=real)
        tl.store(GS + b * N * d + n[:, None] * d + x[None, :], grad.to(GS.dtype.element_ty), mask=tile)
    at = part * H * D + j
    tl.store(PW + at[:, None] * d + x[None, :], sum_weight, mask=outputs[:, None] & channels[None, :])
    once = outputs & (pid % blocks_c == 0)
    tl.store(PB + at, sum_bias, mask=once)
    tl.store(PA + at, sum_alpha, mask=once)


# ---- launchers ------------------------------------------------------------------------------------------------------
def tiles(outputs: int, dtype: torch.dtype) -> dict[str, int]:
    """A function of H * D alone; every value it gives is compiled ahead of time by the tests."""
    return {"BN": 16, "BJ": 16 if outputs <= 16 else 32, "BC": 16 if dtype == torch.float64 else 32}


def backward_warps(tile: dict[str, int]) -> int:
    return 8 if tile["BJ"] == 32 else 4


def flow_drift(
    states: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = positions.shape
    d = states.shape[2]
    moved, flow = torch.empty_like(positions), torch.empty_like(positions)
    energy = positions.new_empty(B, H, N)
    if positions.numel() == 0:
        return moved, flow, energy.zero_()
    tile = tiles(H * D, positions.dtype)
    forward_kernel[(B * triton.cdiv(N, tile["BN"]),)](
        states, positions, weight, alpha if bias is None else bias, alpha,
        moved, flow, energy,
        H, N, D, d, states.stride(0), states.stride(1),
        HAS_BIAS=bias is not None, **tile, num_warps=4,
    )  # fmt: skip
    return moved, flow, energy


def chunk_of(B: int, N: int, block: int) -> int:
    """Entities per partial sum: whole blocks, within one sequence, about 512 chunks in all if there are not more
    sequences. A function of the shape alone, so that the order of the sums is."""
    return triton.cdiv(max(triton.cdiv(N, max(512 // B, 1)), 4 * block), block) * block


def flow_drift_backward(
    grad_positions: Tensor, grad_flow: Tensor, grad_energy: Tensor, states: Tensor, weight: Tensor, alpha: Tensor,
    flow: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    H, D, d = weight.shape
    B, N, _ = states.shape
    grad_states = states.new_empty(B, N, d)
    if flow.numel() == 0:
        return grad_states.zero_(), torch.zeros_like(weight), weight.new_zeros(H, D), torch.zeros_like(alpha)
    tile = tiles(H * D, weight.dtype)
    chunk = chunk_of(B, N, tile["BN"])
    chunks, blocks = triton.cdiv(N, chunk), max(triton.cdiv(d, tile["BC"]), 1)
    part_weight = weight.new_empty(B * chunks, H, D, d)
    part_bias = weight.new_empty(B * chunks, H, D)
    part_alpha = weight.new_empty(B * chunks, H, D)
    backward_kernel[(B * chunks * blocks,)](
        grad_positions, grad_flow, grad_energy, states, weight, alpha, flow,
        grad_states, part_weight, part_bias, part_alpha,
        H, N, D, d, states.stride(0), states.stride(1), chunk, chunks, blocks,
        **tile, num_warps=backward_warps(tile),
    )  # fmt: skip
    return grad_states, part_weight.sum(0), part_bias.sum(0), part_alpha.sum((0, 2))
