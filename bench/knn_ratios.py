"""python -m bench.knn_ratios: the promises about knn that are ratios, all measured in one run on the CPU.

Building the structure is part of every time. Wall time is the best of a few; CPU time is printed beside it: the fairer
figure where other processes share the machine.
"""

import argparse
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import dfn_kernels as dk

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import point_sets  # noqa: E402  one list of hostile sets for tests and benchmark


def best(call, repeats: int = 3) -> tuple[float, float]:
    """Least wall and CPU seconds of a few calls."""
    wall, cpu = math.inf, math.inf
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        wall, cpu = min(wall, time.perf_counter() - start), min(cpu, time.process_time() - start_cpu)
    return wall, cpu


def show(name: str, ours: tuple, base: tuple, what: str) -> None:
    print(f"{name:36} {ours[0] * 1e3:9.1f} ms wall {ours[1] * 1e3:9.1f} ms CPU   "
          f"{ours[0] / base[0]:6.2f} / {ours[1] / base[1]:6.2f} {what}", flush=True)  # fmt: skip


def against_scipy(n: int, k: int, D: int, repeats: int) -> None:
    from scipy.spatial import cKDTree

    p = torch.rand(n, D)
    a = p.numpy()
    theirs = best(lambda: cKDTree(a).query(a, k, workers=-1), 1 if n > 1e5 else repeats)
    ours = best(lambda: dk.knn(p, k), repeats)
    show(f"cKDTree N={n} D={D} k={k}", theirs, ours, "x ours (wall / CPU)")


def hostile(n: int, D: int) -> None:
    even = point_sets.points("uniform", n, D)
    uniform = best(lambda: dk.knn(even, 16), 5)
    causal = best(lambda: dk.knn(even, 16, causal=True))
    show(f"D={D} uniform", uniform, uniform, "x uniform")
    show(f"D={D} uniform, causal", causal, uniform, "x uniform plain")
    for name in point_sets.NAMES:
        if name != "uniform":
            p = point_sets.points(name, n, D)
            show(f"D={D} {name}", best(lambda p=p: dk.knn(p, 16), 2), uniform, "x uniform")
            show(f"D={D} {name}, causal", best(lambda p=p: dk.knn(p, 16, causal=True), 2), causal, "x uniform causal")


def growth(D: int) -> None:
    points = []
    for n in (2**15, 2**17, 2**19, 2**20, 2**22):
        p = torch.rand(n, D)
        wall, cpu = best(lambda p=p: dk.knn(p, 16), 3)
        points.append((math.log(n), math.log(wall), math.log(cpu)))
        print(f"D={D} N={n:8} {wall * 1e3:9.1f} ms wall {cpu * 1e3:9.1f} ms CPU", flush=True)
    x = np.array(points)
    wall, cpu = (np.polyfit(x[:, 0], x[:, column], 1)[0] for column in (1, 2))
    print(f"D={D} exponent: {wall:.3f} wall, {cpu:.3f} CPU")


MEMORY = """
import sys, torch, dfn_kernels as dk

def kilobytes(field):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1])

n, D, k = map(int, sys.argv[1:])
p = torch.rand(n, D)
dk.knn(torch.rand(2000, D), k)
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak starts anew from what is resident now
before = kilobytes("VmRSS")
out = dk.knn(p, k)
grown = (kilobytes("VmHWM") - before) * 1024
size = p.numel() * 4 + out.indices.numel() * 12
print(f"memory N={n} D={D} k={k}: {(grown + p.numel() * 4) / size:.2f} x inputs and outputs ({grown / 2**20:.0f} MiB)")
"""


def memory(n: int) -> None:
    for D, k in ((2, 1), (2, 16), (3, 1), (3, 16)):
        arguments = [sys.executable, "-c", MEMORY, str(n), str(D), str(k)]
        print(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def streaming(k: int = 16) -> None:
    for D in (2, 3):
        per_append = {}
        for n in (10_000, 1_000_000):
            p = torch.rand(1, n + 5000, D).numpy()
            index = dk.StreamingKNN(1, D)
            index.extend(p[:, :n])
            start = time.process_time()
            for i in range(n, n + 5000):
                index.append(p[:, i], k)
            per_append[n] = (time.process_time() - start) / 5000
        small, large = per_append.values()
        print(f"StreamingKNN D={D}: {small * 1e6:.1f} us an append at 10k, {large * 1e6:.1f} us at 1M", flush=True)
        print(f"StreamingKNN D={D}: the cost at 1M is {large / small:.2f} x that at 10k", flush=True)


def embeddings(turns: int = 3, k: int = 16) -> None:
    """On one thread, against products in PyTorch, in turns: as they come, and with the nearest 2k measured."""
    from bench import peers

    torch.set_num_threads(1)
    for D, N in ((32, 3000), (128, 5000), (384, 5000), (768, 5000), (128, 20_000), (384, 20_000)):
        p = torch.randn(1, N, D)
        calls = [partial(op, p, k) for op in (dk.knn, peers.product_knn, peers.measured_product_knn)]
        taken = np.array([[best(call, 1)[1] for call in calls] for _ in range(turns)])
        ratios = np.median(taken / taken[:, :1], axis=0)
        print(f"D={D} N={N}: {taken[:, 0].min() * 1e3:.1f} ms CPU; matmul + topk {ratios[1]:.2f} x, "
              f"measured {ratios[2]:.2f} x", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    everything = ["scipy", "hostile", "growth", "memory", "streaming", "embeddings"]
    parser.add_argument("--only", nargs="*", default=everything)
    parser.add_argument("--dims", type=int, nargs="*", default=[2, 3])
    given = parser.parse_args()
    torch.manual_seed(0)
    for D in given.dims:
        if "scipy" in given.only:
            for n, k in ((given.n, 16), (given.n, 64), (10_000, 16)):
                against_scipy(n, k, D, 3 if n > 1e5 else 30)
        if "hostile" in given.only:
            hostile(given.n, D)
        if "growth" in given.only:
            growth(D)
    if "memory" in given.only:
        memory(given.n)
    if "streaming" in given.only:
        streaming()
    if "embeddings" in given.only:
        embeddings()


if __name__ == "__main__":
    main()
