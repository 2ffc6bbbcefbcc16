"""What a call starts on the device: PyTorch calls that do work there, and Triton kernels. Where no GPU is, kernels are
counted in Triton's interpreter, C++ kernels as the dispatched calls that they are."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dfn_kernels import _transforms
from dfn_kernels._backends import TRITON_MISSING

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view", "_reshape_alias"}  # whose schemas do not say so


def _is_work(func: torch._ops.OpOverload) -> bool:
    name = func._schema.name.split("::")[1]
    aliases = [x.alias_info for x in func._schema.returns if x.alias_info is not None]
    is_view = any(not alias.is_write for alias in aliases)
    return not (is_view or name in VIEWS or name in ALLOCATIONS)


class _Calls(TorchDispatchMode):
    def __init__(self, started: list[str]):
        super().__init__()
        self.started = started

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _is_work(func):
            self.started.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _kernels(started: list[str]) -> Iterator[None]:
    if TRITON_MISSING:
        yield
        return
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    interpret, run = GridExecutor.__call__, JITFunction.run

    def interpreted(self, *args, **kwargs):
        started.append(f"kernel {self.fn.__name__}")
        with _disable_current_modes():  # the interpreter's own copies are not the launcher's
            return interpret(self, *args, **kwargs)

    def compiled(self, *args, **kwargs):
        started.append(f"kernel {self.fn.__name__}")
        return run(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", interpreted), mock.patch.object(JITFunction, "run", compiled):
        yield


def started_by(run: Callable[[], object]) -> list[str]:
    """The names of what `run` starts, in order: allocations and views of memory are no work and do not count."""
    started: list[str] = []
    # where a mode watches, ops take the registered route; what counts is the one that they take unwatched
    with mock.patch.object(_transforms, "_is_plain", return_value=True), _kernels(started), _Calls(started):
        run()
    return started
