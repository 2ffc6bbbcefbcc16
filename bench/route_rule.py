"""python -m bench.route_rule [--out FILE]: the rule of dfn_kernels/cuda/pattern_route.py against the clock, on a GPU.

For every size and dtype, forward and backward (without the gradient of the patterns, always PyTorch's): the time of our
CUDA kernel, of PyTorch's products, of the Triton kernel, of one bare cuBLAS product of the same work, and whether
`by_products` names the faster of the first two. Results that disagree get no time. The last line counts the wrong
choices and what they cost. Not yet run on a GPU.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from dfn_kernels import _backends
from dfn_kernels.cuda import pattern_route as launcher

from .timing import time_ms

#         T, P, I, O
SIZES = [
    (1, 8, 512, 512), (128, 8, 512, 512), (1024, 8, 512, 512), (8192, 8, 512, 512), (8191, 8, 509, 521),
    (65536, 16, 768, 768), (1024, 8, 512, 10_000), (8192, 8, 512, 10_000), (8192, 4, 4096, 4096),
    (2048, 2, 16_384, 4096), (7, 3, 64, 64), (64, 4, 128, 128), (512, 8, 128, 128),
]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def tensors(T: int, P: int, I: int, O: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = torch.randn(T, I, device=device).to(dtype), torch.randn(T, O, device=device).to(dtype)
    patterns = torch.randn(P, O, I, device=device).div(I**0.5).to(dtype)
    return x, grad, torch.randn(T, P, device=device, dtype=real).softmax(-1), patterns


def ways(backward: bool, x, grad, weights, patterns) -> dict:
    """The same result in every way but the last, which is one product of as many multiply-adds."""
    left, other = (grad, x) if backward else (x, None)
    routes = {
        "kernel": lambda: launcher._kernel(left, weights, patterns, None, other, None, False),
        "products": lambda: launcher._products(left, weights, patterns, None, other, False),
    }
    if _backends.missing("pattern_route", "triton", left.device.type) is None:
        from dfn_kernels.triton import pattern_route as ours

        if backward:
            routes["triton"] = lambda: ours.pattern_route_backward(grad, x, weights, patterns, None, True, False, False)
        else:
            routes["triton"] = lambda: (ours.pattern_route(x, weights, patterns, None, None, False),)
    wide = left.repeat(1, patterns.shape[0])
    flat = patterns.flatten(0, 1) if backward else patterns.transpose(0, 1).flatten(1).t()
    return {**routes, "bare": lambda: (wide @ flat,)}


def measure(size: tuple[int, ...], dtype: torch.dtype, backward: bool, device: str, seconds: float) -> dict:
    T, P, I, O = size
    K, N = (O, I) if backward else (I, O)
    x, grad, weights, patterns = tensors(*size, dtype, device)
    ms, results = {}, {}
    for name, run in ways(backward, x, grad, weights, patterns).items():
        results[name] = run()[0].double()
        ms[name] = statistics.median(time_ms(run, device, seconds))
    want = results["products"]
    allowed = 16 * torch.finfo(dtype).eps * want.norm()
    for name in set(ms) - {"bare", "products"}:
        if not (results[name] - want).norm() <= allowed:
            ms[name] = None
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    choice = "products" if launcher.by_products(T, P, K, N, dtype, capability, backward) else "kernel"
    best = min((name for name in ("kernel", "products") if ms.get(name)), key=ms.get)
    return dict(
        T=T, P=P, K=K, N=N, dtype=str(dtype)[6:], backward=backward, ms=ms, choice=choice, best=best,
        lost=ms[choice] / ms[best] - 1 if ms.get(choice) else None,
    )  # fmt: skip


def line(row: dict) -> str:
    times = "  ".join(f"{name} {'wrong' if ms is None else f'{ms:.3f}'}" for name, ms in row["ms"].items())
    verdict = "right" if row["choice"] == row["best"] else f"WRONG, costs {row['lost'] or 0:.0%}"
    return (f"T={row['T']} P={row['P']} K={row['K']} N={row['N']} {row['dtype']} "
            f"{'backward' if row['backward'] else 'forward'}: {times} ms; {row['choice']} is {verdict}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.route_rule", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the rows as JSON, too")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement (default: %(default)s)")
    given = parser.parse_args(argv)
    reason = None if torch.cuda.is_available() else "PyTorch sees no GPU"
    reason = reason or _backends.missing("pattern_route", "native", "cuda")
    if reason:
        print(f"route_rule: nothing was measured: {reason}")
        return 3
    rows = []
    for size in SIZES:
        for dtype in DTYPES:
            for backward in (False, True):
                rows.append(measure(size, dtype, backward, "cuda", given.seconds))
                print(line(rows[-1]), flush=True)
                if given.out:
                    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = [row for row in rows if row["choice"] != row["best"]]
    worst = max((row["lost"] or 0 for row in wrong), default=0.0)
    print(f"{len(wrong)} of {len(rows)} choices are wrong; the worst costs {worst:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
