"""Where the time of an op goes on a GPU: kernels by time, launches, what the host adds. A part of the GPU suite."""

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import dfn_kernels as dk

from .cases import CASES, Case
from .timing import captured, time_ms
from .walk_steps import points as point_set


def keep(facts: object) -> None:
    """Hands what was measured to the suite."""
    path = os.environ.get("DFN_SUITE_FACTS")
    if path:
        Path(path).write_text(json.dumps(facts))


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
    """Each case once more, forward and with its backward pass, in bfloat16 (a search in float32); float32 too where a
    goal is set in it."""
    from .gpu_parts import Step, backends_of

    rows = []
    for case, dtype in itertools.product(CASES if cases is None else cases, (torch.bfloat16, torch.float32)):
        if case.layer or case.op in ("low_rank_route", "field_sample"):
            continue
        if dtype == torch.float32 and case.op != "knn" and not any("float32" in goal for goal in case.goals):
            continue
        if dtype == torch.bfloat16 and case.op == "knn":
            continue
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
            graph = row.get("graph_ms") or 0
            print(f"{case.name}, {mode}, {row['dtype']}, {backend}: kernels {row['ms']:.3f} ms in {row['launches']} "
                  f"launches, graph {graph:.3f} ms, host {row['host_us']:.0f} us", flush=True)  # fmt: skip
            for name, ms, count in row["kernels"][:5]:
                print(f"    {ms:8.3f} ms {count:4d} x {name}", flush=True)
            keep(rows)
    return f"{len(rows)} profiled"


HOSTILE = ("clusters", "256 positions", "outliers", "diagonal", "narrow middle", "two rows")


def searches(sizes: tuple[int, ...], largest: int) -> Iterator[dict]:
    """What `profiled_searches` looks at: each size, then the largest with hostile sets and with other k."""
    for N, D, causal in itertools.product((*sizes, largest), (2, 3), (False, True)):
        yield {"set": "uniform", "N": N, "D": D, "k": 16, "causal": causal}
    for name in HOSTILE:
        yield {"set": name, "N": largest, "D": 3, "k": 16, "causal": False}
    for k in (4, 64):
        yield {"set": "uniform", "N": largest, "D": 3, "k": k, "causal": False}


def profiled_searches(
    device: str = "cuda", sizes: tuple[int, ...] = (2048, 8192, 32_768, 131_072), largest: int = 1_000_000
) -> str:
    """Searches of every size: time of a call and of each of its kernels, launches, and whether the result is right."""
    rows, wrong = [], []
    for search in searches(sizes, largest):
        N, D, k, causal = (search[name] for name in ("N", "D", "k", "causal"))
        torch.manual_seed(0)
        positions = point_set(search["set"], N, D).to(device)

        def run(positions=positions, k=k, causal=causal):
            return dk.knn(positions, k, causal=causal)

        found = run()
        row = search | {"wrong": wrong_rows(positions, found, k, causal)}
        row |= {"eager_ms": statistics.median(time_ms(run, device, 0.05))} | busy(run, device)
        if device == "cuda":
            row["graph_ms"] = graphed_ms(run)
        rows.append(row)
        what = f"knn {search['set']} N={N} D={D} k={k}{', causal' if causal else ''}"
        if row["wrong"]:
            wrong.append(f"{what}: {row['wrong']} rows")
        print(
            f"{what}: {row['eager_ms']:.3f} ms, graph {row.get('graph_ms', 0):.3f} ms, kernels {row['ms']:.3f} ms in "
            f"{row['launches']} launches, {row['wrong']} rows wrong",
            flush=True,
        )
        for name, ms, count in row["kernels"]:
            print(f"    {ms:8.3f} ms {count:4d} x {name}", flush=True)
        keep(rows)
    if wrong:
        raise AssertionError("; ".join(wrong))
    return f"{len(rows)} searches"


def wrong_rows(positions: torch.Tensor, found: dk.Neighbors, k: int, causal: bool, rows: int = 64) -> int:
    """How many of some rows differ, in an index or a bit of a distance, from every pair compared here."""
    N, D = positions.shape
    count = 0
    for i in torch.randint(N, (rows,), generator=torch.Generator().manual_seed(1)).tolist():
        step = positions[: i + 1 if causal else N] - positions[i]
        d = step[:, 0] * step[:, 0]
        for a in range(1, D):
            d = d + step[:, a] * step[:, a]
        d, indices = d.sort(stable=True)
        there = min(k, len(d))
        same = found.indices[i, :there].equal(indices[:there]) and found.sq_dists[i, :there].equal(d[:there])
        count += not (same and bool((found.indices[i, there:] == -1).all()))
    return count


def crossover(
    device: str = "cuda",
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768),
    batches: tuple[int, ...] = (1, 32),
) -> str:
    """Every pair beside the tree, from a graph: what `use_tree` decides."""
    from dfn_kernels.triton.knn import brute, walk
    from dfn_kernels.triton.knn import tree as trees

    rows = []
    for B, N, (D, k), causal in itertools.product(batches, sizes, ((2, 16), (3, 16), (3, 64), (6, 16)), (False, True)):
        if B * N * N > 2**33 or D == 6 and causal:
            continue
        points = torch.rand(B, N, D, device=device)

        def every_pair(points=points, k=k, causal=causal):
            return brute.search(points, None, None, None, k, causal, True)

        def by_tree(points=points, k=k, causal=causal):
            tree = trees.build(points, None, causal)
            return walk.search(points, tree.rows, tree.seats, None, None, tree, k, causal, True)

        row = {"B": B, "N": N, "D": D, "k": k, "causal": causal}
        for name, run in (("every pair", every_pair), ("tree", by_tree)):
            run()
            row[name] = graphed_ms(run) if device == "cuda" else statistics.median(time_ms(run, device, 0.0))
        rows.append(row)
        print(row, flush=True)
        keep(rows)
    return f"{len(rows)} compared"


def no_grad(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()
