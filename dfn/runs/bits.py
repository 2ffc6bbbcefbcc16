"""What a language model is judged by: bits per byte on held-out text, beside compressors that know nothing."""

import re

import torch
from torch import Tensor

from ..models.language import DFNLanguageModel
from ..training.progress import shown
from ..training.text import Corpus, bigram_bits_per_byte, bits, compressed_bits_per_byte, segments

CONTEXT, STRIDE = 256, 128
JUDGED = 2**19  # of the held-out bytes; a minute for the default model


def judged(held_out: Tensor, most: int = JUDGED, stretches: int = 16) -> Tensor:
    """The held-out bytes; of more than ``most`` so many, in equal stretches from the first to the last."""
    if len(held_out) <= most:
        return held_out
    n = most // stretches
    starts = torch.linspace(0, len(held_out) - n, stretches, dtype=torch.float64).long().tolist()
    return torch.cat([held_out[start : start + n] for start in starts])


@torch.no_grad()
def held_out_bits(
    model: DFNLanguageModel, held_out: Tensor, autocast: torch.dtype | None = None, progress: bool = False
) -> float:
    """Bits per byte. Every byte is predicted once from those before it; the first one of all counts as 8 bits."""
    nats, group = 0.0, []
    device = next(model.parameters()).device
    windows = list(segments(held_out, min(CONTEXT, len(held_out) - 1), min(STRIDE, len(held_out) - 1)))
    for n, window in enumerate(shown(windows, "judging", "windows", progress)):
        group.append(window)
        if len(group) < 16 and n + 1 < len(windows):
            continue
        ids, targets = (torch.stack([w[i] for w in group]).to(device) for i in (0, 1))
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(ids)[0].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        for row, (_, _, first) in zip(losses.view(len(group), -1), group, strict=True):
            nats += row[first:].double().sum().item()
        group = []
    return (bits(nats) + 8) / len(held_out)


@torch.no_grad()
def streamed_bits(
    model: DFNLanguageModel, held_out: Tensor, length: int, streams: int = 16, progress: bool = False
) -> float:
    """Bits per byte of ``streams`` equal parts of the text, each read in pieces of ``length``, one after the other.

    A byte is predicted from those before it in its piece and, if the model has one, from the memory of earlier pieces.
    """
    device = next(model.parameters()).device
    n = (len(held_out) - 1) // streams
    parts = torch.stack([held_out[i * n : (i + 1) * n + 1] for i in range(streams)]).long().to(device)
    nats, memory = 0.0, None
    for start in shown(range(0, n, length), "judging", "pieces", progress):
        piece = parts[:, start : start + length + 1]
        logits, memory = model(piece[:, :-1], memory)
        logits, targets = logits.float().flatten(0, 1), piece[:, 1:].flatten()
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum().item()
    return bits(nats) / (streams * n)


def text_baselines(train: Tensor, held_out: Tensor, progress: bool = False) -> dict[str, float]:
    """Bits per byte of general compressors on the held-out bytes, and of a byte bigram of the training bytes."""
    bigram = bigram_bits_per_byte(train, held_out)
    return {**compressed_bits_per_byte(held_out, progress), "bigram": bigram}


def table_of_bits(figures: dict[str, float]) -> list[str]:
    names = {"model": "this model", "gzip": "gzip -9", "bzip2": "bzip2 -9", "xz": "xz -9", "bigram": "byte bigram"}
    return [f"{names[name]:12s} {value:6.3f}" for name, value in sorted(figures.items(), key=lambda item: item[1])]


def continue_prompt(model: DFNLanguageModel, corpus: Corpus, seed: int, length: int = 320) -> tuple[str, str]:
    """A stretch of held-out text from the start of a function or line, and ``length`` bytes that the model adds.

    It ends with a word: after a line break a model that has learned little may go on with nothing but blanks.
    """
    held_out = bytes(corpus.held_out.tolist())
    start = max(held_out.find(b"\n    def ", len(held_out) // 3), held_out.rfind(b"\n", 0, len(held_out) // 3)) + 1
    near = held_out[start : start + 240]
    end = start + max((word.end() for word in re.finditer(rb"\w+", near)), default=len(near))
    ids = corpus.held_out[start:end].long()[None]
    new = model.generate(ids, length, temperature=0.6, generator=torch.Generator().manual_seed(seed))
    text = bytes(new[0].tolist())
    return text[: end - start].decode("utf-8", "replace"), text[end - start :].decode("utf-8", "replace")
