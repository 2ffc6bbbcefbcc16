"""Time, memory, and what the machine reaches at best."""

import time
from collections.abc import Callable

import torch

from dfn.training.memory import peak_growth


# ---- time -----------------------------------------------------------------------------------------------------------
def time_rounds(runs: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of single runs, round after round: in a round all run once, so a machine's moods meet all alike.

    Who has taken about `seconds` stops; the n-th times of two contenders are of the same round. On a GPU with an L2
    cache that was just overwritten. The caller has warmed up whatever compiles at its first run.
    """
    once = _timer(device)
    fewest = 3 if device == "cpu" else 10
    times: dict[str, list[float]] = {who: [] for who in runs}

    def wants_more(taken: list[float]) -> bool:
        if not taken or (len(taken) < fewest and taken[0] < 1e4):
            return True
        return sum(taken) < seconds * 1e3 and len(taken) < 200

    while going := [who for who, taken in times.items() if wants_more(taken)]:
        for who in going:
            times[who].append(once(runs[who]))
    return times


def time_ms(run: Callable[[], object], device: str, seconds: float) -> list[float]:
    """The same for one alone, after a run to warm up."""
    run()
    return time_rounds({"": run}, device, seconds)[""]


def _timer(device: str) -> Callable[[Callable[[], object]], float]:
    def on_cpu(run):
        before = time.perf_counter()
        run()
        return (time.perf_counter() - before) * 1e3

    if device == "cpu":
        return on_cpu
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def on_gpu(run):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return on_gpu


def captured(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of one run, after three to warm up, and what the captured run gave."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def ceilings(device: str, small: bool = False) -> dict[str, float]:
    """What this machine reaches at best: GB/s of a copy (read and written bytes), TFLOP/s of products by dtype."""
    # a copy beyond any cache, a product large enough to be bound by arithmetic
    words, n = (2**20, 256) if small else (2**26, 1024) if device == "cpu" else (2**29, 8192)
    source = torch.ones(words, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 8 * words / min(time_ms(lambda: target.copy_(source), device, 0.3)) / 1e6}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        found[f"{str(dtype)[6:]} TFLOP/s"] = 2 * n**3 / min(time_ms(lambda a=a, b=b: a @ b, device, 0.3)) / 1e9
    return {name: round(value, 3) for name, value in found.items()}


# ---- memory ---------------------------------------------------------------------------------------------------------
def peak_growth_mib(run: Callable[[], object], device: str) -> float | None:
    """By how much the peak exceeds what was held before. On a CPU the resident set, which Linux lets us reset."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_growth(run)
