"""y_i = sum_{t < W} c_t * x_{i - t}, channel by channel, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def short_convolution(
    x: Tensor,  # [B, N, d]
    weight: Tensor,  # [W, d]: c, that of the entity itself first
    place: Tensor | None,  # [N]: how many entities of the same sequence come before; their number without it
) -> Tensor:  # [B, N, d]
    _, N, _ = x.shape
    W, _ = weight.shape
    if place is None:
        place = torch.arange(N, device=x.device)
    before = pad(x.to(weight.dtype), (0, 0, W - 1, 0))
    y = x.to(weight.dtype) * weight[0]
    for t in range(1, W):
        none = (place < t).unsqueeze(-1)  # both factors are 0 there, whatever else is infinite
        earlier = before[:, W - 1 - t : W - 1 - t + N].masked_fill(none, 0)
        y = y + earlier * torch.where(none, 0, weight[t])
    return y.to(x.dtype)
