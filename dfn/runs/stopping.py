"""Ctrl-C in training: the step is finished and kept first."""

import signal
import threading
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run that was stopped by Ctrl-C and has a checkpoint of its last step; says so."""


class Interruption:
    """While it is entered, the first Ctrl-C only sets `asked`; a second one interrupts at once.

    Only in the main thread, and only where Ctrl-C would raise KeyboardInterrupt; elsewhere nothing changes.
    """

    def __init__(self, enabled: bool = True):
        self.asked, self.enabled = False, enabled

    def __enter__(self) -> "Interruption":
        main = threading.current_thread() is threading.main_thread()
        self.enabled = self.enabled and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.enabled:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
