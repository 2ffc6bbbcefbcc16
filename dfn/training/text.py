"""Data that every machine has: bytes of real text, and associative recall."""

import bz2
import gzip
import lzma
import math
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Folders that some systems ship without the rest of the library, or that hold other people's packages.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
HELD_OUT = 20  # one file in so many is held out


@dataclass
class Corpus:
    """Bytes to train on and bytes held out, ``uint8 [n]``, and where they came from."""

    name: str
    train: Tensor
    held_out: Tensor
    train_files: list[str]
    held_out_files: list[str]
    train_ptr: Tensor  # int64 [files + 1], where each file begins, and the end
    held_out_ptr: Tensor

    def summary(self) -> str:
        files = f"{len(self.train_files)} files, {len(self.train) / 1e6:.1f} MB to train on; "
        return f"{self.name}: {files}{len(self.held_out_files)} files, {len(self.held_out) / 1e6:.2f} MB held out"


def load_corpus(path: str | Path | None = None) -> Corpus:
    """The sources of the Python standard library, or the user's own file or folder of text.

    Whole files are held out, chosen by a checksum of their path below the folder: the same ones in every run, and a
    file that comes or goes moves no other. Of a single file the last tenth is held out. Files that hold zero bytes
    are taken for binary and left out.

    Raises ValueError where there is no text, or too little of it (100 bytes a side) to train and to judge.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not NOT_LIBRARY & set(f.relative_to(root).parts)]
        name = f"the standard library of Python {sysconfig.get_python_version()}"
    else:
        root = Path(path)
        if not root.exists():
            raise ValueError(f"load_corpus: no such file or folder: {path}")
        files = [root] if root.is_file() else [f for f in root.rglob("*") if f.is_file() and f.name[0] != "."]
        name = str(path)
    texts = {}
    for file in sorted(files):
        data = file.read_bytes()
        if data and b"\0" not in data:
            texts[file.name if root.is_file() else file.relative_to(root).as_posix()] = data
    if len(texts) == 1:
        ((file, data),) = texts.items()
        cut = len(data) - len(data) // 10
        train, held_out = {file: data[:cut]}, {file: data[cut:]}
    else:
        held_out = {file: text for file, text in texts.items() if zlib.crc32(file.encode()) % HELD_OUT == 0}
        if not held_out and texts:
            file = min(texts, key=lambda f: zlib.crc32(f.encode()))
            held_out = {file: texts[file]}
        train = {file: text for file, text in texts.items() if file not in held_out}
    corpus = Corpus(
        name, _tensor(train), _tensor(held_out), list(train), list(held_out), _offsets(train), _offsets(held_out)
    )
    if min(len(corpus.train), len(corpus.held_out)) < 100:
        sizes = f"{len(corpus.train)} bytes to train on, {len(corpus.held_out)} held out; needed are 100 each"
        raise ValueError(f"load_corpus: too little text in {name}: {sizes}")
    return corpus


def _tensor(texts: dict[str, bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts.values())) or bytearray(1), dtype=torch.uint8)


def _offsets(texts: dict[str, bytes]) -> Tensor:
    return torch.tensor([0, *(len(text) for text in texts.values())]).cumsum(0)


def batches(
    data: Tensor, batch: int, length: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(ids, targets)``, int64 ``[batch, length]``, from random places; targets are the bytes that follow."""
    for ids, targets, _ in _windows(data, batch, length, generator):
        yield ids, targets


def _windows(data, batch, length, generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if len(data) < length + 1:
        raise ValueError(f"batches: length must be below the {len(data)} bytes of the data, got {length}")
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
        windows = data[starts + offsets].long()
        yield windows[:, :-1], windows[:, 1:], starts


def packed_batches(
    data: Tensor, ptr: Tensor, batch: int, length: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows of `batches`, with what they hold told apart: ``(ids, targets, ptr int64 [batch, S + 1])``.

    ``ptr`` are the offsets of the documents in the data, none of them empty. Those of a row ascend from 0 to length:
    pieces of documents one after another, and empty ones at the end, since S is the same for all rows. Where a document
    ends its next byte is another's: that target is -100, which counts for nobody.
    """
    begins = ptr[1:-1].contiguous()  # of all documents but the first
    most = torch.searchsorted(begins, begins + length - 1) - torch.arange(len(begins))
    slots = torch.arange(int(most.max()) if len(begins) else 0)
    ends = torch.cat([begins, ptr[-1:]])
    for ids, targets, starts in _windows(data, batch, length, generator):
        inside = torch.searchsorted(begins, starts, right=True) + slots  # [batch, S - 1] which documents begin in a row
        places = (ends[inside.clamp(max=len(begins))] - starts).clamp(max=length)
        of_rows = torch.cat([torch.zeros_like(starts), places, torch.full_like(starts, length)], 1)
        following = starts + torch.arange(1, length + 1)  # where a target comes from
        first_of_next = ends[torch.searchsorted(ends, following).clamp(max=len(begins))] == following
        yield ids, targets.masked_fill(first_of_next, -100), of_rows


def segments(data: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """``(ids [length], targets [length], first)``: windows that score every byte but the first exactly once.

    A window's targets count from ``first`` on: what comes before was scored by the window before, and is context
    here. Every byte but those of the first window is seen with at least ``length - stride`` bytes of context.
    """
    if not 0 < stride <= length:
        raise ValueError(f"segments: stride must be between 1 and length {length}, got {stride}")
    done, n = 0, len(data) - 1  # targets scored, targets
    while done < n:
        start = max(0, min(done - (length - stride), n - length))
        end = min(start + length, n)
        yield data[start:end].long(), data[start + 1 : end + 1].long(), done - start
        done = end


def compressed_bits_per_byte(data: Tensor) -> dict[str, float]:
    """What general compressors make of the same bytes alone, at their highest settings: bits per byte by name."""
    raw = data.numpy().tobytes()
    compressors = {"gzip": lambda x: gzip.compress(x, 9), "bzip2": lambda x: bz2.compress(x, 9),
                   "xz": lambda x: lzma.compress(x, preset=9)}  # fmt: skip
    return {name: 8 * len(compress(raw)) / len(raw) for name, compress in compressors.items()}


def bigram_bits_per_byte(train: Tensor, held_out: Tensor) -> float:
    """A table of byte pairs counted on the training bytes, add-one smoothed, judged on the held-out bytes."""
    pairs = train[:-1].long() * 256 + train[1:].long()
    counts = torch.bincount(pairs, minlength=65536).view(256, 256).double() + 1
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    held_out = held_out.long()
    return float(bits[held_out[:-1], held_out[1:]].mean())


def bits(nats: float) -> float:
    return nats / math.log(2)
