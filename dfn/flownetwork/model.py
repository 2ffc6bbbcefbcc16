"""FlowNetwork: a language model of flow layers."""

import math

import torch
from torch import Tensor, nn

from dfn_kernels._checks import are_sizes

from ..models.layers import FlowMixer
from ..models.linears import rows_of
from ..training.losses import language_modelling
from .layers import AdaptiveFlowRouter, FlowLayer
from .metrics import FlowMetrics, NetworkMetrics
from .vocabulary_loss import vocabulary_logits, vocabulary_loss

PRESETS = {
    "edge": dict(vocab_size=5000, d_model=256, num_layers=3, num_patterns=4),
    "base": dict(vocab_size=10000, d_model=512, num_layers=6, num_patterns=8),
    "large": dict(vocab_size=50000, d_model=768, num_layers=8, num_patterns=16),
    "compact": dict(vocab_size=10000, d_model=512, num_layers=6, num_patterns=8, rank=12, tie_output=True),
}


def sinusoids(length: int, dim: int) -> Tensor:
    """``[length, dim]`` fixed position codes: sines in the even places, cosines in the odd ones."""
    place = torch.arange(length).unsqueeze(1)
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([(place * rate).sin(), (place * rate).cos()], -1).flatten(1)[:, :dim]


def restore_positions(model: "FlowNetwork", keys: object) -> None:
    """The codes, which no checkpoint holds, of a model that was built on the meta device."""
    codes = sinusoids(*model.positions.shape)
    model.positions = codes.to(next(model.parameters()).device, model.positions.dtype)


class FlowNetwork(nn.Module):
    """A language model of flow layers: ``(ids int64 [B, N]) -> (logits [B, N, V], NetworkMetrics)``.

    ``h_0 = FlowLayer([embedding(id), position code])``: both halves, 2 d_model, mixed into d_model.
    ``h_{l+1} = g_l h'_l + (1 - g_l) h_l`` with ``h'_l = FlowLayer_l(h_l)`` and the global flow gate
    ``g = sigmoid(W_g h_0 + b_g)``, ``[B, N, num_layers]``: one map of the first state decides for every token how much
    it takes of each layer.
    ``logits = FlowLayer_out(h_L)``, d_model to V; with ``tie_output`` ``FlowLayer_out(h_L) E^T`` instead, d_model to
    d_model and then the transposed embedding.

    As published, every layer acts on one token at a time. Nothing carries information from one position to another, so
    the model predicts from the current token and its place alone: a bigram model, however deep.
    ``mixer="flow_attention"`` puts a causal `FlowMixer` before each flow layer, ``h_l += FlowMixer_l(LayerNorm(h_l))``,
    and makes it a language model in the usual sense.

    Args:
        vocab_size: V.
        d_model, num_layers, num_patterns: sizes. 10000, 512, 6, 8 is the published full-rank network, 62.9M parameters.
        max_seq_len: the longest N.
        rank, top_k, density, block_density: of the patterns, see `AdaptiveFlowRouter`.
        tie_output: see above.
        mixer: "none" or "flow_attention".
    """

    def __init__(
        self, vocab_size: int, d_model: int = 512, num_layers: int = 6, num_patterns: int = 8, *,
        max_seq_len: int = 1024, rank: int | None = None, tie_output: bool = False, top_k: int | None = None,
        density: float | None = None, block_density: float | None = None, mixer: str = "none",
    ):  # fmt: skip
        super().__init__()
        if mixer not in ("none", "flow_attention"):
            raise ValueError(f"FlowNetwork: mixer must be 'none' or 'flow_attention', got {mixer!r}")
        are_sizes("FlowNetwork", vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
        are_sizes("FlowNetwork", num_patterns=num_patterns, max_seq_len=max_seq_len)
        if d_model % 2:
            raise ValueError(f"FlowNetwork: d_model must be even, got {d_model}")
        sparse = dict(rank=rank, top_k=top_k, density=density, block_density=block_density)
        self.vocab_size, self.tie_output, self.max_seq_len = vocab_size, tie_output, max_seq_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5 if tie_output else 1.0)
        self.register_buffer("positions", sinusoids(max_seq_len, d_model), persistent=False)
        self.register_load_state_dict_post_hook(restore_positions)
        self.input_layer = FlowLayer(2 * d_model, d_model, num_patterns, **sparse)
        self.gate = nn.Linear(d_model, num_layers)
        self.layers = nn.ModuleList(FlowLayer(d_model, d_model, num_patterns, **sparse) for _ in range(num_layers))
        self.output_layer = FlowLayer(d_model, d_model if tie_output else vocab_size, num_patterns, **sparse)
        self.mixers = nn.ModuleList()
        if mixer == "flow_attention":
            blocks = (nn.Sequential(nn.LayerNorm(d_model), FlowMixer(d_model, causal=True)) for _ in range(num_layers))
            self.mixers.extend(blocks)

    @classmethod
    def from_preset(cls, name: str, **changes) -> "FlowNetwork":
        """ "edge", "base", "large" or "compact" (low-rank patterns, tied output: 6.0M parameters, 22.9 MB)."""
        if name not in PRESETS:
            raise ValueError(f"FlowNetwork: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def forward(self, ids: Tensor) -> tuple[Tensor, NetworkMetrics]:
        h, metrics = self._states(ids)
        return (vocabulary_logits(h, self._table()) if self.tie_output else h), metrics

    def loss(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, NetworkMetrics]:
        """Mean cross-entropy of the logits in nats, at least float32, and metrics; targets int64 ``[B, N]``.

        With `tie_output` by `vocabulary_loss`, which takes less time and memory than logits and their cross-entropy.
        """
        h, metrics = self._states(ids)
        if self.tie_output:
            return vocabulary_loss(h, self._table(), targets), metrics
        return language_modelling(h, targets), metrics

    def _table(self) -> Tensor:
        return rows_of(self.embedding, self.vocab_size)

    def _states(self, ids: Tensor) -> tuple[Tensor, NetworkMetrics]:
        """What the output layer returns."""
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"FlowNetwork: ids must be int64, got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[1] > self.max_seq_len:
            raise ValueError(
                f"FlowNetwork: ids must have shape [B, N] with N at most {self.max_seq_len}, got {list(ids.shape)}"
            )
        tokens = self.embedding(ids)
        if self.tie_output:  # a table fit for the output has small rows
            tokens = tokens * self.positions.shape[1] ** 0.5
        places = self.positions[: ids.shape[1]].to(tokens.dtype).expand_as(tokens)
        h, first = self.input_layer(torch.cat([tokens, places], -1))
        metrics = NetworkMetrics([first])
        gates = self.gate(h).sigmoid()
        for number, layer in enumerate(self.layers):
            if self.mixers:
                h = h + self.mixers[number](h)
            update, seen = layer(h)
            gate = gates[..., number : number + 1]
            h = torch.lerp(h, update.to(h.dtype), gate.to(h.dtype))
            metrics.append(FlowMetrics.of(seen.weights, seen.active_share, gate))
        h, last = self.output_layer(h)
        metrics.append(last)
        return h, metrics

    def set_density(self, density: float | None, *, blocks: bool = False) -> None:
        """The share of connections that counts from now on in every layer; None for all. Full-rank patterns only.

        Of each token's mixed connections, those of the largest magnitude (exact, and slower than all of them); with
        `blocks` of each pattern's blocks, those of the largest norm now (and faster). Call it again to choose anew.
        """
        for module in self.modules():
            if isinstance(module, AdaptiveFlowRouter):
                module.set_density(density, blocks=blocks)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def size_mb(self) -> float:
        """Parameters in MB of 2^20 bytes."""
        return sum(p.numel() * p.element_size() for p in self.parameters()) / 2**20

    def parameter_reduction(self) -> dict[str, float]:
        """Parameters here against those of a network that generates each token's full matrices by a linear map.

        Such a generator takes x to all O * I entries of F: (I + 1) * O * I parameters a layer instead of the router's.
        """
        routers = [m for m in self.modules() if isinstance(m, AdaptiveFlowRouter)]
        own = sum(p.numel() for r in routers for p in r.parameters())
        rest = self.num_parameters() - own
        generated = rest + sum(r.output_dim * r.input_dim * (r.input_dim + 1) for r in routers)
        here = self.num_parameters()
        return {"parameters": here, "generated": generated, "reduction": 1 - here / generated}
