"""A persistent field memory: entities that outlive the segment they came from."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfn_kernels import gaussian_gather, knn

FAR = 1e15  # where unused entities are: found last, with influence 0; squares of it, summed, stay finite in float32


class MemoryState(NamedTuple):
    """What a memory holds: M entities per sequence. Unused ones have influence 0 and lie far away from everything."""

    positions: Tensor  # [B, M, D], float32
    states: Tensor  # [B, M, d]
    influence: Tensor  # [B, M]

    def detach(self) -> "MemoryState":
        """The same without its history: no gradient flows into earlier segments."""
        return MemoryState(*(x.detach() for x in self))

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors for a checkpoint; ``MemoryState(**tensors)`` brings them back."""
        return {name: x.detach() for name, x in self._asdict().items()}


class PersistentFieldMemory(nn.Module):
    """M entities that persist across segments: explicit state in, explicit state out.

    `write` takes the held entities, aged (``w = decay * w``), and then the new ones, as one sequence.
    Every entity merges into the nearest one before it if that is within ``merge_radius``, where merging is
    ``w = sum w_i``, ``p = sum w_i p_i / w``, ``s = sum w_i s_i / w``, along chains if need be. Of what is left the M
    with the most influence stay, of equals the later one: what recurs stays long, what does not fades.

    Reads come from the state before a write, so a segment sees only what earlier segments wrote.

    Args:
        size: M. dim: d, the size of a state. pos_dim: D, the dimension of a position; with heads, that of all heads
            together, so that each finds an entity where it stood when it was written.
        decay: what remains of the influence after a write, above 0 and at most 1.
        merge_radius: 0 merges only what is at the same place.

    The module has no parameters; its state is `MemoryState`, which belongs to a stream of data and not to the model.

    >>> memory = PersistentFieldMemory(2, 1, 1, decay=0.5, merge_radius=0.1)
    >>> x = torch.tensor([[[0.0], [4.0], [0.05]]])
    >>> state = memory.write(memory.initial_state(1), x, x, torch.ones(1, 3))
    >>> state.influence.tolist(), state.positions[0, 1].tolist()
    ([[2.0, 1.0]], [4.0])
    """

    def __init__(self, size: int, dim: int, pos_dim: int = 3, *, decay: float = 0.99, merge_radius: float = 0.05):
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("pos_dim", pos_dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PersistentFieldMemory: {name} must be an integer of at least 1, got {value}")
        if not 0 < decay <= 1:
            raise ValueError(f"PersistentFieldMemory: decay must be above 0 and at most 1, got {decay}")
        if not 0 <= merge_radius < FAR:
            raise ValueError(f"PersistentFieldMemory: merge_radius must not be negative, got {merge_radius}")
        self.size, self.dim, self.pos_dim, self.decay, self.merge_radius = size, dim, pos_dim, decay, merge_radius

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> MemoryState:
        """A memory that holds nothing, for ``batch`` sequences."""
        B, M = batch, self.size
        return MemoryState(
            torch.full((B, M, self.pos_dim), FAR, device=device),
            torch.zeros(B, M, self.dim, device=device),
            torch.zeros(B, M, device=device),
        )

    def write(
        self, state: MemoryState, positions: Tensor, states: Tensor, influence: Tensor | None = None
    ) -> MemoryState:
        """The memory after writing ``positions [B, n, D]``, ``states [B, n, d]`` and ``influence [B, n]``.

        An influence of 0 writes nothing; 1 for every entity without it. The given state is not changed. Gradients
        flow to all float tensors; which entities merge and which stay is constant. Raises ValueError (shapes).
        """
        B, n = positions.shape[0], positions.shape[1] if positions.ndim > 1 else 0
        if influence is None:
            influence = states.new_ones(states.shape[:2])
        self._check("positions", positions, (state.positions.shape[0], n, self.pos_dim))
        self._check("states", states, (B, n, self.dim))
        self._check("influence", influence, (B, n))
        for name, x, like in zip(MemoryState._fields, state, (self.pos_dim, self.dim, None), strict=True):
            self._check(f"state.{name}", x, (B, self.size, like) if like else (B, self.size))

        w = torch.cat([self.decay * state.influence, influence.to(state.influence.dtype)], 1)
        new = positions.float().masked_fill((influence <= 0)[..., None], FAR)
        p = torch.cat([state.positions, new], 1)
        s = torch.cat([state.states, states.to(state.states.dtype)], 1)
        with torch.no_grad():
            root = self._roots(p.detach())
        total = torch.zeros_like(w).scatter_add(1, root, w)
        whole = total.gather(1, root)
        share = w / whole.where(whole > 0, 1)
        p = torch.zeros_like(p).scatter_add(1, root[..., None].expand_as(p), share[..., None] * p)
        s = torch.zeros_like(s).scatter_add(1, root[..., None].expand_as(s), share.to(s.dtype)[..., None] * s)
        p = p.masked_fill((total <= 0)[..., None], FAR)

        # The latest come first, so that a stable sort keeps them among equals; then back to the order of time.
        latest = total.detach().flip(1)
        keep = (total.shape[1] - 1 - latest.argsort(dim=1, descending=True, stable=True))[:, : self.size]
        keep = keep.sort(1).values
        return MemoryState(*(x.gather(1, keep.view(*keep.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
                             for x in (p, s, total)))  # fmt: skip

    def _roots(self, p: Tensor) -> Tensor:
        """Into which entity each one merges in the end, int64 ``[B, M + n]``; itself if it stays."""
        near = knn(p.contiguous(), 1, causal=True, include_self=False)
        index, sq_dist = near.indices[..., 0], near.sq_dists[..., 0]
        own = torch.arange(p.shape[1], device=p.device).expand_as(index)
        root = torch.where((index >= 0) & (sq_dist <= self.merge_radius**2), index, own)
        # Each round doubles the length of the chain that is known. Compiled code must serve every length: 2^31 do.
        for _ in range(31 if torch.compiler.is_compiling() else p.shape[1].bit_length()):
            root = root.gather(1, root)
        return root

    def read(self, state: MemoryState, queries: Tensor, sigma: float | Tensor, k: int = 16) -> Tensor:
        """What the memory knows at ``queries [B, n, D]``: ``[B, n, d]``.

        The mean of the k nearest held states, weighted by ``w_j exp(-|q - p_j|^2 / (2 sigma^2))``; 0 where none is.
        """
        queries = queries.float().contiguous()
        near = knn(state.positions.detach().contiguous(), min(k, self.size), queries=queries)
        return gaussian_gather(
            state.positions, state.states, near.indices, sigma, influence=state.influence, query_positions=queries,
            normalize=True,
        )  # fmt: skip

    def _check(self, name: str, x: Tensor, shape: tuple) -> None:
        if tuple(x.shape) != tuple(shape):
            message = f"{name} must have shape {list(shape)}, got {list(x.shape)}"
            raise ValueError(f"PersistentFieldMemory: {message}")

    def extra_repr(self) -> str:
        sizes = f"size={self.size}, dim={self.dim}, pos_dim={self.pos_dim}"
        return f"{sizes}, decay={self.decay:g}, merge_radius={self.merge_radius:g}"
