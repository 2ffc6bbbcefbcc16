"""A bar for whatever takes longer than a second."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], what: str, on: bool = True, total: int | None = None) -> Iterable[T] | Iterator[T]:
    """The items; with ``on``, after a second, a bar on the standard error says how many are done."""
    if not on:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    interval = 0.25 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    return tqdm(items, desc=what, total=total, delay=1.0, leave=False, dynamic_ncols=True, mininterval=interval)
