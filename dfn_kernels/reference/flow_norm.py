"""s_i / sqrt(E[energy] + eps), in plain PyTorch."""

import torch
from torch import Tensor


def flow_norm(
    states: Tensor,  # [B, N, d]
    energy: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    eps: float,
    mode: str,  # "mean": over the sequence; "causal": over j <= i; "entity": its own
) -> Tensor:  # [B, N, d]
    _, N, _ = states.shape
    place = torch.arange(N, device=states.device)
    if lengths is None:
        valid = torch.ones_like(energy, dtype=torch.bool)
    else:
        valid = place < lengths.unsqueeze(-1)
    energy = energy.where(valid, 0)
    if mode == "mean":
        mean = energy.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    elif mode == "causal":  # in float64: a long running sum in float32 forgets what is small
        mean = (energy.double().cumsum(-1) / (place + 1)).to(energy.dtype)
    else:
        mean = energy
    scale = (mean.expand_as(energy) + eps).where(valid, 1).rsqrt()
    normed = states.to(energy.dtype).where(valid.unsqueeze(-1), 0) * scale.unsqueeze(-1)
    return normed.to(states.dtype)
