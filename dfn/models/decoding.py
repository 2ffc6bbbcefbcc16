"""One entity more: what a causal model needs to go on without starting over."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from dfn_kernels import StreamingKNN, knn
from dfn_kernels.reference.gaussian_gather import WIDTHS

from .layers import DFNBlock, DynamicFlowAttention, EntityPositions
from .linears import applied
from .memory import MemoryState

ROWS = 1 << 16  # of a prompt that pass through an MLP at a time: its activations are the largest there are


class CausalModel(Protocol):
    """What a `Decoder` asks of a model: what `DFNLanguageModel` is made of."""

    embed: nn.Embedding
    positions: EntityPositions
    blocks: nn.ModuleList  # of causal `DFNBlock`
    norm: nn.Module
    head: nn.Module

    def check_memory(self, memory: MemoryState | None) -> None: ...


class Stream:
    """The k nearest of a growing set of points, by `StreamingKNN` on the CPU: a step costs O(log n)."""

    def __init__(self, points: Tensor, k: int, capacity: int):
        S, _, D = points.shape
        self.k, self.index = k, StreamingKNN(S, D, dtype=str(points.dtype).removeprefix("torch."))
        self.index.extend(points.numpy())

    def __call__(self, point: Tensor, query: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Adds ``point [S, D]``; then int64 and float ``[S, k]``: neighbours of ``query [S, D]``, squared distances."""
        self.index.extend(point.numpy()[:, None])
        indices, sq_dists = map(torch.from_numpy, self.index.query(query.numpy(), self.k))
        if (indices[:, 0] < 0).any():  # the entity itself is always there
            raise ValueError("Decoder: positions must be finite, got a NaN or an infinity")
        return indices, sq_dists

    def reserve(self, capacity: int) -> None: ...


class Scan:
    """The same by looking at every point: static shapes and no host synchronisation, so a CUDA graph can hold it.

    float32 distances and indices are packed into one integer, so that equal distances are ordered by index.
    """

    def __init__(self, points: Tensor, k: int, capacity: int):
        self.k, self.points, self.numbers = k, points, None
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        self.points = padded(self.points, capacity)
        self.numbers = torch.arange(capacity, device=self.points.device)

    def __call__(self, point: Tensor, query: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """``count``, int64 ``[1]``, is how many were there before."""
        self.points.index_copy_(1, count, point[:, None])
        sq_dists = 0  # summed as `knn` sums: in the order of dimensions
        for p, q in zip(self.points.unbind(-1), query.unbind(-1), strict=True):
            sq_dists = sq_dists + (p - q[:, None]).square()
        sq_dists = sq_dists.where((self.numbers <= count) & sq_dists.isfinite(), torch.inf)
        k = min(self.k, len(self.numbers))
        if sq_dists.dtype != torch.float32:
            sq_dists, indices = sq_dists.sort(dim=1, stable=True)
            return indices[:, :k], sq_dists[:, :k]
        keys = (sq_dists.view(torch.int32).long() << 32) | self.numbers
        keys = keys.topk(k, dim=1, largest=False).values
        return keys & 0xFFFFFFFF, (keys >> 32).int().view(torch.float32)


def padded(x: Tensor, capacity: int) -> Tensor:
    """``[S, n, c] -> [S, capacity, c]``, zeros at the end."""
    more = x.new_zeros(x.shape[0], capacity, x.shape[2])
    more[:, : x.shape[1]] = x[:, :capacity]
    return more


class Seen:
    """What a block keeps of the entities so far: where they are, what they say, how much they moved; S = B H."""

    def __init__(self, attention: DynamicFlowAttention, search: Stream | Scan, values: Tensor, energy: Tensor):
        if not attention.normalize:
            raise ValueError("Decoder: the model's blocks must have normalize=True, got False")
        self.search, self.values, self.energy = search, values, energy  # [S, capacity, c]; float64 [B]
        self.loudness: Tensor | None = None  # [S, capacity, 1], logarithms of the learned influence
        sigma = attention.log_sigma.exp()
        sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
        self.scale = -0.5 / sigma.clamp(*WIDTHS[sigma.dtype]).square()[:, None]  # [H, 1]
        self.extra: tuple[Tensor, Tensor, Tensor] | None = None
        self.latest: Tensor | None = None  # [B, W - 1, d], what a convolution looks back at

    def remember(self, attention: DynamicFlowAttention, memory: MemoryState) -> None:
        """The memory's entities are read along: positions ``[S, M, D]``, values, logarithms of the influence."""
        entities = attention.entities(memory)
        points, values, influence = (entities[f"extra_{name}"] for name in ("positions", "values", "influence"))
        influence = influence.flatten(0, 1).to(self.scale.dtype)
        self.extra = points.flatten(0, 1).contiguous(), values.flatten(0, 1), influence.log()

    def read(self, point: Tensor, query: Tensor, value: Tensor, loudness: Tensor | None, count: Tensor) -> Tensor:
        """Adds an entity, ``[S, D]``, ``[S, c]`` and ``[S, 1]``, and gives what it reads, ``[S, c]``."""
        self.values.index_copy_(1, count, value[:, None])
        indices, sq_dists = self.search(point, query, count)
        values, weights = rows_of(self.values, indices), None
        if loudness is not None:
            self.loudness.index_copy_(1, count, loudness[:, None])
            weights = rows_of(self.loudness, indices)[..., 0]
        if self.extra is not None:
            points, held, log_influence = self.extra
            more = knn(points, self.search.k, queries=query[:, None])
            sq_dists, order = torch.cat([sq_dists, more.sq_dists[:, 0]], 1).sort(dim=1, stable=True)
            order, sq_dists = order[:, : self.search.k], sq_dists[:, : self.search.k]
            values = rows_of(torch.cat([values, rows_of(held, more.indices[:, 0])], 1), order)
            known = log_influence.gather(1, more.indices[:, 0].clamp(min=0))
            own = torch.zeros_like(indices, dtype=known.dtype) if weights is None else weights
            weights = torch.cat([own, known], 1).gather(1, order)
        squares = (sq_dists - sq_dists[:, :1]).view(-1, len(self.scale), sq_dists.shape[1])  # the nearest is first
        logits = (squares * self.scale).flatten(0, 1)
        if weights is not None:
            logits = logits + weights
        return (logits.softmax(1)[:, None].to(values.dtype) @ values)[:, 0]


def rows_of(x: Tensor, indices: Tensor) -> Tensor:
    """``[S, n, c], [S, k] -> [S, k, c]``; -1, which weighs nothing, gives any row."""
    return x.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))


class Decoder:
    """Runs a `DFNLanguageModel` over a sequence that grows: ``Decoder(model)(ids)`` are the logits of the last entity.

    Entities do not move any more once they are there, so each call costs one entity's arithmetic and a search among
    the positions seen: on the CPU by `StreamingKNN`, whose cost hardly grows with their number; elsewhere a scan of
    all of them, whose shapes never change, captured in a CUDA graph. Give the prompt first, ``[B, N]``, then one token
    a call, ``[B, 1]``; the logits ``[B, V]`` are those of a full pass within float tolerance. They are overwritten by
    the next call where a graph is used. Not yet run on a GPU.

    Args:
        memory: what the full pass would be given. It is read and not written.
        capacity: how many entities there will be, if that is known: room for them is made at once. Beyond it, room is
            doubled.
        search: `Stream` or `Scan`.

    Raises ValueError (shapes, a memory for a model without one, positions that are not finite).
    """

    def __init__(self, model: CausalModel, *, memory: MemoryState | None = None, capacity: int = 0,
                 search: type[Stream] | type[Scan] | None = None):  # fmt: skip
        model.check_memory(memory)
        self.model, self.memory, self.capacity, self.search = model, memory, capacity, search
        self.length = 0  # the same as count, known without asking the device
        self.count: Tensor | None = None  # int64 [1]
        self.seen: list[Seen] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        if self.length and ids.shape[1] != 1:
            raise ValueError(f"Decoder: ids must be one token after the prompt, [B, 1], got {list(ids.shape)}")
        self.length += ids.shape[1]
        if self.length > self.capacity:
            self._reserve(max(self.length + 256, 2 * self.capacity))
        if not self.seen:
            with without_dropout(self.model):
                return self._prompt(ids)
        if ids.device.type != "cuda":
            return self._step(ids)
        if self.graph is None:
            self._capture(ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def _prompt(self, ids: Tensor) -> Tensor:
        """A full pass over the prompt, of which every block keeps what it needs."""
        states = self.model.embed(ids)
        positions = self.model.positions(states)
        self.count = torch.tensor([ids.shape[1]], device=ids.device)
        search = self.search or (Stream if ids.device.type == "cpu" and can_stream() else Scan)
        for block in self.model.blocks:
            a, s = block.attention, block.said(states)
            memory = self.memory if block is self.model.blocks[-1] else None
            y, drift = a(s, positions, memory=memory)
            points, values = drift.positions.flatten(0, 1), a.split(a.value(s)).flatten(0, 1)
            energy = drift.energy.sum(1, dtype=torch.float64).cumsum(1)  # [B, N]
            seen = Seen(a, search(points, a.k, self.capacity), padded(values, self.capacity), energy[:, -1])
            if a.salience is not None:
                loudness = a.log_influence(s).transpose(1, 2).flatten(0, 1)
                seen.loudness = padded(loudness[..., None], self.capacity)
            if block.convolution is not None:
                back = len(block.convolution.weight) - 1
                recent = block.norm(states[:, max(0, ids.shape[1] - back) :])
                seen.latest = nn.functional.pad(recent, (0, 0, back - recent.shape[1], 0))
            if memory is not None:
                seen.remember(a, memory)
            self.seen.append(seen)
            if block is self.model.blocks[-1]:
                states, s, y, energy = states[:, -1:], s[:, -1:], y[:, -1:], energy[:, -1:] / ids.shape[1]
            else:
                energy = energy / torch.arange(1, ids.shape[1] + 1, device=ids.device)
            parts = zip(*(x.split(ROWS, 1) for x in (states, s, y, energy)), strict=True)
            states, positions = torch.cat([updated(block, *part) for part in parts], 1), drift.positions
        return self.model.head(self.model.norm(states[:, -1]))

    def _step(self, ids: Tensor) -> Tensor:
        """``[B, 1] -> [B, V]``, in static shapes and without a word from the device."""
        states = self.model.embed(ids)
        positions = self.model.positions(states, self.count)[:, :, 0]  # [B, H, D]
        states, after = states[:, 0], self.count + 1
        for block, seen in zip(self.model.blocks, self.seen, strict=True):
            a, s = block.attention, block.norm(states)
            if block.convolution is not None:
                normed, s = s, block.convolution.step(s, seen.latest)
                seen.latest.copy_(torch.cat([seen.latest, normed[:, None]], 1)[:, 1:])
            flow = applied(a.flow, s).view_as(positions)
            positions = positions + a.alpha[:, None] * flow
            query = positions + a.offset
            if a.receiver is not None:
                query = query + a.alpha[:, None] * applied(a.receiver, s).view_as(positions)
            value = a.value(s).view(-1, self.seen[0].values.shape[2])
            loudness = None if a.salience is None else a.log_influence(s).view(-1, 1)
            y = seen.read(positions.flatten(0, 1), query.flatten(0, 1), value, loudness, self.count)
            seen.energy += flow.square().sum((1, 2), dtype=torch.float64)
            states = updated(block, states, s, y.view_as(s), seen.energy / after)
        self.count += 1
        return self.model.head(self.model.norm(states))

    def _reserve(self, capacity: int) -> None:
        self.capacity, self.graph = capacity, None
        for seen in self.seen:
            seen.values = padded(seen.values, capacity)
            seen.loudness = None if seen.loudness is None else padded(seen.loudness, capacity)
            seen.search.reserve(capacity)

    def _capture(self, ids: Tensor) -> None:
        """Records a step; recording, like the trial runs before it, leaves no trace in the state."""
        self.ids = ids.clone()
        kept = [self.count, *(x for seen in self.seen for x in (seen.energy, seen.latest) if x is not None)]
        before = [x.clone() for x in kept]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(self.ids)
                self.count.copy_(before[0])  # the last place that there is may be this one's
        torch.cuda.current_stream().wait_stream(side)
        for x, b in zip(kept, before, strict=True):
            x.copy_(b)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step(self.ids)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """What is generated does not depend on whether the model is in training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def updated(block: DFNBlock, states: Tensor, s: Tensor, y: Tensor, energy: Tensor) -> Tensor:
    """`DFNBlock` from what was read on; ``energy``, ``[..]``, is the running mean."""
    update = block.mlp(torch.cat([s, y.to(s.dtype)], -1))
    if block.flow_norm is not None:
        update = update / (energy + block.flow_norm.eps).sqrt().to(update.dtype)[..., None]
    return states + block.out(y) + update


def can_stream() -> bool:
    return StreamingKNN.__module__ != "dfn_kernels.streaming"  # there it is only the message how to build it
