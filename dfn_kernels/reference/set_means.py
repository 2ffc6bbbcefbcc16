"""The mean of a number per row over its set, or over the set's rows up to it, in plain PyTorch: one set at a time."""

import torch
from torch import Tensor


def set_means(
    values: Tensor,  # [B, N]
    ptr: Tensor,  # [S + 1] offsets of the sets
    causal: bool,
) -> Tensor:  # [B, N]
    parts = [values[:, :0]]
    offsets = ptr.tolist()
    for first, end in zip(offsets[:-1], offsets[1:], strict=True):
        x = values[:, first:end].double()  # a long running sum in float32 forgets what is small
        if causal:
            parts.append(x.cumsum(1) / torch.arange(1, end - first + 1, device=x.device))
        elif end > first:
            parts.append(x.mean(1, keepdim=True).expand_as(x))
    return torch.cat([part.to(values.dtype) for part in parts], 1)
