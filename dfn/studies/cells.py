"""What studies are made of: cells, each a model trained in its folder, kept in one study.json as they come.

A study that was stopped goes on with the same command: cells that are there are not trained again, the one that was
under way goes on from its last checkpoint.
"""

import argparse
import contextlib
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..models.layers import count_parameters
from ..runs import run as runs
from ..runs.options import Options, UsageError
from ..runs.tasks import Task
from ..training.checkpoints import locked, write_whole
from ..training.trainer import NonFiniteLoss

EVERY = 200  # steps between checkpoints within a cell


def said(text: str) -> None:
    print(text, flush=True)  # of a study that runs for hours, often into a file


class Study:
    """``study.json`` in its folder: what was asked, of which data, where it ran, and a dictionary per cell.

    Raises UsageError where the folder holds a study with other options or data.
    """

    def __init__(self, name: str, folder: Path, options: dict, data: dict | None = None, *, names: str = "",
                 evaluations: int = 8, progress: bool = True, say: Callable[[str], object] = said):  # fmt: skip
        self.folder, self.path, self.progress, self.say = folder, folder / "study.json", progress, say
        self.names = names  # of what a cell's key is made of, as it is
        self.evaluations = evaluations
        asked = {"study": name, "options": options, "data": data or {}}
        self.found = load(folder) if self.path.exists() else {**asked, "environments": [], "cells": {}}
        for part, value in asked.items():
            if switched_on(self.found[part]) != switched_on(json.loads(json.dumps(value))):
                raise UsageError(f"{folder} holds a study with other {part}; another --out begins a new one")
        here = environment()
        if here not in self.found["environments"]:
            self.found["environments"].append(here)
        self.here = self.found["environments"].index(here)

    @property
    def cells(self) -> dict[str, dict]:
        return self.found["cells"]

    def cell(self, key: str, compute: Callable[[Path], dict]) -> dict:
        """The cell of this key; ``compute(folder)`` makes it if it is not there. One that blows up says so."""
        if key not in self.cells:
            folder = self.folder / "cells" / key.replace("/", "_")
            self.say(f"{len(self.cells) + 1}. {in_words(key, self.names)} ..")
            try:
                result = compute(folder)
            except NonFiniteLoss as error:
                result = {"failed": str(error).split(";")[0]}
            self.cells[key] = {**result, "environment": self.here}
            self.write()
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another cell was stopped in it
                folder.parent.rmdir()
            shown = result.get("failed") or f"{result['value']:.4f}"
            self.say(f"   {in_words(key, self.names)}: {shown}")
        return self.cells[key]

    def trained(self, make_task: Callable[[Options], Task], options: Options, folder: Path) -> tuple[runs.Run, dict]:
        """Trains a task, or goes on, and says what happened; ``value`` is that of the last evaluation."""
        run = runs.train(
            options, folder, resume=True, evaluations=self.evaluations, every=EVERY, progress=self.progress,
            say=lambda text: None, make_task=make_task,
        )  # fmt: skip
        row, h = options.batch * options.length, run.history
        curve = [dict(step=n, bytes=n * row, seconds=round(s, 2), value=x) for n, s, x in h.evaluated]
        last = h.losses[-20:]
        return run, dict(
            parameters=count_parameters(run.model), curve=curve, value=curve[-1]["value"] if curve else None,
            seconds=round(h.seconds[-1], 2), training_loss=sum(last) / len(last),
        )  # fmt: skip

    def best_rate(self, rates: list[float], seed: int, compute: Callable[[float, int], dict], *, most: bool) -> float:
        """The learning rate whose cell of this seed ends best, which is the ``most`` or the least value."""
        ends = {rate: compute(rate, seed).get("value") for rate in rates}
        ends = {rate: value for rate, value in ends.items() if value is not None}
        if not ends:
            return rates[0]
        return (max if most else min)(ends, key=ends.get)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, (json.dumps(self.found, indent=1) + "\n").encode())

    @contextlib.contextmanager
    def reported(self, table: Callable[[dict], str]) -> Iterator[None]:
        """Within it cells are made; at its end, or where it is stopped, what there is becomes a table."""
        try:
            with locked(self.folder):
                yield
        except KeyboardInterrupt:
            self._report(table)
            said = f"stopped; {self.folder} keeps {len(self.cells)} cells, and the same command goes on"
            raise KeyboardInterrupt(said) from None
        self._report(table)

    def _report(self, table: Callable[[dict], str]) -> None:
        if not self.cells:
            return
        text = table(self.found)
        write_whole(self.folder / "study.md", text.encode())
        self.say(text)


def switched_on(part: object) -> object:
    """Options without those that are off: a study of before an option came was made with it off."""
    return {name: value for name, value in part.items() if value} if isinstance(part, dict) else part


def in_words(key: str, names: str) -> str:
    """A key as one says it; as it is, where its parts have no names.

    >>> in_words("dfn/2/0.003", "model/layers/learning rate")
    'dfn, layers 2, learning rate 0.003'
    """
    if not names:
        return key
    (_, first), *others = zip(names.split("/"), key.split("/"), strict=True)
    return ", ".join([first, *(f"{name} {value}" for name, value in others)])


def load(folder: Path) -> dict:
    return json.loads((Path(folder) / "study.json").read_text(encoding="utf-8"))


def environment() -> dict:
    """Where a cell ran: what a person needs to run it again."""
    import dfn_kernels

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    ).stdout.strip() if shutil.which("git") else ""  # fmt: skip
    found = dict(
        machine=runs.machine(), threads=torch.get_num_threads(), system=platform.system(),
        python=platform.python_version(), torch=torch.__version__, dfn=getattr(dfn_kernels, "__version__", ""),
        commit=commit, date=datetime.date.today().isoformat(),
    )  # fmt: skip
    if torch.cuda.is_available():  # the kernels are compiled by the Triton that came with PyTorch
        found |= dict(
            cuda=torch.version.cuda or torch.version.hip, triton=getattr(sys.modules.get("triton"), "__version__", "")
        )
    return found


# ---- flags ----------------------------------------------------------------------------------------------------------
def add_flags(parser: argparse.ArgumentParser, name: str, **defaults: object) -> None:
    """Flags that studies share, ``--out``, ``--seeds``, ``--quiet``, and one for each of `Options` in ``defaults``."""
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder; a study in it goes on")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of everything")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    for option, default in {**defaults, "threads": 0, "dtype": "float32"}.items():
        meta = Options.__dataclass_fields__[option].metadata
        of = str if default is None else type(default)
        parser.add_argument(f"--{option.replace('_', '-')}", type=of, default=default, help=meta["help"],
                            choices=[c for c in meta["choices"] if c] or None)  # fmt: skip


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def asked(arguments: argparse.Namespace, *beside: str) -> dict:
    """What decides how a study ends. How many seeds and what is tried may grow, so they do not count."""
    left_out = {"out", "seeds", "quiet", "threads", "config", "command", "study", *beside}
    return {name: value for name, value in vars(arguments).items() if name not in left_out}


def options_of(arguments: argparse.Namespace, **given) -> Options:
    """`Options` of a cell: those of its names among the arguments, and what is given."""
    names = set(Options.__dataclass_fields__) & set(vars(arguments)) - {"threads", "data"}
    known = {name: getattr(arguments, name) for name in names}
    return Options.of("text", **{**known, "threads": torch.get_num_threads(), **given})


def use_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def main(name: str) -> int:
    """``python -m dfn.studies.NAME``: the command ``dfn study NAME``."""
    return subprocess.call([sys.executable, "-m", "dfn", "study", name, *sys.argv[1:]])


# ---- tables ---------------------------------------------------------------------------------------------------------
def best_cells(found: dict, *, most: bool) -> dict[tuple[str, ...], tuple[str, list[dict]]]:
    """By all of a cell's key but rate and seed: the learning rate that ended best on the first seed, and its cells."""
    groups: dict[tuple[str, ...], dict[str, dict[str, dict]]] = {}
    for key, cell in found["cells"].items():
        *place, rate, seed = key.split("/")
        if cell.get("value") is not None:
            groups.setdefault(tuple(place), {}).setdefault(rate, {})[seed] = cell
    first, best = str(found["options"]["seed"]), {}
    for place, rates in groups.items():
        tried = {rate: seeds[first]["value"] for rate, seeds in rates.items() if first in seeds}
        if tried:
            rate = (max if most else min)(tried, key=tried.get)
            best[place] = rate, list(rates[rate].values())
    return best


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def where(found: dict) -> str:
    """One line for each place where the cells ran."""
    lines = [f"{e['machine']}, torch {e['torch']}, commit {e['commit'] or 'unknown'}, {e['date']}"
             for e in found["environments"]]  # fmt: skip
    return "Ran on: " + "; ".join(lines) + "."
