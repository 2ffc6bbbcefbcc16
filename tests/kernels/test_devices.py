"""Tensors on another device than the current one: kernels run where their tensors are."""

from types import SimpleNamespace

import pytest
import torch
from every_op import CASES, assert_same, run

from dfn_kernels import _transforms


def test_kernels_run_on_the_device_of_the_first_tensor(monkeypatch):
    """With stand-ins for GPUs: what is current while the kernel runs, and before and after."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = _transforms.on_its_device(lambda x, y, *, z=1: (current[-1], y, z))
    there, here, cpu = (
        SimpleNamespace(is_cuda=gpu is not None, device=SimpleNamespace(index=gpu)) for gpu in (1, 0, None)
    )
    assert kernel(there, 5, z=3) == (1, 5, 3)
    assert kernel(here, 5) == kernel(cpu, 5) == (0, 5, 1)
    assert current == [0]


def test_every_op_does():
    functions = every_function()
    assert len(functions) >= 20
    for function in functions:
        assert function.op._init_fn.__code__ is _transforms.on_its_device(len).__code__, function


def every_function() -> list[type]:
    found, left = [], [_transforms.OpFunction]
    while left:
        more = left.pop().__subclasses__()
        found, left = found + more, left + more
    return [function for function in found if function.__module__.startswith("dfn_kernels")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op, backend", CASES)
def test_on_the_second_gpu(op, backend):
    inputs = op.make(torch.float32)
    first, second = (run(op, backend, {n: x.to(device) for n, x in inputs.items()}) for device in ("cuda:0", "cuda:1"))
    assert all(x.device.index == 1 for x in second)
    assert_same([x.cpu() for x in first], [x.cpu() for x in second])
