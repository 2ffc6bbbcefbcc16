"""y_i = sum_{t < W} c_t * x_{i - t}, channel by channel, in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import pad


def short_convolution(
    x: Tensor,  # [B, N, d]
    weight: Tensor,  # [W, d]: c, that of the entity itself first
    place: Tensor | None,  # [N]: how many entities of the same sequence come before; their number without it
) -> Tensor:  # [B, N, d]
    _, N, _ = x.shape
    W, _ = weight.shape
    before = pad(x.to(weight.dtype), (0, 0, W - 1, 0))
    y = x.to(weight.dtype) * weight[0]
    for t in range(1, W):
        earlier = before[:, W - 1 - t : W - 1 - t + N]
        if place is not None:
            earlier = earlier.masked_fill((place < t).unsqueeze(-1), 0)
        y = y + earlier * weight[t]
    return y.to(x.dtype)
