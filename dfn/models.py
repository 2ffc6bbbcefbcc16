"""Models of Dynamic Flow Networks."""

import torch
from torch import Tensor, nn

from .decoding import Decoder
from .layers import DFNBlock, EntityPositions


class DFNLanguageModel(nn.Module):
    """A causal language model: every token is an entity, which drifts through ``layers`` blocks.

    ``x = E[ids]``, positions from `EntityPositions`, then `DFNBlock` after `DFNBlock`, each moving the entities on
    from where the one before left them, and ``logits = W LayerNorm(x) + b``. There is no limit on the length: time is
    a coordinate.

    Args:
        vocab_size: V; 256 for bytes. dim: d. layers, heads: H. pos_dim: D. k: neighbours per head.
        memory_size: entities of a `PersistentFieldMemory`; only 0 is implemented.

    Call: ``(ids int64 [B, N], memory=None)`` gives ``(logits [B, N, V], memory)``. ``logits[:, i]`` depend on
    ``ids[:, :i + 1]`` alone: later ids do not change a bit of them.
    """

    def __init__(self, vocab_size: int = 256, dim: int = 128, layers: int = 3, heads: int = 4, pos_dim: int = 3,
                 k: int = 16, *, memory_size: int = 0):  # fmt: skip
        super().__init__()
        if memory_size != 0:
            message = f"memory is not implemented yet; memory_size must be 0, got {memory_size}"
            raise NotImplementedError(f"DFNLanguageModel: {message}")
        self.config = dict(vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, pos_dim=pos_dim, k=k)
        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = EntityPositions(dim, heads, pos_dim)
        self.blocks = nn.ModuleList(DFNBlock(dim, heads, pos_dim, k, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, ids: Tensor, memory=None) -> tuple[Tensor, None]:
        if memory is not None:
            raise NotImplementedError("DFNLanguageModel: memory is not implemented yet, pass memory=None")
        states = self.embed(ids)
        positions = self.positions(states)
        for block in self.blocks:
            states, positions = block(states, positions)
        return self.head(self.norm(states)), memory

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Continues ``ids [B, N]`` by ``max_new_tokens``: ``[B, N + max_new_tokens]``.

        Tokens are drawn from ``softmax(logits / temperature)``, restricted to the ``top_k`` likeliest if given;
        temperature 0 takes the likeliest. The prompt costs one pass, every token one entity's arithmetic (`Decoder`).
        """
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"generate: ids must have shape [B, N] with N > 0, got {list(ids.shape)}")
        if not temperature >= 0:
            raise ValueError(f"generate: temperature must not be negative, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
        decoder, new = Decoder(self), ids
        for _ in range(max_new_tokens):
            new = sample(decoder(new).float(), temperature, top_k, generator)[:, None]
            ids = torch.cat([ids, new], 1)
        return ids


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of ``logits [B, V]``: int64 ``[B]``."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
