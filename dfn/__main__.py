"""``dfn`` and ``python -m dfn``: what must be settled before torch is imported, then the command."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    # Threads that wait for work spin, unless OpenMP is told otherwise before it is loaded: on a busy machine a step
    # then takes many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGINT, _stop)
    from .cli import main as command

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _stop(number: int, frame: FrameType | None) -> None:
    """While modules are imported there is nothing to tidy up, and an exception might be caught by one of them."""
    os.write(2, b"dfn: stopped\n")
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
