"""What stands around the attention of a block: the gated MLP and the norms."""

from torch import Tensor, nn
from torch.nn.functional import silu


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
