"""Flow drift in Triton: one pass over the states, forward and backward.

The H * D outputs of an entity (at most 32, see `WIDE` in the op's file) are one tile of a small matrix product; one
head of few outputs goes without: a sum over whole rows for each. Either way the time should be that of the memory.
With s bytes a state and o = 4 H (3 D + 1) bytes for positions, flow and energy, an entity moves s d + o bytes forward
(positions in and out, flow, energy) and 2 s d + o backward (states and their gradient; gradients of the outputs, flow),
so 262,144 entities with d = 256 and one head in 3-D take 279 MB forward and 547 MB backward in float32, 145 MB and
279 MB in bfloat16. The sums over entities add H D (d + 1) + H numbers per chunk, written and read once. On an H200
that forward took 0.081 and 0.063 ms; today's backward pass of one head has not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def forward_kernel(
    S, P, W, B, A,  # inputs: states, positions, weight, bias, alpha
    PN, F, E,  # outputs: positions, flow, energy
    H, N, D, d, sSb, sSn,  # shapes and strides
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
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
        acc = tl.dot(s.to(real), w, acc, input_precision=PRECISION, out_dtype=real)
    if HAS_BIAS:
        acc += tl.load(B + j, mask=outputs, other=0.0)[None, :]
    inside = rows[:, None] & outputs[None, :]
    at = b * H * N * D + (j % D + h * (tl.cast(N, tl.int64) * D))[None, :] + n[:, None] * D
    alpha = tl.load(A + h, mask=outputs, other=0.0)
    tl.store(F + at, acc, mask=inside)
    tl.store(PN + at, tl.load(P + at, mask=inside, other=0.0) + alpha[None, :] * acc, mask=inside)
    acc = tl.where(inside, acc, 0.0)
    for head in range(H):
        energy = tl.sum(tl.where((h == head)[None, :], acc * acc, 0.0), axis=1)
        tl.store(E + (b * H + head) * N + n, energy, mask=rows)


@triton.jit
def forward_rows_kernel(
    S, P, W, B, A,  # inputs: states, positions, weight, bias, alpha
    PN, F, E,  # outputs: positions, flow, energy
    N, d, sSb, sSn,  # shapes and strides; one head
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,  # BC: d, padded
):  # fmt: skip
    real: tl.constexpr = P.dtype.element_ty
    blocks_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    b = (pid // blocks_n).to(tl.int64)
    n = (pid % blocks_n) * BN + tl.arange(0, BN).to(tl.int64)
    x = tl.arange(0, BC)
    rows, channels = n < N, x < d
    s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=rows[:, None] & channels[None, :], other=0.0)
    alpha = tl.load(A)
    energy = tl.zeros((BN,), real)
    for j in tl.static_range(D):
        w = tl.load(W + j * d + x, mask=channels, other=0.0)
        flow = tl.sum(s.to(real) * w[None, :], axis=1)
        if HAS_BIAS:
            flow += tl.load(B + j)
        at = (b * N + n) * D + j
        tl.store(F + at, flow, mask=rows)
        tl.store(PN + at, tl.load(P + at, mask=rows, other=0.0) + alpha * flow, mask=rows)
        energy += flow * flow
    tl.store(E + b * N + n, energy, mask=rows)


@triton.jit
def backward_kernel(
    GP, GF, GE, S, W, A, F,  # inputs: gradients of the outputs; states, weight, alpha; the flow
    GS, PART,  # outputs: gradient of states; per chunk the sums for weight, bias and alpha
    H, N, D, d, sSb, sSn, chunk, chunks, blocks_c, columns,  # entities per chunk, chunks per sequence; columns of PART
    PRECISION: tl.constexpr,
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
        tile = rows[:, None] & channels[None, :]
        s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=tile, other=0.0)
        inside = rows[:, None] & outputs[None, :]
        place = b * H * N + (h.to(tl.int64) * N)[None, :] + n[:, None]
        at = place * D + (j % D)[None, :]
        flow = tl.load(F + at, mask=inside, other=0.0)
        by_position = tl.load(GP + at, mask=inside, other=0.0)
        by_energy = tl.load(GE + place, mask=inside, other=0.0)
        total = alpha[None, :] * by_position + tl.load(GF + at, mask=inside, other=0.0) + 2 * by_energy * flow
        sum_bias += tl.sum(total, axis=0)
        sum_alpha += tl.sum(by_position * flow, axis=0)
        sum_weight = tl.dot(tl.trans(total), s.to(real), sum_weight, input_precision=PRECISION, out_dtype=real)
        grad = tl.dot(total, w, input_precision=PRECISION, out_dtype=real)
        tl.store(GS + b * N * d + n[:, None] * d + x[None, :], grad.to(GS.dtype.element_ty), mask=tile)
    PART += part * columns
    tl.store(PART + j[:, None] * d + x[None, :], sum_weight, mask=outputs[:, None] & channels[None, :])
    if pid % blocks_c == 0:
        PART += H * D * d
        tl.store(PART + j, sum_bias, mask=outputs)
        for head in range(H):
            tl.store(PART + H * D + head, tl.sum(tl.where(outputs & (h == head), sum_alpha, 0.0), axis=0))


@triton.jit
def gradient_of_flow(GP, GF, F, alpha, by_energy, at, inside):
    """The whole gradient of these flows, and their products with the gradient of the positions."""
    flow = tl.load(F + at, mask=inside, other=0.0)
    by_position = tl.load(GP + at, mask=inside, other=0.0)
    total = alpha * by_position + tl.load(GF + at, mask=inside, other=0.0) + 2 * by_energy * flow
    return total, by_position * flow


# Every warp holds whole rows, or whole columns of a wide row, so that no sum over entities leaves its registers. Rows
# divided among warps were summed through shared memory, 32 lanes to a bank: four times slower than float32 in bfloat16.
@triton.jit
def backward_rows_kernel(
    GP, GF, GE, S, W, A, F,  # inputs: gradients of the outputs; states, weight, alpha; the flow
    GS, PART,  # outputs: gradient of states; per chunk the sums for weight, bias and alpha
    N, d, sSb, sSn, chunk, chunks, columns,  # one head; entities per chunk, chunks per sequence; columns of PART
    D: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,  # BJ: D, padded; BC: d, padded
    BK: tl.constexpr,  # entities at a time in the sums for bias and alpha
):  # fmt: skip
    real: tl.constexpr = F.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    b, begin = part // chunks, (part % chunks) * chunk
    end = tl.minimum(begin + chunk, N)
    x, j = tl.arange(0, BC), tl.arange(0, BJ)
    outputs, channels = j < D, x < d
    alpha = tl.load(A)
    w = tl.load(W + j[:, None] * d + x[None, :], mask=outputs[:, None] & channels[None, :], other=0.0)
    sum_weight = tl.zeros((BJ, BC), real)
    for first in range(0, chunk, BN):
        n = begin + first + tl.arange(0, BN)
        rows = n < end
        tile = rows[:, None] & channels[None, :]
        s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=tile, other=0.0).to(real)
        by_energy = tl.load(GE + b * N + n, mask=rows, other=0.0)
        grad = tl.zeros((BN, BC), real)
        for o in tl.static_range(D):
            total, _ = gradient_of_flow(GP, GF, F, alpha, by_energy, (b * N + n) * D + o, rows)
            mine = (j == o)[:, None]
            sum_weight = tl.where(mine, sum_weight + tl.sum(total[:, None] * s, axis=0)[None, :], sum_weight)
            grad += total[:, None] * tl.sum(tl.where(mine, w, 0.0), axis=0)[None, :]
        tl.store(GS + b * N * d + n[:, None] * d + x[None, :], grad.to(GS.dtype.element_ty), mask=tile)
    PART += part * columns
    tl.store(PART + j[:, None] * d + x[None, :], sum_weight, mask=outputs[:, None] & channels[None, :])
    sum_bias = tl.zeros((BK, BJ), real)
    sum_alpha = tl.zeros((BK, BJ), real)
    for first in range(0, chunk, BK):
        n = begin + first + tl.arange(0, BK)
        inside = (n < end)[:, None] & outputs[None, :]
        by_energy = tl.load(GE + b * N + n, mask=n < end, other=0.0)[:, None]
        at = (b * N + n)[:, None] * D + j[None, :]
        total, by_alpha = gradient_of_flow(GP, GF, F, alpha, by_energy, at, inside)
        sum_bias += total
        sum_alpha += by_alpha
    tl.store(PART + D * d + j, tl.sum(sum_bias, axis=0), mask=outputs)
    tl.store(PART + D * d + D, tl.sum(tl.sum(sum_alpha, axis=0), axis=0))


@triton.jit
def sum_kernel(
    PART,  # input: [parts, columns]
    GW, GB, GA,  # outputs: its sum, in three pieces
    parts, weights, biases, columns,  # shapes
    BK: tl.constexpr, BX: tl.constexpr,  # tunable
):  # fmt: skip
    x = tl.program_id(0) * BX + tl.arange(0, BX)
    acc = tl.zeros((BK, BX), GW.dtype.element_ty)
    for first in range(0, parts, BK):
        k = first + tl.arange(0, BK).to(tl.int64)
        inside = (k < parts)[:, None] & (x < columns)[None, :]
        acc += tl.load(PART + k[:, None] * columns + x[None, :], mask=inside, other=0.0)
    total = tl.sum(acc, axis=0)
    tl.store(GW + x, total, mask=x < weights)
    x -= weights
    tl.store(GB + x, total, mask=(x >= 0) & (x < biases))
    x -= biases
    tl.store(GA + x, total, mask=(x >= 0) & (x < columns - weights - biases))


# ---- launchers ------------------------------------------------------------------------------------------------------
# Products of float32 in three parts of tensor-core precision, at the memory's speed and about as exact as plain
# float32. Tensor cores truncate where they add, so each block of the depth is summed apart and then added with
# rounding: the error of 256 channels is 2.0e-7 in blocks of 64 on an H200 (1.4e-7 in blocks of 32 by emulation), that
# of plain products 1.5e-7 to 2.9e-7 by their order. AMD's compiler has no such product; its matrix cores multiply
# float32 itself.
PRECISION = {torch.float32: "ieee" if torch.version.hip else "tf32x3", torch.float64: "ieee"}
SUM = {"BK": 512, "BX": 8}


def _padded(size: int, least: int) -> int:
    return max(least, triton.next_power_of_2(size))


def by_rows(H: int, D: int, d: int, dtype: torch.dtype) -> bool:
    """Whether few outputs make the product not worth its padding."""
    return H == 1 and D <= 3 and d <= 1024 and dtype != torch.float64


# Tiles are functions of shape and dtypes, and few: the tests compile all of them ahead of time. The limit is registers.
def forward_tile(outputs: int, states: torch.dtype, real: torch.dtype) -> dict:
    BJ = _padded(outputs, 16)
    if real == torch.float64:
        return {"PRECISION": PRECISION[real], "BN": 16, "BJ": BJ, "BC": 16}
    return {"PRECISION": PRECISION[real], "BN": 64, "BJ": BJ, "BC": 64 if BJ == 16 and states == real else 32}


def forward_rows_tile(D: int, d: int) -> dict:
    BC = _padded(d, 128)
    return {"D": D, "BN": min(16, 4096 // BC), "BC": BC}


def backward_tile(outputs: int, d: int, states: torch.dtype, real: torch.dtype) -> dict:
    BJ = _padded(outputs, 16)
    widest = 16 if real == torch.float64 else 128 if BJ == 16 else 32 if states == real else 64
    return {"PRECISION": PRECISION[real], "BN": 16, "BJ": BJ, "BC": min(_padded(d, 64), widest)}


def backward_rows_tile(D: int, d: int) -> dict:
    return {"D": D, "BN": 4, "BJ": _padded(D, 1), "BC": _padded(d, 128), "BK": 64}


# Registers: whole rows need more than other kernels; 168 leave room for 12 warps on a multiprocessor of 65,536.
FORWARD_ROWS = {"maxnreg": 160} if NO_SPILLS else {}
BACKWARD_ROWS = {"maxnreg": 168} if NO_SPILLS else {}


def backward_options(tile: dict, states: torch.dtype) -> dict:
    """What keeps ptxas from spilling 8 or 16 bytes, where it aims at 168 registers, as compiling has shown."""
    return NO_SPILLS and {"maxnreg": 255} if tile["BC"] == 128 else {}


def flow_drift(
    states: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = positions.shape
    d = states.shape[2]
    moved, flow = torch.empty_like(positions), torch.empty_like(positions)
    energy = positions.new_empty(B, H, N)
    if positions.numel() == 0:
        return moved, flow, energy.zero_()
    sums = by_rows(H, D, d, positions.dtype) and states.dtype != positions.dtype  # float32: the product is faster
    tile = forward_rows_tile(D, d) if sums else forward_tile(H * D, states.dtype, positions.dtype)
    kernel, shape = (forward_rows_kernel, (N, d)) if sums else (forward_kernel, (H, N, D, d))
    kernel[(B * triton.cdiv(N, tile["BN"]),)](
        states, positions, weight, alpha if bias is None else bias, alpha,
        moved, flow, energy,
        *shape, states.stride(0), states.stride(1),
        HAS_BIAS=bias is not None, **tile, num_warps=4, **(FORWARD_ROWS if sums else {}),
    )  # fmt: skip
    return moved, flow, energy


def chunk_of(B: int, N: int, block: int, chunks: int) -> int:
    """Entities per partial sum: whole blocks, at least 32, within one sequence, about `chunks` of them in all if there
    are not more sequences. A function of the shape alone, so that the order of the sums is."""
    return triton.cdiv(max(triton.cdiv(N, max(chunks // B, 1)), 32), block) * block


def flow_drift_backward(
    grad_positions: Tensor, grad_flow: Tensor, grad_energy: Tensor, states: Tensor, weight: Tensor, alpha: Tensor,
    flow: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    H, D, d = weight.shape
    B, N, _ = states.shape
    grad_states = states.new_empty(B, N, d)
    if flow.numel() == 0:
        return grad_states.zero_(), torch.zeros_like(weight), weight.new_zeros(H, D), torch.zeros_like(alpha)
    if by_rows(H, D, d, weight.dtype):
        tile, kernel, shape = backward_rows_tile(D, d), backward_rows_kernel, (N, d)
        chunk = chunk_of(B, N, tile["BN"], 1536)  # fewer than 12 warps for each of an H100's or H200's multiprocessors
        blocks, more, options = 1, (), {"num_warps": max(tile["BC"] // 256, 1), **BACKWARD_ROWS}
    else:
        tile, kernel, shape = backward_tile(H * D, d, states.dtype, weight.dtype), backward_kernel, (H, N, D, d)
        chunk, blocks = chunk_of(B, N, tile["BN"], 512), max(triton.cdiv(d, tile["BC"]), 1)
        more, options = (blocks,), {"num_warps": 8 if tile["BC"] == 16 else 4, **backward_options(tile, states.dtype)}
    chunks = triton.cdiv(N, chunk)
    columns = H * D * (d + 1) + H
    part = weight.new_empty(B * chunks, columns)
    kernel[(B * chunks * blocks,)](
        grad_positions, grad_flow, grad_energy, states, weight, alpha, flow,
        grad_states, part,
        *shape, states.stride(0), states.stride(1), chunk, chunks, *more, columns,
        **tile, **options,
    )  # fmt: skip
    grad_weight, grad_bias, grad_alpha = torch.empty_like(weight), weight.new_empty(H, D), torch.empty_like(alpha)
    sum_kernel[(triton.cdiv(columns, SUM["BX"]),)](
        part,
        grad_weight, grad_bias, grad_alpha,
        B * chunks, H * D * d, H * D, columns,
        **SUM, num_warps=8,
    )  # fmt: skip
    return grad_states, grad_weight, grad_bias, grad_alpha
