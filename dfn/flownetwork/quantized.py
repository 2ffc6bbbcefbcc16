"""What torch's or torchao's quantisation makes of a FlowNetwork's routers: int8 patterns for our kernels."""

import torch
from torch import Tensor, nn

from dfn_kernels.pattern_route import largest, spread_blocks
from dfn_kernels.quantized_low_rank import QuantizedLowRank
from dfn_kernels.quantized_route import QuantizedPatterns, int8_rows

from ..models.linears import dense, int8, is_plain, is_quantised


class QuantizedFullRank(nn.Module):
    """Selector, softmax and full patterns: ``(x [.., I], bias) -> (y [.., O], weights [.., P])``."""

    def __init__(
        self, selector: tuple[Tensor, Tensor], selector_bias: Tensor, bank: tuple[Tensor, Tensor], top_k: int | None
    ):
        super().__init__()
        P = selector_bias.shape[0]
        self.selector = QuantizedPatterns(*(part.unsqueeze(0) for part in selector))
        self.register_buffer("selector_bias", selector_bias.detach().float())
        self.bank = QuantizedPatterns(*(part.unflatten(0, (P, -1)) for part in bank))
        self.top_k = top_k

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w = self.selector(x, x.new_ones((), dtype=torch.float32).expand(*x.shape[:-1], 1), self.selector_bias)
        w = w.float().softmax(-1)
        return self.bank(x, w if self.top_k is None else only_largest(w, self.top_k), bias), w


def only_largest(w: Tensor, k: int) -> Tensor:
    flat = w.flatten(0, -2)
    chosen = largest(flat, k)
    return torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen)).view_as(w)


def quantized_router(router: nn.Module) -> nn.Module | None:
    """From a router whose pattern layers were quantised: the module that takes their place; else None."""
    layers = [router.bank] if router.rank is None else [router.down, router.up]
    if not any(map(is_quantised, layers)):
        return None
    if not all(is_quantised(layer) or is_plain(layer) for layer in (router.pattern_selector, *layers)):
        return None  # an adapter or a hook beside: the layers are called
    selector, *parts = (_int8(layer) for layer in (router.pattern_selector, *layers))
    bias = dense(router.pattern_selector)[1]
    if router.rank is not None:
        return QuantizedLowRank(selector, bias, *parts)
    values, scales = parts[0]
    if router.blocks is not None:
        values = values * spread_blocks(router.blocks, values.unflatten(0, (router.num_patterns, -1))).flatten(0, 1)
    return QuantizedFullRank(selector, bias, (values, scales), router.top_k)


def _int8(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """int8 values ``[out, in]`` and the float32 scales of their rows."""
    found = int8(linear)  # None: left out by the caller's choice of layers, or not by rows
    return int8_rows(dense(linear)[0].detach()) if found is None else found
