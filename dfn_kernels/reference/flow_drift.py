"""f = W s + b; p' = p + alpha f; |f|^2, in plain PyTorch."""

import torch
from torch import Tensor


def flow_drift(
    states: Tensor,  # [B, N, d]
    positions: Tensor,  # [B, H, N, D]
    weight: Tensor,  # [H, D, d]
    bias: Tensor | None,  # [H, D]
    alpha: Tensor,  # [H]
) -> tuple[Tensor, Tensor, Tensor]:  # positions [B, H, N, D], flow [B, H, N, D], energy [B, H, N]
    H, D, d = weight.shape
    B, N, _ = states.shape
    with torch.autocast(states.device.type, enabled=False):  # which would round the product's operands
        flow = states.to(positions.dtype) @ weight.reshape(H * D, d).t()
    flow = flow.view(B, N, H, D).transpose(1, 2).contiguous()
    if bias is not None:
        flow = flow + bias.view(1, H, 1, D)
    return positions + alpha.view(1, H, 1, 1) * flow, flow, flow.square().sum(-1)
