"""What a FlowNetwork's layers tell about how they mix. Kept as tensors, computed when asked for."""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..style import INK, ORANGE, OURS, picture
from ..training.losses import wide


@dataclass(frozen=True)
class FlowMetrics:
    """How a router mixed its tokens. Nothing here costs time, or waits for a GPU, until it is asked for.

    weights: ``[T, P]`` float32, the tokens' weights, which sum to 1. No gradients flow through metrics.
    active_share: share of the connections that were active, 0-d; None without sparsity.
    gates: ``[T]``, what the tokens took of the layer; None where there is no gate.
    """

    weights: Tensor
    active_share: Tensor | None = None
    gates: Tensor | None = None

    @classmethod
    def of(cls, weights: Tensor, active: Tensor | None = None, gates: Tensor | None = None) -> "FlowMetrics":
        """From weights ``[.., P]`` and gates ``[..]``."""
        return cls(weights.detach().flatten(0, -2), active, None if gates is None else gates.detach().flatten())

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy of their weights, in bits: low where each token is sure of its pattern."""
        return _bits(wide(self.weights)).mean()

    @property
    def usage(self) -> Tensor:
        """``[P]``, the mean weight of each pattern."""
        return wide(self.weights).mean(0)

    @property
    def usage_entropy(self) -> Tensor:
        """Entropy of the mean weights, in bits: log2(P) where all patterns are used alike, 0 where one serves all."""
        return _bits(self.usage)

    @property
    def active(self) -> Tensor:
        """Share of the connections that were active, 1 without sparsity."""
        return self.weights.new_ones(()) if self.active_share is None else self.active_share

    @property
    def gate(self) -> Tensor | None:
        """Mean of the layer's gate, where there is one."""
        return None if self.gates is None else wide(self.gates).mean()

    def summary(self) -> dict[str, float]:
        """Plain numbers, for printing; waits for the device."""
        numbers = {
            "entropy": self.entropy.item(),
            "usage_entropy": self.usage_entropy.item(),
            "max_entropy": math.log2(self.weights.shape[-1]),
            "active": self.active.item(),
        }
        return numbers if self.gate is None else {**numbers, "gate": self.gate.item()}


def _bits(w: Tensor) -> Tensor:
    return -(w * w.clamp_min(1e-30).log2()).sum(-1)


class NetworkMetrics(list):
    """The metrics of a network's layers, in order: input, flow layers, output. `summary` averages them."""

    def summary(self) -> dict[str, float]:
        rows = [layer.summary() for layer in self]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: sum(r[name] for r in rows if name in r) / sum(name in r for r in rows) for name in names}

    @property
    def pattern_entropy(self) -> Tensor:
        """Mean over the layers of `FlowMetrics.entropy`, 0-d."""
        return torch.stack([layer.entropy for layer in self]).mean()

    def plot(self, path: str | os.PathLike) -> None:
        """Writes a PNG: how much each layer uses each pattern, and how sure its tokens are of theirs."""
        usage = torch.stack([layer.usage for layer in self]).cpu()
        rows = [layer.summary() for layer in self]
        names = ["input", *(f"layer {i + 1}" for i in range(len(self) - 2)), "output"]
        note = "A pattern is a matrix; each token mixes its own from them, with weights that sum to 1"
        with picture(path, 11, 0.42 * len(self) + 3, "Which patterns the layers use", note) as figure:
            left, right = figure.subplots(1, 2, sharey=True)
            image = left.imshow(usage, cmap="viridis", vmin=0, aspect="auto")
            figure.colorbar(image, ax=left, label="mean weight")
            left.set(yticks=range(len(self)), yticklabels=names, xlabel="pattern", title="how much each is used")
            left.set_xticks(range(0, usage.shape[1], -(-usage.shape[1] // 16)))
            place = torch.arange(len(self))
            right.barh(place - 0.2, [row["entropy"] for row in rows], 0.4, color=OURS, label="of one token's weights")
            right.barh(place + 0.2, [row["usage_entropy"] for row in rows], 0.4, color=ORANGE,
                       label="of the mean weights")  # fmt: skip
            right.axvline(rows[0]["max_entropy"], color=INK, lw=1.2, ls=(0, (4, 4)), label="the most there can be")
            right.set(xlabel="entropy, bits", title="low: tokens are sure; high: all are used")
            figure.legend(loc="outside lower right", ncols=3)


# So that torch.export can return them.
torch.export.register_dataclass(FlowMetrics, serialized_type_name="dfn.FlowMetrics")
torch.utils._pytree.register_pytree_node(
    NetworkMetrics, lambda layers: (list(layers), None), lambda layers, _: NetworkMetrics(layers),
    serialized_type_name="dfn.NetworkMetrics", to_dumpable_context=lambda _: None, from_dumpable_context=lambda _: None,
)  # fmt: skip
