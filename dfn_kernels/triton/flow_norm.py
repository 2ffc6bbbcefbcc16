"""FlowNorm in Triton: one pass over the states; the sums over a sequence are PyTorch's, in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_SPILLS


@triton.jit
def forward_kernel(
    S, R, L,  # inputs: states, scale [B, N], lengths  # noqa: E741
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
    live = rows
    if HAS_LENGTHS:
        live = rows & (n < tl.load(L + b))
    scale = tl.load(R + b * N + n, mask=live, other=0.0)
    s = tl.load(S + b * sSb + n[:, None] * sSn + x[None, :], mask=live[:, None] & channels[None, :], other=0.0)
    y = (scale[:, None] * s.to(scale.dtype)).to(Y.dtype.element_ty)
    tl.store(Y + b * N * d + n[:, None] * d + x[None, :], y, mask=rows[:, None] & channels[None, :])


@triton.jit
def backward_kernel(
    G, S, R, L,  # inputs: gradient, states, scale [B, N], lengths  # noqa: E741
    GS, A,  # outputs: gradient of states; <grad_i, s_i> [B, N]
    N, d, sGb, sGn, sSb, sSn,  # shapes and strides
    HAS_LENGTHS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,  # tunable
):  # fmt: skip
    blocks_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    b = (pid // blocks_n).to(tl.int64)
    n = (pid % blocks_n) * BN + tl.arange(0, BN).to(tl.int64)
    rows = n < N
    live = rows
    if HAS_LENGTHS:
        live = rows & (n < tl.load(L + b))
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


# ---- launchers ------------------------------------------------------------------------------------------------------
TILE = {"BN": 8, "BC": 128}


def _valid(energy: Tensor, lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else torch.arange(energy.shape[1], device=energy.device) < lengths.unsqueeze(1)


def _mean_over(x: Tensor, valid: Tensor | None) -> Tensor:  # [B, N] -> [B, 1]
    if valid is None:
        return x.sum(1, keepdim=True) / x.shape[1]
    return x.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def _scale(energy: Tensor, valid: Tensor | None, eps: float, mode: str) -> Tensor:
    mean = energy.double()
    if valid is not None:
        mean = mean.where(valid, 0)
    if mode == "mean":
        mean = _mean_over(mean, valid).expand_as(energy)
    elif mode == "causal":
        mean = mean.cumsum(1) / torch.arange(1, energy.shape[1] + 1, device=energy.device)
    return (mean + eps).rsqrt().to(energy.dtype).contiguous()


def flow_norm(states: Tensor, energy: Tensor, lengths: Tensor | None, eps: float, mode: str) -> Tensor:
    B, N, d = states.shape
    out = states.new_empty(B, N, d)
    if out.numel() == 0:
        return out
    scale = _scale(energy, _valid(energy, lengths), eps, mode)
    forward_kernel[(B * triton.cdiv(N, TILE["BN"]) * triton.cdiv(d, TILE["BC"]),)](
        states, scale, scale if lengths is None else lengths,
        out,
        N, d, states.stride(0), states.stride(1),
        HAS_LENGTHS=lengths is not None, **TILE, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    return out


def flow_norm_backward(
    grad: Tensor, states: Tensor, energy: Tensor, lengths: Tensor | None, eps: float, mode: str
) -> tuple[Tensor, Tensor]:
    B, N, d = states.shape
    grad_states = states.new_empty(B, N, d)
    if B * N == 0:
        return grad_states, torch.zeros_like(energy)
    valid = _valid(energy, lengths)
    scale = _scale(energy, valid, eps, mode)
    along = torch.empty_like(energy)
    backward_kernel[(B * triton.cdiv(N, TILE["BN"]),)](
        grad, states, scale, scale if lengths is None else lengths,
        grad_states, along,
        N, d, grad.stride(0), grad.stride(1), states.stride(0), states.stride(1),
        HAS_LENGTHS=lengths is not None, **TILE, num_warps=4, **NO_SPILLS,
    )  # fmt: skip
    by_mean = -0.5 * scale.double() ** 3 * along
    if valid is not None:
        by_mean = by_mean.where(valid, 0)
    if mode == "mean":
        by_mean = _mean_over(by_mean, valid).expand_as(energy)
    elif mode == "causal":
        by_mean = by_mean / torch.arange(1, N + 1, device=energy.device)
        by_mean = by_mean.flip(1).cumsum(1).flip(1)
    if valid is not None:
        by_mean = by_mean.where(valid, 0)
    return grad_states, by_mean.to(energy.dtype).contiguous()
