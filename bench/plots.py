"""Pictures of a result: our speed-up over the best peer of every case; the ops under the machine's roof."""

import json
from pathlib import Path

from .measure import Row
from .report import best_peer

OURS, PEER = "#1b6e8c", "#b8b8b8"


def draw(result: Path) -> Path:
    """Draws a result beside its JSON; returns the picture's path."""
    import matplotlib.pyplot as plt

    loaded = json.loads(result.read_text())
    rows = [Row(**row) for row in loaded["rows"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained", width_ratios=(3, 2))
    _speedups(left, rows)
    _roofline(right, rows, loaded["ceilings"])
    path = result.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _speedups(axis, rows: list[Row]) -> None:
    bars = []
    for row in rows:
        if row.who in ("native", "triton") and row.ms and (peer := best_peer(row, rows)):
            bars.append((row.ratio, f"{row.case}  {row.mode}", peer.who))
    bars.reverse()  # the first case on top
    axis.barh(range(len(bars)), [ratio for ratio, *_ in bars], color=OURS, height=0.7)
    for height, (ratio, _, who) in enumerate(bars):
        axis.text(ratio * 1.05, height, f"{ratio:.1f}x  {who}", va="center", fontsize=8)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(bars)), [name for _, name, _ in bars], fontsize=8)
    axis.set_xscale("log")
    if bars:
        axis.set_xlim(min(0.5, *(ratio for ratio, *_ in bars)), max(ratio for ratio, *_ in bars) * 6)
    axis.set(title="time of the best peer over ours", xlabel="ratio, more is better")
    axis.spines[["top", "right"]].set_visible(False)


def _roofline(axis, rows: list[Row], ceilings: dict[str, float]) -> None:
    """TFLOP/s over operations per byte: an op can be no higher than the lower of the two roofs."""
    import numpy as np

    copy = ceilings["copy GB/s"]
    intensity = np.logspace(-1.5, 4, 100)
    axis.text(0.04, 0.05 * copy / 1e3, f"copy {copy:.0f} GB/s", fontsize=8, rotation=33)
    for dtype in sorted({row.dtype for row in rows} & {"float32", "bfloat16"}):
        most = ceilings[f"{dtype} TFLOP/s"]
        axis.loglog(intensity, np.minimum(intensity * copy / 1e3, most), color="black", lw=1.2)
        axis.text(9e3, most * 1.1, f"matrix product, {dtype}: {most:.2f} TFLOP/s", fontsize=8, ha="right")
    marks = iter("osD^vPX*<>hp8")
    names = dict.fromkeys(row.case for row in rows if row.tflop_per_s)
    for name in names:
        mark = next(marks, "o")
        for row in rows:
            if row.case == name and row.tflop_per_s:
                ours = row.who in ("native", "triton")
                colour, label = (OURS, name) if ours else (PEER, None)
                x = row.tflop_per_s * 1e3 / row.gb_per_s
                axis.plot(x, row.tflop_per_s, mark, color=colour, label=label, zorder=3 if ours else 2)
    axis.set(title="forward: how near the machine's roof", xlabel="operations per byte", ylabel="TFLOP/s")
    axis.grid(True, which="major", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="lower right", title="blue: ours, grey: peers", title_fontsize=7)
