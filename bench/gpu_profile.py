"""Where the time of an op goes on a GPU: kernels by time, launches, what the host adds. A part of the GPU suite."""

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import dfn_kernels as dk

from .cases import CASES, Case
from .timing import captured, time_ms


def busy(run: Callable[[], object], device: str) -> dict:
    """One run under the profiler: kernels as (name, ms, launches), the longest first; their sum and number."""
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = [(e.key[:60], getattr(e, time_of) / 1e3, e.count) for e in seen.key_averages()]
    kernels = sorted((k for k in found if k[1] > 0), key=lambda k: -k[1])
    return {"ms": sum(k[1] for k in kernels), "launches": sum(k[2] for k in kernels), "kernels": kernels[:12]}


def host_us(run: Callable[[], object], device: str, calls: int = 30) -> float:
    """Microseconds that the host is busy with one call: how long it takes to enqueue many of them."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    taken = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return taken / calls * 1e6


def graphed_ms(run: Callable[[], object]) -> float:
    """Median time of a replay from a CUDA graph: what the host cannot hold up."""
    graph, _ = captured(run)
    return statistics.median(time_ms(graph.replay, "cuda", 0.05))


def profiled_cases(device: str = "cuda", small: bool = False, cases: list[Case] | None = None) -> str:
    """Each case once more, forward and with its backward pass, in bfloat16 (a search in float32)."""
    from .gpu_parts import Step, backends_of

    rows = []
    for case in CASES if cases is None else cases:
        if case.layer or case.op in ("low_rank_route", "field_sample"):
            continue
        dtype = torch.float32 if case.op == "knn" else torch.bfloat16
        backend = backends_of(case.op, device)[0]
        step = Step(case, backend, dtype, device, case.small if small else case.sizes)
        for mode, run in {"forward": lambda s=step: no_grad(s.forward), "training": step}.items():
            if mode == "training" and not case.grads:
                continue
            for _ in range(2):
                run()
            row = {"case": case.name, "mode": mode, "backend": backend, "dtype": str(dtype)[6:]}
            row |= busy(run, device) | {"host_us": host_us(run, device, 3 if small else 30)}
            if device == "cuda":
                try:
                    row["graph_ms"] = graphed_ms(run)
                except RuntimeError as error:
                    row["graph_error"] = str(error).splitlines()[0][:100]
            rows.append(row)
            print(f"{case.name}, {mode}, {backend}: kernels {row['ms']:.3f} ms in {row['launches']} launches, "
                  f"graph {row.get('graph_ms', 0) or 0:.3f} ms, host {row['host_us']:.0f} us", flush=True)  # fmt: skip
            for name, ms, count in row["kernels"][:5]:
                print(f"    {ms:8.3f} ms {count:4d} x {name}", flush=True)
            if path := os.environ.get("DFN_SUITE_FACTS"):
                Path(path).write_text(json.dumps(rows))
    return f"{len(rows)} profiled"


def profiled_searches(
    device: str = "cuda", sizes: tuple[int, ...] = (2048, 8192, 32_768, 131_072, 1_000_000), k: int = 16
) -> str:
    """Searches of every size: the time of a call, of each of its kernels, and how many launches it takes."""
    rows = []
    for N, D, causal in itertools.product(sizes, (2, 3), (False, True)):
        positions = torch.rand(N, D, device=device)

        def run(positions=positions, causal=causal):
            return dk.knn(positions, k, causal=causal)

        run()
        row = {"N": N, "D": D, "causal": causal, "eager_ms": statistics.median(time_ms(run, device, 0.05))}
        row |= busy(run, device)
        if device == "cuda":
            row["graph_ms"] = graphed_ms(run)
        rows.append(row)
        print(
            f"knn N={N} D={D} k={k}{', causal' if causal else ''}: {row['eager_ms']:.3f} ms, graph "
            f"{row.get('graph_ms', 0):.3f} ms, kernels {row['ms']:.3f} ms in {row['launches']} launches",
            flush=True,
        )
        for name, ms, count in row["kernels"]:
            print(f"    {ms:8.3f} ms {count:4d} x {name}", flush=True)
        if path := os.environ.get("DFN_SUITE_FACTS"):
            Path(path).write_text(json.dumps(rows))
    return f"{len(rows)} searches"


def no_grad(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()
