"""Batches: tensors with one row per example, or tuples, named tuples and dicts of them; and what draws them."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def generator_for(what: str, seed: int) -> torch.Generator:
    """A generator whose numbers are others for every purpose: what is judged on was not trained on.

    Another seed alone does not see to that: seeds of a CPU generator count modulo 2^32, and a run may have any.
    """
    name = hashlib.sha256(f"{what} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(name[:4], "little"))


def map_tensors(function: Callable[[Tensor], Tensor], batch):
    """The same tuples, named tuples and dicts with ``function`` of every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, x) for key, x in batch.items()}
    parts = [map_tensors(function, x) for x in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def tensors_of(batch) -> list[Tensor]:
    """The tensors, in the order of `map_tensors`."""
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x), batch)
    return found


def rows(batch, part: int, parts: int):
    """Part number ``part`` of ``parts`` equal ones of every tensor's rows."""

    if parts == 1:
        return batch

    def cut(x: Tensor) -> Tensor:
        if len(x) % parts:
            raise ValueError(f"Trainer: the batch must be a multiple of {parts} (processes x accumulate), got {len(x)}")
        return x.tensor_split(parts)[part]

    return map_tensors(cut, batch)


def tokens_in(batch) -> int:
    """How many tokens or entities a model reads in a batch: those of its first part."""
    if isinstance(batch, Tensor):
        return batch.numel()
    if isinstance(batch, dict):
        return sum(tokens_in(x) for x in batch.values())
    return batch.influence.numel() if hasattr(batch, "influence") else tokens_in(batch[0])
