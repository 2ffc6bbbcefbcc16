"""What a Dynamic Flow Network is held against: language models of the same interface, sized to the same parameters.

Each is called as ``(ids int64 [B, N], memory=None) -> (logits [B, N, V], None)``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flownetwork import FlowNetwork
from ..models.language import DFNLanguageModel
from ..models.layers import GatedMLP, count_parameters


class Transformer(nn.Module):
    """The plain one: pre-norm, GELU, learned positions, biases.

    Its MLP is ``hidden`` wide; with 2 d, the default, a layer has 8 d^2 weights like a `DFNBlock`. N is at most
    ``max_length``.
    """

    def __init__(self, vocab_size: int = 256, dim: int = 128, layers: int = 3, heads: int = 4, max_length: int = 256,
                 hidden: int | None = None):  # fmt: skip
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, dim), nn.Embedding(max_length, dim)
        nn.init.normal_(self.place.weight, std=0.02)
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, hidden or 2 * dim, **options) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        N = ids.shape[1]
        states = self.embed(ids) + self.place.weight[:N]
        mask = nn.Transformer.generate_square_subsequent_mask(N, ids.device, states.dtype)
        for block in self.blocks:
            states = block(states, mask, is_causal=True)
        return self.head(self.norm(states)), None


class RotaryAttention(nn.Module):
    """Causal attention over H heads whose queries and keys are rotated by their place (RoPE), without biases.

    ``window``: a query sees itself and the ``window - 1`` places before it; None sees all.

    Source: Su et al., RoFormer (2021), equation (34), in the layout of two halves.
    """

    def __init__(self, dim: int, heads: int, window: int | None = None):
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"RotaryAttention: dim must be a multiple of 2 heads, got {dim} and {heads}")
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        rates = 10000.0 ** (-torch.arange(0, dim // heads, 2) / (dim // heads))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        N = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        places = torch.arange(N, device=x.device)
        angles = places[:, None] * self.rates
        q, k = (rotated(z, angles.cos(), angles.sin()) for z in (q, k))
        if self.window is None or self.window >= N:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            back = places[:, None] - places
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.window))
        return self.out(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class TransformerPlus(nn.Module):
    """Transformer++: RoPE, RMSNorm, SwiGLU, no biases; output maps of a block start smaller by the root of 2 layers.

    ``window``: attention sees so many places, see `RotaryAttention`. Any length.
    """

    def __init__(self, vocab_size: int = 256, dim: int = 96, layers: int = 4, heads: int = 4, hidden: int | None = None,
                 window: int | None = None):  # fmt: skip
        super().__init__()
        hidden = hidden or round(8 * dim / 3)
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.RMSNorm(dim, eps=1e-6), RotaryAttention(dim, heads, window),
                           nn.RMSNorm(dim, eps=1e-6), GatedMLP(dim, hidden, dim)])
            for _ in range(layers)
        )  # fmt: skip
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, vocab_size, bias=False)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        for _, attention, _, mlp in self.blocks:
            for out in (attention.out, mlp.out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        x = self.embed(ids)
        for before, attention, between, mlp in self.blocks:
            x = x + attention(before(x))
            x = x + mlp(between(x))
        return self.head(self.norm(x)), None


# ---- the same number of parameters ----------------------------------------------------------------------------------
def fitted(build: Callable[[int], nn.Module], target: int, smallest: int = 1) -> tuple[nn.Module, int]:
    """The model whose free size makes it come nearest to ``target`` parameters, and that size.

    ``build(size)`` must grow with its size. Sizes are tried on the meta device. Raises ValueError where the nearest
    is more than 2 % off.
    """

    def count(size: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(size))

    low, high = smallest, smallest
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    size = min((low, high), key=lambda s: abs(count(s) - target))
    if abs(count(size) - target) > 0.02 * target:
        raise ValueError(f"fitted: no size comes within 2 % of {target:,} parameters; {size} has {count(size):,}")
    return build(size), size


def even(x: float, multiple: int) -> int:
    return max(multiple, multiple * round(x / multiple))


def rival(kind: str, parameters: int, length: int, vocab_size: int = 256, heads: int = 4) -> nn.Module:
    """A model of ``kind`` with ``parameters`` (within 2 %), of usual proportions, for sequences of ``length``.

    "transformer++" and "window" (of length / 4): 4 layers to 1M parameters, 6 beyond, d from 12 layers d^2, and the
    width of the MLP takes up the rest. "transformer": the same with 8 d^2 a layer. "flownetwork": the mixer variant, d
    from 4 low-rank layers, its rank takes up the rest.
    """
    layers = 4 if parameters <= 1_000_000 else 6
    body = max(parameters - 2 * vocab_size * even((parameters / (12 * layers)) ** 0.5, 2 * heads), parameters / 3)
    if kind in ("transformer++", "window"):
        dim = even((body / (12 * layers)) ** 0.5, 2 * heads)
        window = max(1, length // 4) if kind == "window" else None
        return fitted(lambda hidden: TransformerPlus(vocab_size, dim, layers, heads, hidden, window), parameters)[0]
    if kind == "transformer":
        dim = even((body / (8 * layers)) ** 0.5, heads)
        return fitted(lambda hidden: Transformer(vocab_size, dim, layers, heads, length, hidden), parameters)[0]
    if kind == "flownetwork":
        dim = even((body / (10 * layers)) ** 0.5, 2 * heads)
        build = lambda rank: FlowNetwork(vocab_size, dim, layers, 4, max_seq_len=length, rank=rank, tie_output=True,
                                         mixer="flow_attention")  # fmt: skip
        return fitted(build, parameters)[0]
    raise ValueError(f"rival: kind must be one of {', '.join(RIVALS)}, got {kind!r}")


RIVALS = ("transformer++", "transformer", "window", "flownetwork")


def contender(kind: str, dfn: dict, length: int) -> nn.Module:
    """ "dfn" with the arguments ``dfn``, or a rival with as many parameters as that has."""
    if kind == "dfn":
        return DFNLanguageModel(**dfn)
    with torch.device("meta"):
        parameters = count_parameters(DFNLanguageModel(**dfn))
    return rival(kind, parameters, length, dfn.get("vocab_size", 256))
