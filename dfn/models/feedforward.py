"""What stands around the attention of a block: the gated MLP, the norms and the short convolution."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from dfn_kernels import short_convolution
from dfn_kernels._checks import are_sizes


class GatedMLP(nn.Module):
    """``W_o (silu(W_g x) * W_u x)``: SwiGLU, ``[.., I] -> [.., O]``. Source: Shazeer, GLU variants (2020)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, bias: bool = False):
        super().__init__()
        self.up, self.out = nn.Linear(inputs, 2 * hidden, bias=bias), nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.out(silu(gate) * up)


def make_norm(norm: str, dim: int, bias: bool = True) -> nn.Module:
    """ "layer" or "rms"."""
    return nn.LayerNorm(dim, bias=bias) if norm == "layer" else nn.RMSNorm(dim, eps=1e-6)


class ShortConvolution(nn.Module):
    """``y_i = sum_{t < W} c_t * x_{i - t}``, channel by channel: ``[B, N, d] -> [B, N, d]``; before the first lies 0.

    c_0 is 1 and the others are 0 at the start: it lets everything through, as it is. ``ptr``, int64 ``[S + 1]``: the
    offsets of sequences packed along N, of which none looks into the one before it.

    Source: Fu et al., Hungry hungry hippos (2023), section 3, where it is called a shift.
    """

    undecayed = ("weight",)  # see `parameter_groups`

    def __init__(self, dim: int, width: int):
        super().__init__()
        are_sizes("ShortConvolution", dim=dim, width=width)
        self.weight = nn.Parameter(torch.eye(width)[:, :1].repeat(1, dim))  # [W, d], c_0 first
        self.register_load_state_dict_pre_hook(with_no_convolution)

    def forward(self, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        return short_convolution(x, self.weight, ptr=ptr)

    def step(self, x: Tensor, before: Tensor) -> Tensor:
        """One entity more, ``[B, d] -> [B, d]``; ``before [B, W - 1, d]``, those before it, the latest last."""
        seen = torch.cat([before, x[:, None]], 1)  # summed as the op does, in float32 or more
        return (seen * self.weight.flip(0).to(torch.promote_types(self.weight.dtype, torch.float32))).sum(1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, width={len(self.weight)}"


def with_no_convolution(convolution: ShortConvolution, state: dict, prefix: str, *_) -> None:
    """A checkpoint from before there was one: it is the same model with one that lets everything through."""
    if prefix + "weight" not in state:
        weight = torch.zeros_like(convolution.weight)
        weight[0] = 1
        state[prefix + "weight"] = weight
