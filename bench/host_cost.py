"""python -m bench.host_cost: what a call costs the host, on inputs so small that kernels take next to nothing.

Microseconds a call, and the ratio to F.linear on the same [64, 32] states; in a round all run once, a batch of calls
each, and a ratio is of one round; medians. Forward is without gradients, as in inference. `a bare Function` is what
torch.autograd.Function takes with nothing in it: the floor under every op that has a backward pass of its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import dfn_kernels as dk

from . import report

N, d, D, k, P = 64, 32, 3, 8, 4
GOALS = {"flow_drift": (8, 3), "flow_norm": (8, 3), "short_convolution": (8, 3), "knn": (8, 3),
         "gaussian_gather": (10, 3), "pattern_route": (8, 3)}  # fmt: skip
BASE = "F.linear"


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad)


def cases(device: str) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Per row of the table: a call that returns one tensor, and its inputs that have gradients."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device)

    x, p = rand(N, d), rand(N, D)
    found = dk.knn(p, k)
    return {
        BASE: (F.linear, (x, rand(d, d), rand(d))),
        "a bare Function": (Bare.apply, (x,)),
        "flow_drift": (lambda *args: dk.flow_drift(*args).positions, (x, p, rand(D, d), rand(D))),
        "flow_norm": (dk.flow_norm, (x, rand(N))),
        "short_convolution": (dk.short_convolution, (x, rand(4, d))),
        "knn": (lambda p: dk.knn(p, k).sq_dists, (p,)),
        "gaussian_gather": (lambda p, x: dk.gaussian_gather(p, x, found.indices, 0.5), (p, x)),
        "pattern_route": (dk.pattern_route, (x, rand(N, P), rand(P, d, d), rand(d))),
    }


def in_turns(runs: dict[str, Callable[[], object]], rounds: int, calls: int, device: str) -> dict[str, list[float]]:
    """Microseconds of a call, round after round."""
    times: dict[str, list[float]] = {who: [] for who in runs}
    for number in range(rounds + 1):  # one to warm up
        for who, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            taken = time.perf_counter() - start
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                times[who].append(taken / calls * 1e6)
    return times


def training(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    grad = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def table(rounds: int = 300, calls: int = 5, device: str = "cpu") -> list[str]:
    named = cases(device)
    forward = {who: lambda f=f, x=x: f(*x) for who, (f, x) in named.items()}
    both = {who: training(f, x) for who, (f, x) in named.items()}
    measured = [in_turns(runs, rounds, calls, device) for runs in (forward, both)]
    lines = [f"{'microseconds a call (times F.linear; goal)':44}{'forward':26}forward and backward"]
    for who in named:
        cells = []
        for times, goal in zip(measured, GOALS.get(who, (None, None)), strict=True):
            ratio = statistics.median(mine / base for mine, base in zip(times[who], times[BASE], strict=True))
            goal = "" if goal is None else f"; {goal}"
            cells.append(f"{statistics.median(times[who]):8.1f} ({ratio:.1f}{goal})")
        lines.append(f"{who:44}{cells[0]:26}{cells[1]}".rstrip())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=5, help="calls of one op in a row")
    parser.add_argument("--threads", type=int, default=1, help="so small a kernel has no work for more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    facts = report.machine()
    print("\n".join(table(given.rounds, given.calls, given.device)))
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
