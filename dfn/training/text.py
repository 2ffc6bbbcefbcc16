"""Data that every machine has: bytes of real text, split, in batches, and what compressors make of them."""

import bz2
import codecs
import gzip
import lzma
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..fields.files import checksum, files_in, named_held_out
from .progress import shown

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
    left_out: dict[str, str]  # files that are no text, and why
    train_ptr: Tensor  # int64, where each file that is not empty begins, and the end
    held_out_ptr: Tensor

    def summary(self) -> str:
        said = f"{self.name}: {_files(self.train_files)}, {_size(self.train)} to train on; "
        size = _size(self.held_out)
        if self.train_files == self.held_out_files:
            said += f"the last tenth of each, {size}, held out"
        else:
            said += f"{_files(self.held_out_files)}, {size} held out"
            if len(self.held_out_files) < 4:
                said += f" ({', '.join(self.held_out_files)})"
        if self.left_out:
            name, why = next(iter(self.left_out.items()))
            said += f"; {len(self.left_out)} left out ({name} {why})"
        return said


def _size(data: Tensor) -> str:
    n = len(data)
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB" if n >= 1e4 else f"{n:,} bytes"


def _files(names: list[str]) -> str:
    return f"{len(names)} file{'s' if len(names) != 1 else ''}"


def load_corpus(path: str | Path | None = None) -> Corpus:
    """The sources of the Python standard library, or the user's own file or folder of text.

    Files or folders named val, valid, validation, dev or test are held out, all others train (`named_held_out`).
    Without such names whole files are held out, one in twenty, chosen by a checksum of their path below the folder:
    the same ones in every run, and a file that comes or goes moves no other. Where that would hold out more than a
    tenth of the text or less than a hundredth, as of few files, it is the last tenth of every file. Hidden files do
    not count, and files that are UTF-16 or hold zero bytes are left out, which the summary says.

    Raises ValueError where there is no text, or too little of it (100 bytes a side) to train and to judge.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        below = ((f.relative_to(root), f) for f in sorted(root.rglob("*.py")))
        files = {p.as_posix(): f for p, f in below if not NOT_LIBRARY & set(p.parts)}
        name = f"the standard library of Python {sysconfig.get_python_version()}"
    else:
        files, name = files_in(path), str(path)
    texts, left_out = {}, {}
    for file, where in files.items():
        data = where.read_bytes()
        if why := _no_text(data):
            left_out[file] = why
        elif data:
            texts[file] = data
    if not texts:
        raise ValueError(_no_texts(name, files, left_out))
    train, held_out = _split(texts, by_name=path is not None)
    tensors, names = (_tensor(train), _tensor(held_out)), (list(train), list(held_out))
    corpus = Corpus(name, *tensors, *names, left_out, _offsets(train), _offsets(held_out))
    if min(len(corpus.train), len(corpus.held_out)) < 100:
        sizes = f"{len(corpus.train)} bytes to train on, {len(corpus.held_out)} held out; needed are 100 each"
        raise ValueError(f"too little text in {name}: {sizes}")
    return corpus


def _split(texts: dict[str, bytes], by_name: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    names = named_held_out(texts) if by_name else set()
    if not names:
        chosen = {file for file in texts if checksum(file) % HELD_OUT == 0}
        share = sum(len(texts[file]) for file in chosen) / sum(map(len, texts.values()))
        names = chosen if 0.01 <= share <= 0.1 else set()
    if names:
        return tuple({file: text for file, text in texts.items() if (file in names) == held} for held in (False, True))
    cuts = {file: len(text) - len(text) // 10 for file, text in texts.items()}
    return {f: text[: cuts[f]] for f, text in texts.items()}, {f: text[cuts[f] :] for f, text in texts.items()}


def _no_text(data: bytes) -> str | None:
    """Why these bytes are no text, or None."""
    for mark, encoding in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
                           (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):  # fmt: skip
        if data.startswith(mark):
            return f"is {encoding}; to use it as UTF-8: iconv -f {encoding} -t UTF-8"
    place = data.find(0)
    return f"is taken for binary: byte {place} is zero" if place >= 0 else None


def _no_texts(name: str, files: dict[str, Path], left_out: dict[str, str]) -> str:
    if not left_out:
        return f"{name} is empty" if len(files) == 1 else f"all {len(files)} files in {name} are empty"
    file, why = next(iter(left_out.items()))
    return f"{name} {why}" if len(files) == 1 else f"no text in {name}: {file} {why}"


def _tensor(texts: dict[str, bytes]) -> Tensor:
    data = bytearray(b"".join(texts.values()))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _offsets(texts: dict[str, bytes]) -> Tensor:
    return torch.tensor([0, *(len(text) for text in texts.values() if text)]).cumsum(0)


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


def compressed_bits_per_byte(data: Tensor, progress: bool = False) -> dict[str, float]:
    """What general compressors make of the same bytes alone, at their highest settings: bits per byte by name."""
    raw = data.numpy().tobytes()
    compressors = {"gzip": lambda x: gzip.compress(x, 9), "bzip2": lambda x: bz2.compress(x, 9),
                   "xz": lambda x: lzma.compress(x, preset=9)}  # fmt: skip
    return {
        name: 8 * len(compress(raw)) / len(raw)
        for name, compress in shown(compressors.items(), "compressing", "compressors", progress)
    }


def bigram_bits_per_byte(train: Tensor, held_out: Tensor) -> float:
    """A table of byte pairs counted on the training bytes, add-one smoothed, judged on the held-out bytes."""
    counts = _pairs(train).view(256, 256).double() + 1
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    seen = _pairs(held_out).view(256, 256).double()
    return float((seen * bits).sum() / seen.sum())


def _pairs(data: Tensor, part: int = 2**20) -> Tensor:
    """How often each pair of bytes occurs: int64 ``[65536]``, counted in parts, so that memory does not grow."""
    counts = torch.zeros(65536, dtype=torch.int64)
    for start in range(0, len(data) - 1, part):
        piece = data[start : start + part + 1].long()
        counts += torch.bincount(piece[:-1] * 256 + piece[1:], minlength=65536)
    return counts


def bits(nats: float) -> float:
    return nats / math.log(2)
