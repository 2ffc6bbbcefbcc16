"""Bars: of training, and of whatever else takes longer than a second."""

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from .memory import peak_memory

T = TypeVar("T")


class Quiet:
    """What a bar of tqdm is used like where there is none."""

    def __init__(self, items: Iterable[Any] = ()):
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_: object) -> None: ...

    def nothing(self, *_: object, **__: object) -> None: ...

    update = set_description = set_postfix = set_postfix_str = nothing


def progress_bar(items: Iterable[Any] | None = None, on: bool = True, **options: Any) -> Any:
    """A bar of tqdm that goes away when it is done; a `Quiet` one if it is not wanted, or tqdm not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        on = False
    return tqdm(items, leave=False, **options) if on else Quiet(() if items is None else items)


def shown(items: Iterable[T], what: str, unit: str, on: bool = True, total: int | None = None) -> Iterable[T]:
    """The items; with ``on``, after a second, a bar on the standard error says how many are done, and of what.

    ``unit`` is their name in the plural, ``total`` their number where it cannot be asked of the items.
    """
    return progress_bar(
        items, on, desc=what, unit=f" {unit}", total=total, delay=1.0, dynamic_ncols=True, mininterval=_interval()
    )


def _interval() -> float:
    return 0.25 if sys.stderr.isatty() else 10.0  # a log file wants few lines


class TrainingBar:
    """A bar over the steps or seconds of a `Trainer`: the loss, smoothed, its speed, the most memory so far."""

    def __init__(self, trainer: Any):
        from tqdm import tqdm

        self.trainer, self.loss, self.weight, self.held_out = trainer, 0.0, 0.0, None
        self.scale = 1 / math.log(2) if trainer.unit == "bits" else 1.0
        in_words = {"bits": f"bits per {trainer.counted.removesuffix('s')}", "error": "squared error"}
        self.unit = in_words.get(trainer.unit, trainer.unit)
        form = "{desc} {percentage:3.0f}%|{bar:24}|{postfix}"
        self.bar = tqdm(total=1000, desc="training", mininterval=_interval(), dynamic_ncols=True, bar_format=form)

    def update(self, value: float, rate: float) -> None:
        t = self.trainer
        self.loss, self.weight = 0.95 * self.loss + 0.05 * value, 0.95 * self.weight + 0.05
        parts = [
            f"{t.elapsed:.0f} of {t.seconds:.0f} s" if t.seconds else f"{t.elapsed:.0f} s",
            f"step {t.step:,}" + (f" of {t.steps:,}" if t.steps else ""),
            f"loss {self.loss / self.weight * self.scale:.3f} {self.unit}",
            *([f"held out {self.held_out:.3f}"] if self.held_out is not None else []),
            f"{rate:,.0f} {t.counted}/s",
            *([f"at most {most:,.0f} MiB"] if (most := peak_memory(t.device)) else []),
        ]
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update(round(1000 * t.progress) - self.bar.n)

    def judging(self, begins: bool) -> None:
        """Says so while the held-out data is looked at; a log file, which wants few lines, is spared it."""
        self.bar.set_description_str("judging" if begins else "training", refresh=sys.stderr.isatty())

    def close(self) -> None:
        self.bar.close()
