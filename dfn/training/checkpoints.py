"""Checkpoints: one safetensors file holds all that a run needs to go on; written whole, or not at all.

A file ``step-00000200.safetensors`` holds tensors by name and, in its metadata, facts as JSON and a checksum of both,
which is checked when the file is read.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 1  # of what a checkpoint holds


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


class UnknownVersion(CheckpointError):
    """One that another version of this package has written."""


class Busy(RuntimeError):
    """A folder in which another run writes."""


class Checkpoint(NamedTuple):
    path: Path
    tensors: dict[str, Tensor]
    facts: dict

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors called ``name.*``, without that prefix."""
        return {key.removeprefix(name + "."): x for key, x in self.tensors.items() if key.startswith(name + ".")}


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict, keep: int = 2) -> Path:
    """Writes the checkpoint of ``step`` and, once that is safe on the disk, removes all but the last ``keep``."""
    path = write(folder / f"step-{step:08d}.safetensors", tensors, facts)
    for old in found(folder)[:-keep]:
        old.unlink()
    return path


def write(path: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
    from safetensors.torch import save as serialize

    # Copies: the format refuses tensors that share their memory, as tied weights do.
    tensors = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    text = json.dumps({"version": VERSION, **facts})
    write_whole(path, serialize(tensors, {"facts": text, "sha256": _checksum(tensors, text)}))
    return path


def load(path: Path) -> Checkpoint:
    """Reads and checks a checkpoint. Raises CheckpointError for a file that is truncated or damaged in any byte."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        raw = path.read_bytes()
        tensors = parse(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        text, checksum = header["facts"], header["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of dfn: {error}") from error
    if _checksum(tensors, text) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit its contents")
    facts = json.loads(text)
    if (version := facts.pop("version", VERSION)) != VERSION:
        raise UnknownVersion(f"{path} is of version {version}; this package reads version {VERSION}")
    return Checkpoint(path, tensors, facts)


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder by rising step, good or not."""
    return sorted(folder.glob("step-*.safetensors"))


def latest(folder: Path, say: Callable[[str], object] = print) -> Checkpoint | None:
    """The last good checkpoint, or None where there are none at all; ``say`` is told of each one that is not good.

    Raises CheckpointError where there are checkpoints and none is good.
    """
    paths = found(folder)[::-1]
    for path in paths:
        try:
            checkpoint = load(path)
        except UnknownVersion:  # others are no better
            raise
        except CheckpointError as error:
            say(str(error))
            continue
        if path != paths[0]:
            say(f"the last good checkpoint is {path}")
        return checkpoint
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} is good")
    return None


def set_aside(folder: Path, after: Path) -> None:
    """Renames what comes after the last good checkpoint, so that it does not count as one of those to keep."""
    for path in found(folder):
        if path > after:
            path.rename(path.with_name(path.name + ".damaged"))


def write_whole(path: Path, raw: bytes) -> None:
    """Writes a file so that, whenever the process or the machine dies, the old one or the new one is there, whole.

    Raises OSError, which names the file; what was written of it is removed.
    """
    part = path.with_name(".part" + path.suffix)  # while one process writes a checkpoint, another may write figures
    try:
        with open(part, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps it for this run. Raises Busy where another run has it, OSError if it cannot be written.

    The lock is the folder's own and ends with the process, however that ends; no file is left. Where the system has no
    such locks, as on some network file systems, there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # a run is not to find out after its first hundred steps
        pass
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another run writes in {folder}; another --out begins a new one") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        total.update(x.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
