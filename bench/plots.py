"""Pictures of a result: our speed-up over the best peer of every case; the ops under the machine's roof."""

import json
import re
from pathlib import Path

from dfn.style import INK, OURS, PALE, SMALL, VERMILLION, label_ends, picture

from .measure import Row
from .names import readable
from .report import best_peer

MINE = ("native", "triton")  # our backends that are shown


def draw(result: Path) -> Path:
    """Draws a result beside its JSON; returns the picture's path."""
    loaded = json.loads(result.read_text())
    rows = [Row(**row) for row in loaded["rows"]]
    facts, path = loaded["machine"], result.with_suffix(".png")
    bars = speedups(rows)
    note = f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, PyTorch {facts['torch']}, {facts['date']}"
    with picture(path, 13.5, 5.2 + 0.3 * max(len(bars), 4), "Our time beside the fastest other way", note) as fig:
        top, bottom = fig.subplots(2, 1, height_ratios=(0.3 * max(len(bars), 4) + 0.4, 4))
        draw_speedups(top, bars)
        draw_roofline(bottom, rows, loaded["ceilings"])
    return path


def speedups(rows: list[Row]) -> list[tuple[float, str, str]]:
    """Ratio, what was measured, and the fastest peer."""
    return [
        (row.ratio, f"{readable(row.case)}, {row.mode}", peer.who)
        for row in rows
        if row.who in MINE and row.ms and row.ratio and (peer := best_peer(row, rows))
    ]


def draw_speedups(ax, bars: list[tuple[float, str, str]]) -> None:
    ax.set_title("Times as fast as the best other way, by name")
    bars = bars[::-1]  # the first case on top
    for height, (ratio, _, who) in enumerate(bars):
        ax.barh(height, ratio - 1, left=1, height=0.62, color=OURS if ratio >= 1 else VERMILLION)
        ax.annotate(f"{ratio:.1f}x  {who}", (max(ratio, 1), height), (5, 0), textcoords="offset points", va="center",
                    size=SMALL)  # fmt: skip
    ax.axvline(1, color=INK, lw=1)
    ax.set_yticks(range(len(bars)), [name for _, name, _ in bars], color=INK, size=SMALL)
    ax.set_xscale("log")
    ratios = [ratio for ratio, *_ in bars] or [1]
    low, high = min(0.8, 0.8 * min(ratios)), max(3, max(ratios))
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= x <= high]
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.minorticks_off()
    ax.set(xlim=(low, high * (high / low) ** 0.6), ylim=(-0.6, max(len(bars), 1) - 0.4))
    ax.set_xlabel("time of the best peer / our time (logarithmic)")


def draw_roofline(ax, rows: list[Row], ceilings: dict[str, float]) -> None:
    """TFLOP/s over operations per byte: an op can be no higher than the lower of the two roofs.

    Ours have their op's name beside the last case; peers are grey.
    """
    import numpy as np

    ax.set_title("How near the machine's roof, forward pass (blue: ours, grey: peers)")
    counted = [row for row in rows if row.tflop_per_s and row.gb_per_s]
    copy = ceilings["copy GB/s"] / 1e3
    places = [place(row) for row in counted] or [(1, copy)]
    dtypes = sorted({row.dtype for row in rows} & {"float32", "bfloat16"}) or ["float32"]
    tops = [ceilings[f"{dtype} TFLOP/s"] for dtype in dtypes]
    left, right = min(x for x, _ in places) / 4, 40 * max(*(x for x, _ in places), max(tops) / copy)
    low, high = min(min(y for _, y in places), left * copy) / 2, 3 * max(*tops, *(y for _, y in places))
    ax.set(xscale="log", yscale="log", xlim=(left / 8, 1.1 * right), ylim=(low, high))
    ax.grid()
    roofs, intensity = [], np.geomspace(left, right, 200)
    for dtype, top in zip(dtypes, tops, strict=True):
        (roof,) = ax.plot(intensity, np.minimum(intensity * copy, top), color=INK, lw=1.4)
        roofs.append((roof, f"roof: PyTorch's\nproduct, {dtype},\n{top:.3g} TFLOP/s"))
    middle = (left * tops[0] / copy) ** 0.5
    ax.annotate(f"roof: memory,\n{1e3 * copy:.0f} GB/s", (middle, middle * copy), (-8, 4), ha="right", va="bottom",
                textcoords="offset points", size=SMALL, color=INK)  # fmt: skip
    ops = []
    for op in dict.fromkeys(op_of(row) for row in counted):
        for mine in (False, True):
            points = sorted(place(row) for row in counted if (op_of(row), row.who in MINE) == (op, mine))
            if points:
                x, y = zip(*points, strict=True)
                (marks,) = ax.plot(x, y, "o", color=OURS if mine else PALE, ms=8 if mine else 6, mec="white",
                                   zorder=4 if mine else 3)  # fmt: skip
                ops += [(marks, op)] * mine
    ax.set(xlabel="operations per byte moved", ylabel="TFLOP/s")
    label_ends(ax, ops, column=False, size=SMALL, gap=10)
    label_ends(ax, roofs, size=SMALL, gap=10)


def op_of(row: Row) -> str:
    return re.split("[-,]", row.case)[0]


def place(row: Row) -> tuple[float, float]:
    """Operations per byte, TFLOP/s."""
    return row.tflop_per_s * 1e3 / row.gb_per_s, row.tflop_per_s
