"""Which files of a folder are data, which of them are held out, and what a picture or a sound file holds."""

import re
import wave
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = re.compile(r"(val|valid|validation|dev|test)([-_]?\d.*)?", re.IGNORECASE)
ENDLESS = 2**31 - 2**16  # a WAV file that was written into a pipe says that it holds so many bytes, or more


def files_in(path: str | Path, endings: Sequence[str] = (), what: str = "files") -> dict[str, Path]:
    """The files of a folder by their path below it, in order, or the one file by its name; hidden ones do not count.

    Raises ValueError where there are none with one of the ``endings`` (in small letters), or ``path`` is neither.
    """
    root = Path(path)
    if root.is_dir():
        below = ((file.relative_to(root), file) for file in sorted(root.rglob("*")))
        found = {p.as_posix(): f for p, f in below if not any(part[0] == "." for part in p.parts) and f.is_file()}
    elif root.is_file():
        found = {root.name: root}
    elif root.exists():
        raise ValueError(f"{path} is neither a file nor a folder; what comes from a pipe can be read only once")
    else:
        raise ValueError(f"no such file or folder: {path}")
    found = {name: file for name, file in found.items() if not endings or file.suffix.lower() in endings}
    if not found:
        raise ValueError(f"no {what} in {path}" + (f"; looked for {', '.join(endings)}" if endings else ""))
    return found


def named_held_out(names: Iterable[str]) -> set[str]:
    """Those that are held out by their name: val, valid, validation, dev or test, all others train.

    That is what the first folder is called, or a part of the file's name: ``val/a.png``, ``wiki.test.txt``,
    ``test-00001.txt``. Empty if nothing would be left to train on.
    """
    names = set(names)
    found = set()
    for name in names:
        *folders, file = name.split("/")
        if any(HELD_OUT.fullmatch(word) for word in (*folders[:1], *file.split("."))):
            found.add(name)
    return found if found != names else set()


def checksum(name: str) -> int:
    """The same for a name everywhere, also for one that is not UTF-8."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


def read_picture(path: str | Path) -> Tensor:
    """``[H, W, 1 or 3]`` in [0, 1], transparency left out. Raises ValueError for what has no white that is known."""
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # of what a decoder makes of broken bytes, every kind has been seen
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no such file, no permission: says so itself
        raise ValueError(f"{path} is no picture that can be read: {_line(error)}") from error
    white = 255
    if image.mode.startswith("I;16"):
        white = 65535
    elif image.mode == "I":
        if image.format not in ("PNG", "PPM"):  # there some versions of Pillow widen 16 bits
            raise ValueError(
                f"{path} holds 32-bit integers, whose white is not known; save 16 bits, or floats in [0, 1]"
            )
        white = 65535
    elif image.mode == "F":
        white = 1
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("LA", "La"):
        image = image.convert("LA").getchannel(0)
    elif image.mode not in ("L", "RGB"):
        try:
            image = image.convert("RGBA" if image.mode in ("PA", "RGBa") else "RGB").convert("RGB")
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: its pixels are of mode {image.mode}") from error
    values = torch.from_numpy(numpy.array(image, dtype=numpy.float32))
    if white == 1 and not (values.numel() and 0 <= float(values.min()) <= float(values.max()) <= 1):
        raise ValueError(f"{path} holds floats that must be in [0, 1], got {values.min():g} to {values.max():g}")
    return (values if values.ndim == 3 else values[..., None]) / white


def read_sound(path: str | Path) -> tuple[Tensor, float]:
    """``[T, channels]`` in [-1, 1] and the rate of a WAV file of PCM samples, 8, 16, 24 or 32 bits."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames, raw = file.getnframes(), file.readframes(file.getnframes())
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} must be a WAV file of PCM samples: {_line(error)}") from error
    if not 1 <= width <= 4:
        raise ValueError(f"{path} must hold samples of 8, 16, 24 or 32 bits, got {8 * width}")
    got = len(raw) // (width * channels)
    if got == 0:
        raise ValueError(f"{path} holds no sound")
    if got < frames and frames * width * channels < ENDLESS:
        raise ValueError(f"{path} is cut off: it holds {got} of {frames} samples")
    parts = torch.frombuffer(bytearray(raw[: got * width * channels]), dtype=torch.uint8).view(-1, width).double()
    if width == 1:  # unsigned, unlike the others
        level = (parts[:, 0] - 128) / 128
    else:
        value = (parts * 256.0 ** torch.arange(width)).sum(1)
        level = (value - 256.0**width * (value >= 256.0**width / 2)) / (256.0**width / 2)
    return level.float().view(-1, channels), rate


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
