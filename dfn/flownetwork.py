"""FlowNetwork: layers whose weight matrix is mixed per token from P shared patterns. The mixed matrix never exists."""

import math

import torch
from torch import Tensor, nn

from dfn_kernels import BlockDensity, low_rank_route, pattern_route
from dfn_kernels.pattern_route import route as route_some_blocks

from .flow_metrics import FlowMetrics, NetworkMetrics
from .flow_quantized import quantized_router
from .vocabulary_loss import vocabulary_logits, vocabulary_loss

__all__ = [
    "AdaptiveFlowRouter",
    "FlowLayer",
    "FlowMetrics",
    "FlowNetwork",
    "PRESETS",
    "benchmark_flow_network",
    "create_dummy_data",
    "train_flow_network",
]

PRESETS = {
    "edge": dict(vocab_size=5000, d_model=256, num_layers=3, num_patterns=4),
    "base": dict(vocab_size=10000, d_model=512, num_layers=6, num_patterns=8),
    "large": dict(vocab_size=50000, d_model=768, num_layers=8, num_patterns=16),
    "compact": dict(vocab_size=10000, d_model=512, num_layers=6, num_patterns=8, rank=12, tie_output=True),
}


class AdaptiveFlowRouter(nn.Module):
    """P patterns and a selector: ``w = softmax(Linear(x))``, ``F = sum_p w_p P_p``, ``y = F x``.

    Args:
        input_dim, output_dim: I and O.
        num_patterns: P.
        rank: r; patterns ``P_p = up_p down_p`` with ``up [P, O, r]`` and ``down [P, r, I]``. Full rank without it.
        top_k, density: sparsity as in `dfn_kernels.pattern_route` (full-rank patterns only).
        block_density: the share of each pattern's blocks that counts, as in `dfn_kernels.BlockDensity` (full-rank
            patterns only, not together with density). `set_density` chooses the blocks anew.

    `forward(x)` returns the mixed matrices ``[.., O, I]`` and metrics, as published, for looking at; `route(x)` returns
    ``y [.., O]`` and metrics without building them.
    """

    def __init__(
        self, input_dim: int, output_dim: int, num_patterns: int = 8, *, rank: int | None = None,
        top_k: int | None = None, density: float | None = None, block_density: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if rank is not None and not (top_k is None and density is None and block_density is None):
            raise ValueError("AdaptiveFlowRouter: top_k and density need full-rank patterns, got rank as well")
        if density is not None and block_density is not None:
            raise ValueError("AdaptiveFlowRouter: density and block_density exclude each other, got both")
        self.input_dim, self.output_dim, self.num_patterns = input_dim, output_dim, num_patterns
        self.rank, self.top_k, self.density = rank, top_k, density
        self.pattern_selector = nn.Linear(input_dim, num_patterns)
        # The patterns live in linear layers, so that torch's quantize_dynamic finds and quantises them.
        if rank is None:
            self.bank = nn.Linear(input_dim, num_patterns * output_dim, bias=False)
        else:
            self.down = nn.Linear(input_dim, num_patterns * rank, bias=False)
            self.up = nn.Linear(num_patterns * rank, output_dim, bias=False)
        self.int8: nn.Module | None = None  # takes the place of all of them after quantize_dynamic
        self.register_buffer("blocks", None)  # [P, ceil(O / 128), ceil(I / 64)] bool: those that count
        self.register_buffer("block_share", None)
        self.reset_parameters()
        if block_density is not None:
            self.set_density(block_density, blocks=True)

    def reset_parameters(self) -> None:
        """Patterns so that the mixture at the start, of P nearly equal weights, keeps the variance of x."""
        spread = math.sqrt(self.num_patterns / self.input_dim)
        if self.rank is None:
            nn.init.normal_(self.bank.weight, std=spread)
        else:
            nn.init.normal_(self.down.weight, std=1 / math.sqrt(self.input_dim))
            nn.init.normal_(self.up.weight, std=math.sqrt(self.num_patterns / self.rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        """up ``[P, O, r]`` and down ``[P, r, I]`` of low-rank patterns, views of the parameters."""
        if self.int8 is not None:
            return self.int8.factors()
        up = self.up.weight.view(self.output_dim, self.num_patterns, self.rank).transpose(0, 1)
        return up, self.down.weight.view(self.num_patterns, self.rank, self.input_dim)

    @property
    def patterns(self) -> Tensor:
        """``[P, O, I]``: a view of the parameters; multiplied out for low-rank patterns."""
        if self.rank is not None:
            up, down = self.factors()
            return up @ down
        if self.int8 is not None:
            return self.int8.bank.dequantize()
        return self.bank.weight.view(self.num_patterns, self.output_dim, self.input_dim)

    def set_density(self, density: float | None, *, blocks: bool = False) -> None:
        """The share of connections that counts from now on, token by token or by `blocks`, chosen now; None for all."""
        if self.rank is not None and density is not None:
            raise ValueError(f"AdaptiveFlowRouter: density needs full-rank patterns, got rank {self.rank}")
        self.density = None if blocks else density
        self.blocks = self.block_share = None
        if blocks and density is not None:
            chosen = BlockDensity(self.patterns.detach(), density)
            self.blocks = chosen.blocks
            self.block_share = torch.full((), chosen.share, device=chosen.blocks.device)

    def weights(self, x: Tensor) -> Tensor:
        """``[.., I] -> [.., P]``, in float32 under autocast."""
        return self.int8(x)[1] if self.int8 is not None else self.pattern_selector(x).float().softmax(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, FlowMetrics]:
        w = self.weights(x)
        patterns = self.patterns
        return torch.einsum("...p,poi->...oi", w.to(patterns.dtype), patterns), FlowMetrics.of(w)

    def route(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, FlowMetrics]:
        if self.int8 is not None:
            if self.density is not None:
                raise RuntimeError("AdaptiveFlowRouter: density is not available with quantised patterns")
            y, w = self.int8(x, bias)
            share = 1.0 if self.top_k is None else self.top_k / self.num_patterns
            return y, FlowMetrics.of(w, share * (w.new_ones(()) if self.block_share is None else self.block_share))
        w = self.weights(x)
        if self.rank is not None:
            return low_rank_route(x, w, *self.factors(), bias), FlowMetrics.of(w)
        if self.blocks is not None:
            return self._route_blocks(x, w, bias)
        if self.top_k is None and self.density is None:
            return pattern_route(x, w, self.patterns, bias), FlowMetrics.of(w)
        sparse = dict(top_k=self.top_k, density=self.density, return_share=True)
        y, active = pattern_route(x, w, self.patterns, bias, **sparse)
        return y, FlowMetrics.of(w, active)

    def _route_blocks(self, x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, FlowMetrics]:
        sparse = (self.blocks, self.block_share)
        y, active = route_some_blocks(x, w, self.patterns, bias, self.top_k, None, None, True, *sparse)
        return y, FlowMetrics.of(w, active)

    # torch's quantize_dynamic gives every module a qconfig, swaps the linear layers, and then deletes the qconfig of
    # every module, children first. That is where the int8 values are repacked for our kernels: the page's call is
    # enough, and the values are held once.
    @property
    def qconfig(self) -> object:
        if "_qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self._qconfig

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        self._qconfig = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["_qconfig"]
        if self.int8 is None:
            self.int8 = quantized_router(self)
        if self.int8 is not None:
            for name in ("pattern_selector", "bank", "down", "up"):
                self._modules.pop(name, None)

    def extra_repr(self) -> str:
        options = {"rank": self.rank, "top_k": self.top_k, "density": self.density}
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        if self.block_share is not None:
            given += f", share of blocks {self.block_share:.3f}"
        return f"{self.input_dim}, {self.output_dim}, num_patterns={self.num_patterns}{given}"


class FlowLayer(nn.Module):
    """``y = LayerNorm(F(x) x + b)``, F mixed by an `AdaptiveFlowRouter`. ``(x [.., I]) -> (y [.., O], metrics)``.

    Options: rank, top_k, density and block_density of `AdaptiveFlowRouter`.
    """

    def __init__(self, input_dim: int, output_dim: int, num_patterns: int = 8, **options):
        super().__init__()
        self.router = AdaptiveFlowRouter(input_dim, output_dim, num_patterns, **options)
        self.bias = nn.Parameter(torch.zeros(output_dim))
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, FlowMetrics]:
        y, metrics = self.router.route(x, self.bias)
        return self.norm(y), metrics


def sinusoids(length: int, dim: int) -> Tensor:
    """``[length, dim]`` fixed position codes: sines in the even places, cosines in the odd ones."""
    place = torch.arange(length).unsqueeze(1)
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([(place * rate).sin(), (place * rate).cos()], -1).flatten(1)[:, :dim]


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
        if d_model % 2:
            raise ValueError(f"FlowNetwork: d_model must be even, got {d_model}")
        sparse = dict(rank=rank, top_k=top_k, density=density, block_density=block_density)
        self.tie_output, self.max_seq_len = tie_output, max_seq_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5 if tie_output else 1.0)
        self.register_buffer("positions", sinusoids(max_seq_len, d_model), persistent=False)
        self.input_layer = FlowLayer(2 * d_model, d_model, num_patterns, **sparse)
        self.gate = nn.Linear(d_model, num_layers)
        self.layers = nn.ModuleList(FlowLayer(d_model, d_model, num_patterns, **sparse) for _ in range(num_layers))
        self.output_layer = FlowLayer(d_model, d_model if tie_output else vocab_size, num_patterns, **sparse)
        self.mixers = nn.ModuleList()
        if mixer == "flow_attention":
            from .layers import FlowMixer

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
        return (vocabulary_logits(h, self.embedding.weight) if self.tie_output else h), metrics

    def loss(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, NetworkMetrics]:
        """Mean cross-entropy of the logits in nats, float32, and metrics; targets int64 ``[B, N]``.

        With `tie_output` by `vocabulary_loss`, which takes less time and memory than logits and their cross-entropy.
        """
        h, metrics = self._states(ids)
        if self.tie_output:
            return vocabulary_loss(h, self.embedding.weight, targets), metrics
        return nn.functional.cross_entropy(h.flatten(0, 1).float(), targets.flatten()), metrics

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
            tokens = tokens * self.embedding.embedding_dim**0.5
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


from .flow_benchmark import benchmark_flow_network  # noqa: E402
from .flow_training import create_dummy_data, train_flow_network  # noqa: E402
