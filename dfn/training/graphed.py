"""A whole training step in one CUDA graph: forward, backward, clipping, the optimizer, and no host in between."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .batches import tensors_of

WARM_UP = 3  # steps before the capture: they compile, tune and allocate


def shapes_of(batch) -> list[tuple]:
    return [(tuple(x.shape), x.dtype) for x in tensors_of(batch)]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling it runs somebody's Python besides its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked(model: nn.Module) -> str | None:
    """The name of a module with hooks, whose Python a replay would not run; None if there is none."""
    for name, module in model.named_modules():
        if has_hooks(module):
            return name or type(module).__name__
    return None


def aside(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """Runs on another stream, as what warms up for a capture must."""
    if device.type != "cuda":
        return run()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        out = run()
    torch.cuda.current_stream(device).wait_stream(side)
    return out


class Recorder:
    """Captures a function of tensors that stay where they are, and replays it."""

    def __init__(self, run: Callable[[], tuple[Tensor, ...]]):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = run()

    def replay(self) -> tuple[Tensor, ...]:
        self.graph.replay()
        return self.out


class StepGraph:
    """``step(batch) -> tensors``, recorded for batches of one shape; calling it copies a batch in and replays."""

    def __init__(self, step: Callable[[object], tuple[Tensor, ...]], batch):
        """``batch`` becomes the graph's own: it is written to."""
        self.batch, self.shapes = batch, shapes_of(batch)
        self.recorder = Recorder(lambda: step(self.batch))

    def suits(self, batch) -> bool:
        return shapes_of(batch) == self.shapes

    def __call__(self, batch) -> tuple[Tensor, ...]:
        for mine, given in zip(tensors_of(self.batch), tensors_of(batch), strict=True):
            mine.copy_(given, non_blocking=True)
        return self.recorder.replay()
