"""python -m bench.migrating: `dfn_kernels.compat` beside the originals, for docs/migrating.md.

torch_cluster takes part where it can be imported. Without it, and in place of pytorch3d, the same in plain PyTorch:
all pairs by torch.cdist, then topk. Times are medians of runs in turns, memory is the growth of the peak.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dfn_kernels import compat

from . import report
from .timing import peak_growth_mib, time_rounds

try:
    import torch_cluster
except ImportError:
    torch_cluster = None

MARKS = ("<!-- measured: python -m bench.migrating -->", "<!-- end of measured -->")
PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
CLUSTER, PLAIN = "torch_cluster", "plain PyTorch"


def cases(device: str, small: bool) -> dict[str, tuple[Callable, dict[str, Callable]]]:
    """name: ours, and the others by name."""
    shrink = 50 if small else 1
    n, clouds, P = 100_000 // shrink, 200_000 // shrink, 4096 // shrink
    x, y = torch.rand(n, 3, device=device), torch.rand(n, 3, device=device)
    tiny = torch.rand(clouds * 8, 3, device=device)
    of_tiny = torch.arange(clouds, device=device).repeat_interleave(8)
    sizes = torch.tensor([n, *[10] * (2000 // shrink)], device=device)
    ragged = torch.rand(int(sizes.sum()), 3, device=device)
    of_ragged = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    r = (16 / n / 4.19) ** (1 / 3)  # about 16 points in the ball
    p, q = torch.rand(2, 2000 // shrink, 3, device=device), torch.rand(2, 2000 // shrink, 3, device=device)
    a, b = torch.rand(8, P, 3, device=device), torch.rand(8, P, 3, device=device)
    features = torch.rand(n // 10, 64, device=device)

    def cluster(name: str, *args, **options) -> dict[str, Callable]:
        return {} if torch_cluster is None else {CLUSTER: lambda: getattr(torch_cluster, name)(*args, **options)}

    def all_pairs(p: Tensor, q: Tensor, k: int, norm: float = 2.0) -> Callable:
        return lambda: torch.cdist(p, q, p=norm).topk(k, largest=False)

    return {
        f"knn, {n:,} of {n:,} points, k=16": (lambda: compat.knn(x, y, 16), cluster("knn", x, y, 16)),
        f"knn_graph, {clouds:,} clouds of 8 points, k=3": (
            lambda: compat.knn_graph(tiny, 3, of_tiny, loop=True),
            {**cluster("knn_graph", tiny, 3, of_tiny, loop=True),
             PLAIN: all_pairs(tiny.view(clouds, 8, 3), tiny.view(clouds, 8, 3), 3)},
        ),
        f"knn_graph, a cloud of {n:,} and {len(sizes) - 1:,} of 10 points, k=16": (
            lambda: compat.knn_graph(ragged, 16, of_ragged), cluster("knn_graph", ragged, 16, of_ragged)),
        f"radius, {n:,} of {n:,} points, about 16 within r": (
            lambda: compat.radius(x, y, r, max_num_neighbors=64), cluster("radius", x, y, r, max_num_neighbors=64)),
        f"radius_graph, {n:,} points, about 16 within r": (
            lambda: compat.radius_graph(x, r, max_num_neighbors=64),
            cluster("radius_graph", x, r, max_num_neighbors=64)),
        f"nearest, {n:,} to {n // 10:,} points": (
            lambda: compat.nearest(x, y[: n // 10]),
            {} if torch_cluster is None else {CLUSTER: lambda: torch_cluster.nearest(x, y[: n // 10])}),
        f"fps, {n // 5:,} points, a tenth of them": (
            lambda: compat.fps(x[: n // 5], ratio=0.1, random_start=False),
            cluster("fps", x[: n // 5], ratio=0.1, random_start=False)),
        f"knn_interpolate, {n // 10:,} to {n:,} points, 64 channels": (
            lambda: compat.knn_interpolate(features, y[: n // 10], x),
            {} if torch_cluster is None else {CLUSTER: lambda: _interpolate(features, y[: n // 10], x)}),
        f"knn_points, 2 x {p.shape[1]:,} points, K=8": (
            lambda: compat.knn_points(p, q, K=8), {PLAIN: all_pairs(p, q, 8)}),
        f"knn_points, norm=1, 2 x {p.shape[1]:,} points, K=8": (
            lambda: compat.knn_points(p, q, norm=1, K=8), {PLAIN: all_pairs(p, q, 8, 1.0)}),
        f"ball_query, 8 x {P:,} points, K=32, r=0.1": (
            lambda: compat.ball_query(a, b, K=32, radius=0.1, return_nn=False), {PLAIN: all_pairs(a, b, min(32, P))}),
        f"chamfer_distance, 8 x {P:,} points": (
            lambda: compat.chamfer_distance(a, b),
            {PLAIN: lambda: (lambda d: d.amin(1).mean() + d.amin(2).mean())(torch.cdist(a, b).square())}),
        f"sample_farthest_points, 8 x {P:,} points, K={P // 8}": (
            lambda: compat.sample_farthest_points(a, K=P // 8), {PLAIN: lambda: _farthest(a, P // 8)}),
    }  # fmt: skip


def _interpolate(features: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
    """PyG's formula on torch_cluster's search."""
    i, j = torch_cluster.knn(known, wanted, 3)
    weight = 1 / (known[j] - wanted[i]).square().sum(1, keepdim=True).clamp(min=1e-16)
    out = features.new_zeros(len(wanted), features.shape[1]).index_add(0, i, features[j] * weight)
    return out / features.new_zeros(len(wanted), 1).index_add(0, i, weight)


def _farthest(points: Tensor, K: int) -> Tensor:
    dist = torch.full(points.shape[:2], torch.inf, device=points.device)
    chosen = [torch.zeros(len(points), dtype=torch.int64, device=points.device)]
    rows = torch.arange(len(points), device=points.device)
    for _ in range(K - 1):
        dist = torch.minimum(dist, (points - points[rows, chosen[-1]][:, None]).square().sum(-1))
        chosen.append(dist.argmax(1))
    return torch.stack(chosen, 1)


def measure(device: str, seconds: float, small: bool = False) -> list[dict]:
    torch.manual_seed(0)
    rows = []
    for name, (ours, others) in cases(device, small).items():
        runs = {"ours": ours, **others}
        row = {"case": name}
        for who, run in runs.items():
            run()
            row[f"{who} MiB"] = peak_growth_mib(run, device)
        for who, times in time_rounds(runs, device, seconds).items():
            row[f"{who} ms"] = statistics.median(times)
        rows.append(row)
        print(row, flush=True)
    return rows


def table(facts: dict[str, str], rows: list[dict]) -> str:
    """Markdown; time and memory of ours, and of whom it is beside."""
    at = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    text = f"\n{at}, torch {facts['torch']}, {facts['date']}, commit {facts['commit']}.\n\n"
    text += "| call | ours | beside | their time over ours |\n| --- | --- | --- | --- |\n"
    for row in rows:
        for who in (w for w in (CLUSTER, PLAIN) if f"{w} ms" in row):
            ratio = row[f"{who} ms"] / row["ours ms"]
            text += f"| {row['case']} | {_cell(row, 'ours')} | {who}: {_cell(row, who)} | {ratio:.1f} |\n"
    return text + "\n"


def _cell(row: dict, who: str) -> str:
    mib = row[f"{who} MiB"]
    return f"{row[f'{who} ms']:.1f} ms" + ("" if mib is None else f", {mib:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.migrating", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    given = parser.parse_args()
    facts = report.machine()
    facts["torch_cluster"] = "not installed" if torch_cluster is None else torch_cluster.__version__
    rows = measure(given.device, given.seconds)
    path = given.out / f"{facts['date']}-migrating-{given.device}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    report.put_between(PAGE, MARKS, table(facts, rows))


if __name__ == "__main__":
    main()
