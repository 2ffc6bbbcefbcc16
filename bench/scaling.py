"""Time over N: how an op and its peers grow.

    python -m bench.scaling [--only knn] [--most 1000000] [--out bench/results]

For every case with a number of entities N, and every contender: the median time at N = 4096, 8192, ... up to --most. A
contender that took over --patience seconds is not asked for more. Prints the exponent of the growth (a straight line
through the logarithms), over all sizes and from 32k on; writes JSON and a plot.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from tqdm import tqdm

from dfn.style import OTHERS, OURS, THICK, THIN, label_ends, picture

from .cases import CASES, Case
from .measure import contenders, training_step
from .names import amount, readable
from .plots import MINE
from .report import machine
from .timing import time_ms, time_rounds


def sizes_up_to(most: int) -> list[int]:
    return [2**power for power in range(12, 1 + int(math.log2(most)))]


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log(time) over log(N)."""
    if len(points) < 2:
        return None
    return statistics.linear_regression([math.log(n) for n, _ in points], [math.log(t) for _, t in points]).slope


def grow(
    case: Case, most: int, patience: float, device: str, skip: Sequence[str] = (), seconds: float = 0.3
) -> list[dict]:
    """One row per contender and mode: {case, who, mode, points: [[N, ms], ...], exponent, exponent_from_32k}.

    All sizes take turns, like everybody in `measure`: an exponent would else tell of the machine's other work.
    """
    runs: dict[tuple[str, str, int], Callable[[], object]] = {}
    stopped: set[tuple[str, str]] = set()
    for n in tqdm(sizes_up_to(most), desc=case.op, leave=False):
        torch.manual_seed(0)
        inputs = case.make(**{**case.sizes, "N": n}, device=device, dtype=torch.float32)
        for who, op in contenders(case, device).items():
            for mode in ("forward", "training") if case.grads else ("forward",):
                if who in skip or (who, mode) in stopped:
                    continue
                try:
                    result = op(**inputs)
                    run = partial(op, **inputs)
                    if mode == "training":
                        run = training_step(case, op, inputs, torch.randn_like(result))
                    ms = time_ms(run, device, 0)[0]
                except (RuntimeError, MemoryError, ImportError):
                    stopped.add((who, mode))
                    continue
                runs[who, mode, n] = run
                if ms > patience * 1e3:
                    stopped.add((who, mode))
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for (who, mode, n), times in time_rounds(runs, device, seconds).items():
        curves.setdefault((who, mode), []).append((n, statistics.median(times)))
    return [
        {
            "case": case.op,
            "who": who,
            "mode": mode,
            "points": points,
            "exponent": exponent(points),
            "exponent_from_32k": exponent([p for p in points if p[0] >= 2**15]),
        }
        for (who, mode), points in curves.items()
    ]


def plot(rows: list[dict], path: Path) -> None:
    panels = list(dict.fromkeys((row["case"], row["mode"]) for row in rows))
    colors = dict(zip(dict.fromkeys(row["who"] for row in rows if row["who"] not in MINE), cycle(OTHERS), strict=False))
    title, note = "Time by N, the number of points or entities", "Beside each name: time grows as N to this power"
    with picture(path, 9, 4.3 * len(panels) + 0.8, title, note) as figure:
        for axis, (case, mode) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            lines = []
            for row in (row for row in rows if (row["case"], row["mode"]) == (case, mode)):
                ours = row["who"] in MINE
                power = "" if row["exponent"] is None else f", $N^{{{row['exponent']:.2f}}}$"
                n, ms = zip(*row["points"], strict=True)
                (line,) = axis.loglog(n, ms, "o-", lw=THICK if ours else THIN, ms=7 if ours else 4,
                                      color=OURS if ours else colors[row["who"]])  # fmt: skip
                lines.append((line, f"ours ({row['who']}){power}" if ours else row["who"] + power))
            key = case.replace(" ", "-").replace("=", "")
            axis.set(title=f"{readable(key)}, {mode}", xlabel="N", ylabel="milliseconds")
            axis.set_xticks(sorted({n for line, _ in lines for n in line.get_xdata()})[::2], minor=False)
            axis.set_xticks([], minor=True)
            axis.xaxis.set_major_formatter(lambda n, _: amount(round(n)))
            axis.yaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
            axis.grid()
            label_ends(axis, lines, gap=10)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", nargs="*", default=(), help="contenders to leave out")
    parser.add_argument("--most", type=int, default=2**20)
    parser.add_argument("--patience", type=float, default=4.0, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--draw", type=Path, metavar="RESULT.json", help="draw its picture again and measure nothing")
    given = parser.parse_args()
    if given.draw:
        return plot(json.loads(given.draw.read_text())["rows"], given.draw.with_suffix(".png"))
    seen: dict[tuple, Case] = {}
    for case in CASES:
        if "N" in case.sizes and given.only in case.name:
            seen.setdefault((case.op, case.sizes.get("D"), case.sizes.get("c")), case)
    rows = []
    for case in seen.values():
        for row in grow(case, given.most, given.patience, given.device, given.skip):
            row["case"] = case.op + "".join(f" {k}={v}" for k, v in case.sizes.items() if k != "N")
            rows.append(row)
            last = row["points"][-1]
            slopes = [f"{row[key] or math.nan:.2f}" for key in ("exponent", "exponent_from_32k")]
            name = f"{row['case']:45} {row['mode']:9} {row['who']:34}"
            print(f"{name} exponent {slopes[0]}, from 32k {slopes[1]} {last[1]:10.1f} ms at N = {last[0]}")
    given.out.mkdir(parents=True, exist_ok=True)
    facts = machine()
    path = given.out / f"{facts['date']}-scaling-{facts['threads']}threads.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
