"""The text that studies train on, split by what files hold, so that the split is the same wherever they lie."""

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fields.files import files_in
from ..runs.options import Options
from ..runs.tasks import Text
from ..training.text import NOT_LIBRARY, bigram_bits_per_byte, bits, compressed_bits_per_byte

HELD_OUT = 20  # one file in so many is held out
TEMPERATURES = [n / 20 for n in range(16, 41)]  # 0.8 to 2


class Split(NamedTuple):
    """Bytes to train on and bytes held out, uint8 ``[n]``, each in the order of their files' hashes."""

    name: str
    train: Tensor
    held_out: Tensor
    files: int
    held_out_files: int

    def facts(self, judged: Tensor) -> dict:
        """``judged``: bytes, or `windows`, each of which ends with a byte that is only predicted."""
        evenly = dict(judged_windows=len(judged)) if judged.ndim == 2 else {}
        return dict(
            name=self.name, files=self.files, held_out_files=self.held_out_files, train_bytes=len(self.train),
            held_out_bytes=len(self.held_out), judged_bytes=judged[:, 1:].numel() if evenly else len(judged),
            train_sha256=sha256(self.train), judged_sha256=sha256(judged), **evenly,
        )  # fmt: skip


def sha256(data: Tensor) -> str:
    return hashlib.sha256(data.contiguous().numpy()).hexdigest()


def windows(data: Tensor, length: int, most: int | None = None) -> Tensor:
    """The windows of ``length`` bytes that follow one another, each with the byte behind it: ``[n, length + 1]``.

    Of more than ``most`` so many, at even distances from the first to the last: files differ more than what stands in
    one, so that a few of everything says more than all of a few. What is left over at the end does not count.
    """
    if len(data) <= length:
        raise ValueError(f"windows: data must have more than length = {length} bytes, got {len(data)}")
    all_of_them = data.unfold(0, length + 1, length)
    if most is None or len(all_of_them) <= most:
        return all_of_them
    return all_of_them[torch.linspace(0, len(all_of_them) - 1, most, dtype=torch.float64).long()]


def split_by_content(path: str | Path | None = None) -> Split:
    """Whole files, one in twenty held out by the SHA-256 of their bytes; identical files count once.

    Names, folders and order play no part: a renamed file stays on its side, and two machines that share a file agree
    on it. Without ``path`` the files are the Python sources of this machine, the standard library and what is
    installed beside it. Of a single file the last tenth is held out. Files with zero bytes are left out.

    Raises ValueError where there are fewer than 100 bytes a side.
    """
    if path is None:
        folders = sysconfig.get_paths()
        library = Path(folders["stdlib"])
        files = [f for f in library.rglob("*.py") if not NOT_LIBRARY & set(f.relative_to(library).parts)]
        files += Path(folders["purelib"]).rglob("*.py")
        name = f"the sources of Python {sysconfig.get_python_version()} and of the packages installed with it"
    else:
        files, name = list(files_in(path).values()), Path(path).name
    texts = {hashlib.sha256(data).hexdigest(): data for f in files if (data := f.read_bytes()) and b"\0" not in data}
    keys = sorted(texts)
    held = [key for key in keys if int(key, 16) % HELD_OUT == 0] or keys[:1]
    if len(texts) == 1:
        ((key, data),) = texts.items()
        cut = len(data) - len(data) // 10
        train, held_out = data[:cut], data[cut:]
    else:
        held_out = b"".join(texts[key] for key in held)
        train = b"".join(texts[key] for key in keys if key not in set(held))
    if min(len(train), len(held_out)) < 100:
        raise ValueError(f"too little text in {name}: {len(train)} bytes to train on, {len(held_out)} held out")
    return Split(name, as_bytes(train), as_bytes(held_out), len(texts) - len(held), len(held))


def as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class SplitText(Text):
    """Text of a given split and a given model; ``judge(model)`` says its bits per byte."""

    def __init__(self, options: Options, build: Callable[[], nn.Module], split: Split,
                 judge: Callable[[nn.Module], float]):  # fmt: skip
        super().__init__(options)
        self.build, self.corpus, self.judge = build, split, judge

    def model(self) -> nn.Module:
        return self.build()

    def held_out_loss(self, model: nn.Module, batches: int = 0) -> float:
        """In nats."""
        return self.judge(model) / bits(1.0)

    def summary(self) -> str:
        return self.corpus.name


def beside(split: Split) -> dict[str, float]:
    """Bits per byte of all that is held out: compressors on it alone, and byte pairs counted on the training bytes."""
    return {**compressed_bits_per_byte(split.held_out), "bigram": bigram_bits_per_byte(split.train, split.held_out)}


@torch.no_grad()
def bits_by_place(model: nn.Module, windows: Tensor, rows: int = 32) -> Tensor:
    """Bits per byte at each place of ``windows [n, length + 1]``, float64 ``[length]``, mean over the windows.

    Every byte but a window's first is predicted from those before it.
    """
    return bits_at_temperatures(model, windows, (1.0,), rows)[0]


@torch.no_grad()
def bits_at_temperatures(model: nn.Module, windows: Tensor, temperatures: Sequence[float], rows: int = 32) -> Tensor:
    """`bits_by_place` where the logits are divided by each of the temperatures, float64 ``[temperatures, length]``."""
    device = next(model.parameters()).device
    total = torch.zeros(len(temperatures), windows.shape[1] - 1, dtype=torch.float64, device=device)
    for some in windows.split(rows):
        some = some.to(device).long()
        logits, targets = model(some[:, :-1])[0].float().flatten(0, 1), some[:, 1:].flatten()
        for sums, temperature in zip(total, temperatures, strict=True):
            losses = nn.functional.cross_entropy(logits / temperature, targets, reduction="none")
            sums += losses.view(len(some), -1).double().sum(0)
    return (bits(1.0) * total / len(windows)).cpu()


def calibrated(model: nn.Module, windows: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> tuple[float, float]:
    """Bits per byte with the logits divided by what suits other text best, and by what that is.

    Each half of the windows, two or more, is judged at the temperature that is best for the other one. What that saves
    a model loses by being too sure of itself; what remains is what it does not know.

    Source: Guo et al., On calibration of modern neural networks (2017).
    """
    halves = [bits_at_temperatures(model, half, temperatures).mean(1) for half in windows.tensor_split(2)]
    best = [int(half.argmin()) for half in halves]
    value = sum(float(half[other]) for half, other in zip(halves, reversed(best), strict=True)) / 2
    return value, sum(temperatures[n] for n in best) / 2
