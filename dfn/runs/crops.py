"""Pieces of real pictures, sounds and texts, all of one size, at random places: fields to train on without labels."""

import math
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..fields.field import Field, ImageField, SpectrogramField, TextField, WaveField
from ..fields.files import checksum, files_in, named_held_out
from ..fields.sampler import AdaptiveSampler, Entities, Sampler
from ..training.text import load_corpus

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WINDOW, HOP, FREQUENCIES = 62, 32, 32  # of a sound's spectrogram
SOUNDS = ("/usr/share/sounds", "/System/Library/Sounds", "C:/Windows/Media")  # where systems keep WAV files


class Crops:
    """Random crops of ``pieces``, tensors ``[n_1, .., n_a, ..]``, of ``size`` cells along the first a axes.

    Pieces with such a name (`named_held_out`) are held out, else of ten and more one in ten, chosen by a checksum of
    its name. Of fewer the end of ``axis`` is held out of each: a fifth, or one crop if that is more.

    Attributes: names, of the pieces that are large enough.
    """

    def __init__(self, pieces: dict[str, Tensor], size: tuple[int, ...], field: Callable[[Tensor], Field], axis: int):
        self.size, self.make = size, field
        wide = {n: x for n, x in pieces.items() if all(have >= want for have, want in zip(x.shape, size, strict=False))}
        named = named_held_out(wide)
        if named or len(wide) >= 10:
            out = named or {n for n in wide if checksum(n) % 10 == 0} or {min(wide)}
            self.train, self.held_out = [wide[n] for n in wide if n not in out], [wide[n] for n in sorted(out)]
        else:
            wide = {n: x for n, x in wide.items() if x.shape[axis] >= 2 * size[axis]}
            cuts = {n: x.shape[axis] - max(size[axis], x.shape[axis] // 5) for n, x in wide.items()}
            self.train = [x.narrow(axis, 0, cuts[n]) for n, x in wide.items()]
            self.held_out = [x.narrow(axis, cuts[n], x.shape[axis] - cuts[n]) for n, x in wide.items()]
        if not wide:
            least = " x ".join(str(n * (1 + (i == axis))) for i, n in enumerate(size))
            sizes = ", ".join(f"{n}: {list(x.shape)}" for n, x in list(pieces.items())[:3])
            raise ValueError(f"needed is a piece of at least {least} cells, got {sizes or 'none'}")
        self.names = list(wide)

    def field(self, batch: int, generator: torch.Generator | None = None, held_out: bool = False) -> Field:
        """``batch`` crops as one field; every place of every piece is as likely as any other."""
        pieces = self.held_out if held_out else self.train
        places = [[have - want + 1 for have, want in zip(x.shape, self.size, strict=False)] for x in pieces]
        chance = torch.tensor([math.prod(p) for p in places], dtype=torch.float64)
        chosen = torch.multinomial(chance, batch, replacement=True, generator=generator).tolist()
        return self.make(torch.stack([random_crop(pieces[i], self.size, generator) for i in chosen]))

    def fingerprint(self) -> int:
        return zlib.crc32(b"".join(x.contiguous().numpy().tobytes() for x in (*self.train, *self.held_out)))

    def summary(self) -> str:
        few = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"crops of {' x '.join(map(str, self.size))} from {len(self.names)} files ({few})"


def random_crop(x: Tensor, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    for axis, want in enumerate(size):
        start = int(torch.randint(x.shape[axis] - want + 1, (1,), generator=generator))
        x = x.narrow(axis, start, want)
    return x


def load_crops(kind: str, path: str | Path | None, size: int) -> Crops:
    """Crops of ``kind`` "image", "sound" or "text", from a file or folder or from what this machine has.

    Pictures: ``size x size`` in colour; without a path the two photographs of scikit-learn. Sounds: ``size`` steps of
    a spectrogram of 32 frequencies; without a path the WAV files of Python's own tests and of the system. Text: ``4
    size`` bytes; without a path the standard library's sources.

    Raises ValueError where there are none, or none that is large enough.
    """
    if kind == "image":
        if path is None:
            pictures = {name: field.values[0] for name, field in photographs().items()}
        else:
            pictures = {name: picture(p) for name, p in files_in(path, PICTURES, "pictures").items()}
        return Crops(pictures, (size, size), ImageField, axis=1)
    if kind == "sound":
        paths = machine_sounds() if path is None else files_in(path, (".wav",), "WAV files")
        sounds = {name: spectrogram(p) for name, p in paths.items()}
        return Crops(sounds, (size, FREQUENCIES), SpectrogramField, axis=0)
    if kind == "text":
        corpus = load_corpus(path)
        crops = Crops({corpus.name: corpus.train}, (4 * size,), TextField, axis=0)
        crops.train, crops.held_out = [corpus.train], [corpus.held_out]
        if len(corpus.held_out) < 4 * size:
            raise ValueError(f"too little text: {4 * size} bytes a crop, {len(corpus.held_out)} are held out")
        return crops
    raise ValueError(f"field must be image, sound or text, got {kind}")


def photographs() -> dict[str, ImageField]:
    """The two photographs that scikit-learn brings along, 427 x 640 x 3, in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise RuntimeError("photographs: needs scikit-learn, which the extra dfn-kernels[models] installs") from error
    files = {"temple": "china.jpg", "flower": "flower.jpg"}
    return {name: ImageField(torch.tensor(load_sample_image(file)).float()[None] / 255) for name, file in files.items()}


def picture(path: Path) -> Tensor:
    """``[H, W, 3]`` in [0, 1]."""
    values = ImageField.load(path).values[0]
    return values[..., :1].expand(-1, -1, 3) if values.shape[-1] < 3 else values


def spectrogram(path: Path) -> Tensor:
    """``[steps, 32, 1]``; no steps for a sound shorter than a window."""
    sound = WaveField.load(path)
    if sound.grid[0] < WINDOW:
        return torch.zeros(0, FREQUENCIES, 1)
    return SpectrogramField.of(sound, WINDOW, HOP).values[0]


def machine_sounds() -> dict[str, Path]:
    """The WAV files that Python's own tests and the system bring along, those of PCM samples, by their path."""
    roots = [Path(sysconfig.get_paths()["stdlib"]) / "test" / "audiodata", *map(Path, SOUNDS)]
    found = [p for root in roots if root.is_dir() and os.access(root, os.R_OK) for p in sorted(root.rglob("*.wav"))]
    good = {p.as_posix(): p for p in found if _is_pcm(p)}
    if not good:
        raise ValueError("no WAV files on this machine; give a file or folder of them with --data")
    return good


def _is_pcm(path: Path) -> bool:
    try:
        WaveField.load(path)
    except ValueError:
        return False
    return True


def sampler_of(kind: str, patch: int = 3) -> Sampler:
    """Entities where the field changes (text: where windows are rich); states are patches, or one-hot bytes."""
    if kind == "text":
        return AdaptiveSampler("entropy", floor=0.5)
    encode = None if patch == 1 else lambda field, p: field.patch(p, patch)
    return AdaptiveSampler(distinct=True, floor=0.1, encode=encode)


def channels_of(kind: str, patch: int = 3) -> int:
    return {"text": 256, "image": 3 * patch * patch, "sound": patch * patch}[kind]


def mean_error(entities: Iterable[Entities]) -> float:
    """What saying the mean value of all entities would leave, as `field_reconstruction` counts."""
    states = torch.cat([e.states.flatten(0, 1) for e in entities])
    return float((states - states.mean(0)).square().mean())
