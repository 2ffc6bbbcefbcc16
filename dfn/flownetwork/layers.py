"""Layers whose weight matrix is mixed per token from P shared patterns. The mixed matrix never exists."""

import math

import torch
from torch import Tensor, nn

from dfn_kernels import BlockDensity, low_rank_route, pattern_route
from dfn_kernels._checks import are_sizes
from dfn_kernels.pattern_route import route as route_some_blocks

from ..models.linears import is_plain, is_torchao, weight_of
from ..training.losses import wide
from .metrics import FlowMetrics
from .quantized import only_largest, quantized_router


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

    The patterns live in linear layers, `bank` or `down` and `up`. Adapters, hooks, pruning and parametrisations may be
    put on these: they are then called with x, and a full-rank router's memory grows by ``[T, P, O]``. Density and
    block_density, which look at the connections, ask for the layer's matrix: what it makes of the unit vectors.
    """

    def __init__(
        self, input_dim: int, output_dim: int, num_patterns: int = 8, *, rank: int | None = None,
        top_k: int | None = None, density: float | None = None, block_density: float | None = None,
    ):  # fmt: skip
        super().__init__()
        are_sizes("AdaptiveFlowRouter", input_dim=input_dim, output_dim=output_dim, num_patterns=num_patterns)
        are_sizes("AdaptiveFlowRouter", **({} if rank is None else {"rank": rank}))
        are_sizes("AdaptiveFlowRouter", most=num_patterns, **({} if top_k is None else {"top_k": top_k}))
        for name, share in (("density", density), ("block_density", block_density)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"AdaptiveFlowRouter: {name} must be above 0 and at most 1, got {share}")
        if rank is not None and not (top_k is None and density is None and block_density is None):
            raise ValueError("AdaptiveFlowRouter: top_k and density need full-rank patterns, got rank as well")
        if density is not None and block_density is not None:
            raise ValueError("AdaptiveFlowRouter: density and block_density exclude each other, got both")
        self.input_dim, self.output_dim, self.num_patterns = input_dim, output_dim, num_patterns
        self.rank, self.top_k, self.density = rank, top_k, density
        self.pattern_selector = nn.Linear(input_dim, num_patterns)
        # Linear layers, so that torch's quantize_dynamic, adapters and their like find them.
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

    def _look(self) -> None:
        """torchao leaves no trace but the weights themselves: whoever uses them first looks at what they are."""
        if self.int8 is None and is_torchao(getattr(self.bank if self.rank is None else self.down, "weight", None)):
            self._repack()

    def _repack(self) -> None:
        self.int8 = quantized_router(self)
        if self.int8 is not None:
            for name in ("pattern_selector", "bank", "down", "up"):
                self._modules.pop(name, None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """up ``[P, O, r]`` and down ``[P, r, I]`` of low-rank patterns, views of plain layers' parameters."""
        self._look()
        if self.int8 is not None:
            return self.int8.factors()
        P, r = self.num_patterns, self.rank
        up = weight_of(self.up, P * r).unflatten(1, (P, r)).transpose(0, 1)
        return up, weight_of(self.down, self.input_dim).unflatten(0, (P, r))

    @property
    def patterns(self) -> Tensor:
        """``[P, O, I]``: a view of a plain layer's parameters; multiplied out for low-rank patterns."""
        self._look()
        if self.rank is not None:
            up, down = self.factors()
            return up @ down
        if self.int8 is not None:
            return self.int8.bank.dequantize()
        return weight_of(self.bank, self.input_dim).unflatten(0, (self.num_patterns, self.output_dim))

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
        """``[.., I] -> [.., P]``, in float32 under autocast and for half precision, in float64 for float64."""
        self._look()
        return self.int8(x)[1] if self.int8 is not None else wide(self.pattern_selector(x)).softmax(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, FlowMetrics]:
        w = self.weights(x)
        patterns = self.patterns
        return torch.einsum("...p,poi->...oi", w.to(patterns.dtype), patterns), FlowMetrics.of(w)

    def route(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, FlowMetrics]:
        self._look()
        if self.int8 is not None:
            if self.density is not None:
                raise RuntimeError("AdaptiveFlowRouter: density is not available with quantised patterns")
            y, w = self.int8(x, bias)
            share = self.block_share
            if self.top_k is not None:
                share = (1.0 if share is None else share) * w.new_full((), self.top_k / self.num_patterns)
            return y, FlowMetrics.of(w, share)
        w = self.weights(x)
        if self.rank is not None:
            return self._route_low_rank(x, w, bias), FlowMetrics.of(w)
        if self.blocks is not None:
            return self._route_blocks(x, w, bias)
        if self.density is None and not is_plain(self.bank):
            return self._route_called(x, w, bias)
        if self.top_k is None and self.density is None:
            return pattern_route(x, w, self.patterns, bias), FlowMetrics.of(w)
        sparse = dict(top_k=self.top_k, density=self.density, return_share=True)
        y, active = pattern_route(x, w, self.patterns, bias, **sparse)
        return y, FlowMetrics.of(w, active)

    def _route_low_rank(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if is_plain(self.down) and is_plain(self.up):
            return low_rank_route(x, w, *self.factors(), bias)
        inner = self.down(x).unflatten(-1, (self.num_patterns, self.rank))
        y = self.up((inner * w.unsqueeze(-1)).to(inner.dtype).flatten(-2))
        return y if bias is None else y + bias.to(y.dtype)

    def _route_called(self, x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, FlowMetrics]:
        """What the patterns make of x, one by one, and then their mixture."""
        each = self.bank(x).unflatten(-1, (self.num_patterns, self.output_dim))
        used, share = w, None
        if self.top_k is not None:
            used, share = only_largest(w, self.top_k), w.new_full((), self.top_k / self.num_patterns)
        y = (used.unsqueeze(-1) * each).sum(-2)
        return (y if bias is None else y + bias).to(each.dtype), FlowMetrics.of(w, share)

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
            self._repack()

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
