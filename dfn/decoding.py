"""One entity more: what a causal model needs to go on without starting over."""

from typing import NamedTuple

import torch
from torch import Tensor

from dfn_kernels import flow_drift, gaussian_gather, knn

from .layers import DFNBlock


class Seen(NamedTuple):
    """What a block keeps of the entities so far: where they drifted to, what they say, how much they moved."""

    positions: Tensor  # [B, H, n, D]
    values: Tensor  # [B, H, n, c]
    energy: Tensor  # [B], float64: the sum over heads and entities


class Decoder:
    """Runs a `DFNLanguageModel` over a sequence that grows: ``Decoder(model)(ids)`` are the logits of the last entity.

    Entities do not move any more once they are there, so each call costs one entity's arithmetic and a search through
    the positions seen. Give the prompt first, ``[B, N]``, then one token a call, ``[B, 1]``; the logits ``[B, V]`` are
    those of a full pass within float tolerance.
    """

    def __init__(self, model):
        self.model, self.count = model, 0
        self.seen: list[Seen] = []

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        if self.count and ids.shape[1] != 1:
            raise ValueError(f"Decoder: ids must be one token after the prompt, [B, 1], got {list(ids.shape)}")
        states = self.model.embed(ids)
        positions = self.model.positions(states, self.count)
        run, self.seen = [None] * len(self.model.blocks) if not self.count else self.seen, []
        for block, seen in zip(self.model.blocks, run, strict=True):
            states, positions, seen = (
                _first(block, states, positions) if seen is None else _next(block, states, positions, seen)
            )
            self.seen.append(seen)
        self.count += ids.shape[1]
        return self.model.head(self.model.norm(states[:, -1]))


def _first(block: DFNBlock, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Seen]:
    s = block.norm(states)
    y, drift = block.attention(s, positions)
    values = block.attention.split(block.attention.value(s))
    seen = Seen(drift.positions, values, drift.energy.sum((1, 2), dtype=torch.float64))
    return block(states, positions)[0], drift.positions, seen


def _next(block: DFNBlock, states: Tensor, positions: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Seen]:
    """``states [B, 1, d], positions [B, H, 1, D]``: the newest entity, whom everybody before it is a neighbour to."""
    a = block.attention
    H, D = a.heads, a.pos_dim
    s = block.norm(states)
    drift = flow_drift(s, positions, a.flow.weight.view(H, D, -1), a.flow.bias.view(H, D), a.alpha)
    seen = Seen(
        torch.cat([seen.positions, drift.positions], 2),
        torch.cat([seen.values, a.split(a.value(s))], 2),
        seen.energy + drift.energy.sum((1, 2), dtype=torch.float64),
    )
    queries = drift.positions + a.offset[:, None]
    near = knn(seen.positions, a.k, queries=queries).indices
    y = gaussian_gather(
        seen.positions, seen.values, near, a.log_sigma.exp(), query_positions=queries, normalize=True
    ).transpose(1, 2).flatten(2)  # fmt: skip
    mean = (seen.energy / seen.positions.shape[2]).to(drift.energy.dtype)[:, None]
    update = block.mlp(torch.cat([s, y], -1))
    if block.flow_norm is not None:  # the running mean is the entity's own by now
        update = update / (mean + block.flow_norm.eps).sqrt()[..., None]
    return states + block.out(y) + update, drift.positions, seen
