"""csrc/cuda's gather on the CPU: its operators, compiled by g++ against tests/cuda_emulator, below the public op."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from cuda_emulated import CSRC, Emulator
from helpers import check_against_reference, same_bits
from torch import Tensor

from dfn_kernels import gather_plan, gaussian_gather
from dfn_kernels.cuda import gaussian_gather as launcher

NAMES = ("", "_forward", "_queries", "_entities", "_lists")
SOURCES = [CSRC / "cuda" / f"gaussian_gather{name}.cu" for name in NAMES]
OPS = [importlib.import_module(f"dfn_kernels.{name}") for name in ("gaussian_gather", "gather_plan")]


class Guarded:
    """The launcher; what it is given ends at pages that cannot be accessed, with NaN between rows of values."""

    def __init__(self, emulator: Emulator, gap: int = 0, align: int = 16, hub: int = launcher.HUB, **reset):
        self.emulator, self.gap, self.align, self.hub = emulator, gap, align, hub
        emulator.reset(**reset)

    def __getattr__(self, name: str):
        def run(*args):
            rows = {"gaussian_gather": (2,), "gaussian_gather_backward": (0, 3)}.get(name, ())
            placed = [
                x if not isinstance(x, Tensor) or x.numel() == 0
                else self.emulator.place(x, self.gap, max(self.align, x.element_size())) if i in rows
                else self.emulator.place(x)
                for i, x in enumerate(args)
            ]  # fmt: skip
            before, launcher.HUB = launcher.HUB, self.hub
            try:
                out = getattr(launcher, name)(*placed)
            finally:
                launcher.HUB = before
            self.emulator.check()
            for x, mine in zip(args, placed, strict=True):
                assert not isinstance(x, Tensor) or same_bits(x, mine), "an input was changed"
            return out

        return run


@contextmanager
def emulated(emulator: Emulator, guard: bool = True, **options):
    """Inside, `use_backend("native")` means the emulated kernels."""
    before = [module._launcher for module in OPS]
    chosen = Guarded(emulator, **options) if guard else launcher
    for module in OPS:
        module._launcher = lambda backend, like, backward=False: chosen
    try:
        yield
    finally:
        for module, old in zip(OPS, before, strict=True):
            module._launcher = old


# ---- inputs ---------------------------------------------------------------------------------------------------------
def make(B=2, H=3, N=17, M=11, D=2, c=37, k=5, *, dtype=torch.float32, influence=True, queries=True, shared=False,
         missing=True, normalize=False, plan=False, crowd=0) -> dict:  # fmt: skip
    """Inputs of the op; `crowd` of each row's neighbours are the same for all rows, so that there are hubs."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    M = M if queries else N
    inputs = {
        "positions": torch.randn(B, H, N, D, dtype=real),
        "values": torch.randn(B, H, N, c).to(dtype),
        "indices": torch.randint(-1 if missing else 0, N, (B, H, M, k)),
        "sigma": torch.rand(H, dtype=real) + D**0.5,
        "normalize": normalize,
    }
    inputs["indices"][..., :crowd] = torch.arange(crowd) * 2 + 1
    if missing and inputs["indices"].numel() > 4:  # what does not exist counts as padding; 32 bits of it would exist
        inputs["indices"].view(-1)[-4:] = torch.tensor([N, 2**40 + 1, -(2**40) + 1, -2])
    if influence:
        inputs["influence"] = torch.randn(B, H, N, dtype=real)
        if normalize:  # a sum of weights near 0 would be nobody's fault
            inputs["influence"] = inputs["influence"].abs() + 0.1
    if queries:
        inputs["query_positions"] = torch.randn(B, H, M, D, dtype=real)
    if shared:
        inputs["indices"] = inputs["indices"][:, :1].expand(B, H, M, k)
    return inputs | ({"plan": True} if plan else {})


def gather(plan=False, **inputs) -> Tensor:
    if plan:
        known = gather_plan(inputs["indices"], inputs["positions"], inputs.get("query_positions"))
        inputs["indices"] = known
    return gaussian_gather(**inputs)


def compare(emulator: Emulator, gap=0, align=16, hub=launcher.HUB, order=0, multiprocessors=4, **options) -> None:
    """Fails unless the output and every gradient are as near to the reference in float64 as they must be."""
    inputs = make(**options)
    with emulated(emulator, gap=gap, align=align, hub=hub, order=order, multiprocessors=multiprocessors):
        check_against_reference(gather, inputs, "native")


def compare_lists(emulator: Emulator, B=2, H=2, N=23, M=37, k=3, crowd=0, order=0) -> None:
    """Fails unless every list is complete and ascending."""
    indices = torch.randint(-2, N + 1, (B, H, M, k))  # -2 and N: what does not exist is left out
    indices[..., :crowd] = N // 2
    with emulated(emulator, order=order):
        query_order = torch.rand(B, H, M).argsort().int()
        starts, edges = torch.ops.dfn.transpose_neighbors(
            indices, query_order, indices.new_empty(B, H, N).int(), "native"
        )
    flat, longest = edges.flatten(), 0
    assert starts[0] == 0
    for number, targets in enumerate(indices.view(B * H, M * k)):
        for n in range(N):
            want = (targets == n).nonzero().flatten()
            begin, end = starts[number * N + n], starts[number * N + n + 1]
            assert flat[begin:end].tolist() == want.tolist(), "a list is wrong"
            longest = max(longest, len(want))
    assert starts[B * H * N + 1] == longest, "the length of the longest list is wrong"


# Enough that every deliberate error in test_cuda_emulated_gather.py shows.
MUTATION_CASES = (
    dict(c=40, k=13, N=29, M=41, dtype=torch.bfloat16, normalize=True, order=1),
    dict(c=40, k=13, N=29, M=41, dtype=torch.bfloat16, missing=False, queries=False, plan=True),
    dict(c=300, k=3, dtype=torch.float16, missing=False),
    dict(B=1, H=1, N=29, M=533, c=128, k=17, plan=True, multiprocessors=1),  # several turns a warp
    dict(c=37, k=71, D=5, N=19, M=23, shared=True, normalize=True, order=3),
    dict(c=24, k=9, N=13, M=53, crowd=3, hub=8, plan=True, gap=4),
    dict(c=5, k=17, N=13, M=53, crowd=2, hub=16, D=5, order=2, gap=3, align=4, normalize=True),
)
MUTATION_LISTS = (dict(), dict(N=5003, M=300), dict(M=1201, crowd=1, order=2), dict(M=1201, crowd=2, k=2, N=3))

if __name__ == "__main__":  # one library, in a process of its own: a broken kernel may do anything
    torch.manual_seed(0)
    torch.ops.load_library(sys.argv[1])
    library = Emulator(Path(sys.argv[1]))
    for case in MUTATION_LISTS:
        compare_lists(library, **case)
    for case in MUTATION_CASES:
        compare(library, **case)
