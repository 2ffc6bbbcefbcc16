"""What a Dynamic Flow Network is held against: language models of the same interface, sized to the same parameters.

Each is called as ``(ids int64 [B, N], memory=None) -> (logits [B, N, V], None)``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flownetwork import FlowNetwork
from ..models.feedforward import GatedMLP, ShortConvolution
from ..models.language import DFNLanguageModel
from ..models.layers import count_parameters


class Transformer(nn.Module):
    """The plain one: pre-norm, GELU, learned positions, biases.

    Its MLP is ``hidden`` wide; with 2 d, the default, a layer has 8 d^2 weights like a `DFNBlock`. N is at most
    ``max_length``. ``dropout``: of what is embedded and of what each half of a block adds, as in a `DFNBlock`;
    ``attention_dropout``: of attention's weights.
    """

    def __init__(self, vocab_size: int = 256, dim: int = 128, layers: int = 3, heads: int = 4, max_length: int = 256,
                 hidden: int | None = None, dropout: float = 0.0, attention_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.embed, self.place = nn.Embedding(vocab_size, dim), nn.Embedding(max_length, dim)
        nn.init.normal_(self.place.weight, std=0.02)
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, hidden or 2 * dim, **options) for _ in range(layers)
        )
        for block in self.blocks:
            block.dropout1.p = block.dropout2.p = dropout  # of what is added
            block.self_attn.dropout = attention_dropout
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        N = ids.shape[1]
        states = self.dropout(self.embed(ids) + self.place(torch.arange(N, device=ids.device)))
        mask = nn.Transformer.generate_square_subsequent_mask(N, ids.device, states.dtype)
        for block in self.blocks:
            states = block(states, mask, is_causal=True)
        return self.head(self.norm(states)), None


class RotaryAttention(nn.Module):
    """Causal attention over H heads whose queries and keys are rotated by their place (RoPE), without biases.

    ``window``: a query sees itself and the ``window - 1`` places before it; None sees all. ``dropout``: of the weights.

    Source: Su et al., RoFormer (2021), equation (34), in the layout of two halves.
    """

    def __init__(self, dim: int, heads: int, window: int | None = None, dropout: float = 0.0):
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"RotaryAttention: dim must be a multiple of 2 heads, got {dim} and {heads}")
        self.heads, self.window, self.dropout = heads, window, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        rates = 10000.0 ** (-torch.arange(0, dim // heads, 2) / (dim // heads))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        N = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        places, dropout = torch.arange(N, device=x.device), self.dropout if self.training else 0.0
        angles = places[:, None] * self.rates
        q, k = (rotated(z, angles.cos(), angles.sin()) for z in (q, k))
        if self.window is None or self.window >= N:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            y = windowed_attention(q, k, v, self.window, dropout)
        return self.out(y.transpose(1, 2).flatten(2))


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention of each row to itself and the ``window - 1`` rows before it, ``[.., N, c]``.

    In blocks of ``window`` rows, each of which sees itself and the block before: memory grows as N window.
    """
    N = q.shape[-2]
    q, k, v = (F.pad(x, (0, 0, 0, -N % window)).unflatten(-2, (-1, window)) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x[..., :-1, :, :], (0, 0, 0, 0, 1, 0)), x], -2) for x in (k, v))  # [.., n, 2 window, c]
    row = torch.arange(window, device=q.device)[:, None]
    back = row + window - torch.arange(2 * window, device=q.device)
    seen = ((back >= 0) & (back < window)).expand(q.shape[-3], -1, -1).clone()
    seen[0, :, :window] = False  # nothing lies before the first block
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout).flatten(-3, -2)[..., :N, :]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class TransformerPlus(nn.Module):
    """Transformer++: RoPE, RMSNorm, SwiGLU, no biases; output maps of a block start smaller by the root of 2 layers.

    ``window``: attention sees so many places, see `RotaryAttention`. ``dropout``, ``attention_dropout``: as in
    `Transformer`. ``convolution``: of so many places behind every norm of a block, as a `DFNBlock` has it. Any length.
    """

    def __init__(self, vocab_size: int = 256, dim: int = 96, layers: int = 4, heads: int = 4, hidden: int | None = None,
                 window: int | None = None, dropout: float = 0.0, attention_dropout: float = 0.0,
                 convolution: int = 0):  # fmt: skip
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        hidden = hidden or round(8 * dim / 3)
        self.embed = nn.Embedding(vocab_size, dim)

        def norm() -> nn.Module:
            rms = nn.RMSNorm(dim, eps=1e-6)
            return nn.Sequential(rms, ShortConvolution(dim, convolution)) if convolution else rms

        self.blocks = nn.ModuleList(
            nn.ModuleList([norm(), RotaryAttention(dim, heads, window, attention_dropout),
                           norm(), GatedMLP(dim, hidden, dim)])
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
        x = self.dropout(self.embed(ids))
        for before, attention, between, mlp in self.blocks:
            x = x + self.dropout(attention(before(x)))
            x = x + self.dropout(mlp(between(x)))
        return self.head(self.norm(x)), None


# ---- the same number of parameters ----------------------------------------------------------------------------------
def fitted(build: Callable[[int], nn.Module], target: int) -> nn.Module:
    """``build(size)`` of the size, at least 1, that makes it come nearest to ``target`` parameters.

    Its parameters must be a linear function of the size. Raises ValueError where the nearest is more than 2 % off.
    """
    with torch.device("meta"):
        one, two = (count_parameters(build(size)) for size in (1, 2))
    size = max(1, 1 + round((target - one) / (two - one)))
    model = build(size)
    if abs(count_parameters(model) - target) > 0.02 * target:
        raise ValueError(f"fitted: no size comes within 2 % of {target:,} parameters; {size} has "
                         f"{count_parameters(model):,}")  # fmt: skip
    return model


def even(x: float, multiple: int) -> int:
    return max(multiple, multiple * round(x / multiple))


def rival(kind: str, parameters: int, length: int, vocab_size: int = 256, *, heads: int = 4, dim: int | None = None,
          layers: int | None = None, dropout: float = 0.0, attention_dropout: float = 0.0) -> nn.Module:  # fmt: skip
    """A model of ``kind`` with ``parameters`` (within 2 %), of usual proportions, for sequences of ``length``.

    "transformer++" and "window" (of length / 4): 2 layers to 0.2M parameters, 4 to 4M, 6 beyond, d from 12 layers d^2
    in whole eights per head, and the width of the MLP takes up the rest. "convolved": Transformer++ with convolutions
    of 4 places. "transformer": the same with 8 d^2 a layer.
    "flownetwork": the mixer variant, whose rank takes up the rest. ``dim`` and ``layers`` may be given instead.

    Raises ValueError for another kind, and for a dropout with "flownetwork", which has none.
    """
    if kind not in RIVALS:
        raise ValueError(f"rival: kind must be one of {', '.join(RIVALS)}, got {kind!r}")
    if (dropout or attention_dropout) and kind == "flownetwork":
        given = dropout or attention_dropout
        raise ValueError(f"rival: dropout must be 0 for flownetwork, which has none, got {given}")
    dropouts, window = dict(dropout=dropout, attention_dropout=attention_dropout), max(1, length // 4)
    layers = layers or (2 if parameters < 200_000 else 4 if parameters < 4_000_000 else 6)
    per_layer = {"transformer": 8, "flownetwork": 10}.get(kind, 12)
    if dim is None:  # layers * per_layer * d^2 + tables * V * d = parameters
        tables = vocab_size * (1 if kind == "flownetwork" else 2) + (length if kind == "transformer" else 0)
        a = layers * per_layer
        dim = even((math.sqrt(tables**2 + 4 * a * parameters) - tables) / (2 * a), 8 * heads)
    build = {
        "transformer++": lambda hidden: TransformerPlus(vocab_size, dim, layers, heads, hidden, None, **dropouts),
        "window": lambda hidden: TransformerPlus(vocab_size, dim, layers, heads, hidden, window, **dropouts),
        "convolved": lambda hidden: TransformerPlus(vocab_size, dim, layers, heads, hidden, convolution=4, **dropouts),
        "transformer": lambda hidden: Transformer(vocab_size, dim, layers, heads, length, hidden, **dropouts),
        "flownetwork": lambda rank: FlowNetworkLogits(vocab_size, dim, layers, length, rank),
    }[kind]
    return fitted(build, parameters)


RIVALS = ("transformer++", "window", "convolved", "transformer", "flownetwork")
KINDS = ("dfn", *RIVALS)


class FlowNetworkLogits(nn.Module):
    """A `FlowNetwork` with mixers and low-rank patterns, called as the others are."""

    def __init__(self, vocab_size: int, dim: int, layers: int, length: int, rank: int):
        super().__init__()
        self.network = FlowNetwork(vocab_size, dim, layers, 4, max_seq_len=length, rank=rank, tie_output=True,
                                   mixer="flow_attention")  # fmt: skip

    def forward(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        return self.network(ids)[0], None


def contender(kind: str, dfn: dict, length: int, *, same_shape: bool = False, dropout: float = 0.0,
              attention_dropout: float = 0.0) -> nn.Module:  # fmt: skip
    """ "dfn" with the arguments ``dfn``, or a rival with as many parameters; ``same_shape``: as many layers, same d."""
    if kind == "dfn":
        options = dict(**(dfn.get("block_options") or {}), dropout=dropout, attention_dropout=attention_dropout)
        return DFNLanguageModel(**{**dfn, "block_options": options})
    with torch.device("meta"):
        parameters = count_parameters(DFNLanguageModel(**dfn))
    shape = {name: dfn[name] for name in ("dim", "layers")} if same_shape else {}
    return rival(kind, parameters, length, dfn.get("vocab_size", 256), dropout=dropout,
                 attention_dropout=attention_dropout, **shape)  # fmt: skip
