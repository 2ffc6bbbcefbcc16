"""How many threads a run takes: the number with which a step takes the least time, on this machine, now."""

import os
import time
from collections.abc import Callable

import torch

from ..training.trainer import NonFiniteLoss

BUDGET = 10.0  # seconds, for all that is tried


def fast_threads(make: Callable[[], Callable[[], object]]) -> int:
    """The number of threads with which a step of ``make()`` takes the least time, at most those that torch takes now.

    A large model wants all of them, a small one or a busy machine fewer. What OMP_NUM_THREADS says is taken as it is.
    """
    most = torch.get_num_threads()
    if most == 1 or os.environ.get("OMP_NUM_THREADS"):
        return most
    times, began = {}, time.perf_counter()
    try:
        for threads in (most, *(n for n in (1, 2, 4, 8, 16, 32) if n < most)):
            if times and time.perf_counter() - began > BUDGET:
                break
            torch.set_num_threads(threads)
            with torch.random.fork_rng(devices=[]):
                step = make()
                step()
                times[threads] = min(_seconds(step) for _ in range(3))
    except NonFiniteLoss:  # the run itself will say so
        return most
    finally:
        torch.set_num_threads(most)
    return min(times, key=times.get)


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
