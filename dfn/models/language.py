"""The language model of Dynamic Flow Networks, what it is without one of its parts, and how it is sampled."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dfn_kernels._checks import are_sizes

from ..training.losses import wide
from ..training.progress import shown
from .decoding import Decoder
from .feedforward import make_norm
from .layers import DFNBlock, EntityPositions, check_shape
from .memory import MemoryState, PersistentFieldMemory


class DFNLanguageModel(nn.Module):
    """A causal language model: every token is an entity, which drifts through ``layers`` blocks.

    ``x = E[ids]``, positions from `EntityPositions`, then `DFNBlock` after `DFNBlock`, each moving the entities on
    from where the one before left them, and ``logits = W RMSNorm(x)``. There is no limit on the length: time is
    a coordinate.

    With a memory the last block reads ``memory_size`` entities of a `PersistentFieldMemory` together with the
    sequence. Afterwards its entities, as they were read (normalised states, drifted positions of all heads), are
    written to it. Time goes on between segments: before the next one, the memory's temporal coordinates move back by
    the segment's length.

    Args:
        vocab_size: V; 256 for bytes. dim: d. layers, heads: H. pos_dim: D. k: neighbours per head.
        memory_size: M, entities of the memory; 0 is none.
        block_options: further keyword arguments of `DFNBlock`, as in ``{"flow_norm": False}``; see `ablated`. Its
            ``dropout``, ``norm``, ``bias`` and ``semantic`` hold for what stands around the blocks, too; without them
            ``output_scale`` is ``(2 layers)^-1/2`` and ``convolution`` 4. `FIRST_BLOCK` are those of models saved
            before 26 November 2026.

    Call: ``(ids int64 [B, N], memory=None, ptr=None)`` gives ``(logits [B, N, V], memory)``. ``logits[:, i]`` depend on
    ``ids[:, :i + 1]`` and the given memory alone: later ids do not change a bit of them. None is an empty memory; the
    returned `MemoryState`, detached, is for the next segment (None with ``memory_size=0``). ``ptr``, int64 ``[S + 1]``,
    are the offsets of S documents packed along N, ascending from 0 to N: each gets the logits it would get alone, its
    time begins with it. A memory belongs to one text, so a model that has one takes no ``ptr``.

    Raises: ValueError (sizes, a memory of other sizes or for a model without one), TypeError (not a MemoryState).
    """

    def __init__(self, vocab_size: int = 256, dim: int = 128, layers: int = 3, heads: int = 4, pos_dim: int = 8,
                 k: int = 16, *, memory_size: int = 0, block_options: dict[str, Any] | None = None):  # fmt: skip
        super().__init__()
        are_sizes("DFNLanguageModel", vocab_size=vocab_size, layers=layers)
        are_sizes("DFNLanguageModel", least=0, memory_size=memory_size)
        check_shape("DFNLanguageModel", dim, heads, pos_dim, k)
        options = dict(block_options or {})
        self.config = dict(vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, pos_dim=pos_dim, k=k,
                           memory_size=memory_size, block_options=options)  # fmt: skip
        options = {"output_scale": (2 * layers) ** -0.5, "convolution": 4, **options}
        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = EntityPositions(dim, heads, pos_dim, semantic=options.get("semantic"))
        self.blocks = nn.ModuleList(DFNBlock(dim, heads, pos_dim, k, causal=True, **options) for _ in range(layers))
        self.dropout = nn.Dropout(options.get("dropout", 0.0))
        bias = options.get("bias", False)
        self.norm = make_norm(options.get("norm", "rms"), dim, bias)
        self.head = nn.Linear(dim, vocab_size, bias=bias)
        self.memory = None
        if memory_size:
            self.memory = PersistentFieldMemory(memory_size, dim, heads * pos_dim, merge_radius=0.02)

    def forward(
        self, ids: Tensor, memory: MemoryState | None = None, ptr: Tensor | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        self.check_memory(memory)
        if ptr is not None and self.memory is not None:
            raise ValueError("DFNLanguageModel: ptr must be None with a memory, which belongs to one text")
        states = self.dropout(self.embed(ids))
        positions = self.positions(states, ptr=ptr)
        for block in self.blocks[:-1]:
            states, positions = block(states, positions, ptr=ptr)
        last = self.blocks[-1]
        before, (states, positions) = states, last(states, positions, memory=memory, ptr=ptr)
        if self.memory is not None:
            memory = self._written(memory, before, positions)
        return self.head(self.norm(states)), memory

    @torch.no_grad()
    def _written(self, memory: MemoryState | None, states: Tensor, positions: Tensor) -> MemoryState:
        """The memory after a segment: what the last block was given, ``[B, N, d]``, and where it drifted to."""
        H, N, D = positions.shape[1:]
        memory = self.memory.initial_state(states.shape[0], states.device) if memory is None else memory
        written = positions.transpose(1, 2).flatten(2).detach()
        memory = self.memory.write(memory.detach(), written, self.blocks[-1].said(states).detach())
        back = torch.zeros(H, D, device=states.device)
        back[self.positions.semantic :, 0] = N * self.positions.log_scale.exp()  # no other coordinate is time
        moved = memory.positions - back.flatten() * (memory.influence > 0)[..., None]
        return MemoryState(moved, memory.states, memory.influence)  # PyTorch 2.11 does not compile `_replace`

    def check_memory(self, memory: MemoryState | None) -> None:
        if memory is None:
            return
        if self.memory is None:
            raise ValueError("DFNLanguageModel: memory must be None with memory_size=0")
        if not isinstance(memory, MemoryState):
            raise TypeError(f"DFNLanguageModel: memory must be a MemoryState, got {type(memory).__name__}")
        want, got = (self.memory.pos_dim, self.memory.dim), tuple(x.shape[-1] for x in memory[:2])
        if got != want:
            sizes = "memory must hold positions and states of {} and {} dimensions, got {} and {}"
            raise ValueError("DFNLanguageModel: " + sizes.format(*want, *got))

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        generator: torch.Generator | None = None, memory: MemoryState | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Continues ``ids [B, N]`` by ``max_new_tokens``: ``[B, N + max_new_tokens]``, the tokens of `stream`.

        ``progress`` shows a bar.
        """
        tokens = self.stream(
            ids, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator, memory=memory
        )
        tokens = list(shown(tokens, "generating", "tokens", progress, max_new_tokens))
        return torch.cat([ids, *(token[:, None] for token in tokens)], 1)

    @torch.no_grad()
    def stream(
        self, ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        generator: torch.Generator | None = None, memory: MemoryState | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The tokens that continue ``ids [B, N]``, each as soon as it is drawn: ``[B]``, ``max_new_tokens`` times.

        Tokens are drawn from ``softmax(logits / temperature)``, restricted to the ``top_k`` likeliest if given;
        temperature 0 takes the likeliest. The prompt costs one pass, every token one entity's arithmetic (`Decoder`).
        Prompt and continuation are one segment: ``memory`` is read, and written by nobody.
        """
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"generate: ids must have shape [B, N] with N > 0, got {list(ids.shape)}")
        if not temperature >= 0:
            raise ValueError(f"generate: temperature must not be negative, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
        decoder = Decoder(self, memory=memory, capacity=ids.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            token = sample(wide(decoder(ids)), temperature, top_k, generator).to(ids.dtype)
            yield token
            ids = token[:, None]


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of ``logits [B, V]``: int64 ``[B]``. Of equal logits the lower token is the likelier one.

    Any temperature from 0, the likeliest token, to infinity, where all that have a chance have the same.
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        logits, ids = logits[:, :top_k], ids[:, :top_k]
    logits = logits.double()
    below = logits.amax(-1, keepdim=True) - logits  # a quotient of 0 stays 0, whatever the temperature
    scaled = (-below / temperature).masked_fill(logits == -torch.inf, -torch.inf)
    chosen = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


ABLATIONS = {
    "flow": dict(block_options=dict(flow=False)),
    "memory": dict(memory_size=0),
    "flow_norm": dict(block_options=dict(flow_norm=False)),
    "receiver_drift": dict(block_options=dict(receiver_drift=False)),
    "heads": dict(heads=1),
    "convolution": dict(block_options=dict(convolution=0)),
}


def ablated(config: dict, without: str) -> dict:
    """The arguments of a `DFNLanguageModel` that lacks one of its parts, a key of ``ABLATIONS``; "heads" leaves one.

    >>> ablated(dict(dim=64, memory_size=8), "flow")
    {'dim': 64, 'memory_size': 8, 'block_options': {'flow': False}}
    >>> DFNLanguageModel(**ablated(dict(dim=64), "heads")).config["heads"]
    1
    """
    if without not in ABLATIONS:
        raise ValueError(f"ablated: without must be one of {', '.join(ABLATIONS)}, got {without!r}")
    change = ABLATIONS[without]
    if "block_options" in change:
        change = dict(block_options={**(config.get("block_options") or {}), **change["block_options"]})
    return {**config, **change}
