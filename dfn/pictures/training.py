"""The picture of a training run: its loss over time."""

import math
from pathlib import Path

from ..training.trainer import History
from .style import BLUE, GRID, INK, ORANGE, SOFT, pyplot, style_axes


def loss_curve(history: History, figures: dict[str, float], path: Path, *, unit: str = "bits") -> None:
    """Training loss and held-out loss over time, with lines for ``figures["gzip"]`` and "bigram" if they are there.

    ``figures["model"]`` is the end, marked with a star. ``unit`` "bits": the history's nats are shown as bits per byte.
    """
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(9, 5), dpi=150)
    style_axes(ax)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    bytes_, scale = ("bytes", 1 / math.log(2)) if unit == "bits" else ("data", 1.0)
    seconds, bits = history.seconds, [scale * loss for loss in history.losses]
    smooth = []
    for i in range(len(bits)):  # a window that grows with the steps: the start is steep
        width = min(25, i // 5)
        near = bits[i - width : i + width + 1]
        smooth.append(sum(near) / len(near))
    end = seconds[-1]
    ax.plot(seconds, bits, color=BLUE, alpha=0.18, linewidth=0.8)
    ax.plot(seconds, smooth, color=BLUE, linewidth=2, label=f"training {bytes_} (smoothed)")
    if history.evaluated:
        _, when, found = zip(*history.evaluated, strict=True)
        ax.plot(when, found, "o-", color=ORANGE, mec="white", lw=1.4, label=f"held-out {bytes_} (a sample of them)")
    last = figures.get("model", smooth[-1])
    if "model" in figures:
        label = f"all held-out bytes: {last:.3f}"
        ax.plot(end, last, "*", ms=15, color=ORANGE, mec="white", label=label, clip_on=False, zorder=5)
    names = {"bigram": "byte bigram", "gzip": "gzip -9, held-out bytes alone"}
    for name, label in ((name, label) for name, label in names.items() if name in figures):
        ax.axhline(figures[name], color=INK, linewidth=1, linestyle=(0, (5, 4)))
        # the curve falls from the upper left to the lower right: free is above it on the right, or below on the left
        x, side, top = (end, "right", "bottom") if last < figures[name] else (0, "left", "top")
        ax.text(x, figures[name], f" {label}  {figures[name]:.3f} ", ha=side, va=top, fontsize=8.5, color=INK)
    lowest, highest = min(*figures.values(), *smooth), max(*figures.values(), *smooth[len(smooth) // 50 :])
    room = 0.06 * (highest - lowest) + 1e-9
    ax.set(xlim=(0, end * 1.01), ylim=(lowest - room, highest + room))
    ax.set_xlabel("seconds of training", color=SOFT, fontsize=9)
    ax.set_ylabel("bits per byte" if unit == "bits" else f"loss, {unit}", color=SOFT, fontsize=9)
    ax.set_title(
        f"{history.steps[-1]:,} steps, {history.tokens[-1]:,} {'bytes' if unit == 'bits' else 'entities'}",
        loc="left",
        color=INK,
        fontsize=12,
        pad=12,
    )
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
