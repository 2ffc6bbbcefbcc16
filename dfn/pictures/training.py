"""The picture of a training run: its loss over time."""

import math
from pathlib import Path

from ..style import INK, OURS, SKY, THICK, label_ends, picture
from ..training.trainer import History

BESIDE = {"bigram": "byte bigram", "gzip": "gzip -9"}


def loss_curve(history: History, figures: dict[str, float], path: Path, *, unit: str = "bits") -> None:
    """Training loss and held-out loss over time, with lines for ``figures["gzip"]`` and "bigram" if they are there.

    ``figures["model"]`` is what the model was judged to be at the end, marked with a star. ``unit`` "bits": the
    history's nats are shown as bits per byte.
    """
    of_bytes = unit == "bits"
    data, scale = ("bytes", 1 / math.log(2)) if of_bytes else ("data", 1.0)
    seconds, losses = history.seconds, [scale * loss for loss in history.losses]
    smooth = smoothed(losses)
    what = "Bits per byte" if of_bytes else f"Loss ({unit})"
    seen = f"{history.steps[-1]:,} steps, {history.tokens[-1]:,} {data if of_bytes else 'entities'} seen"
    with picture(path, 9, 5, f"{what} during training", f"{seen}; less is better") as fig:
        ax = fig.add_subplot()
        ax.grid(axis="y")
        ax.plot(seconds, losses, color=SKY, alpha=0.3, lw=0.8)
        (trained,) = ax.plot(seconds, smooth, color=SKY, lw=2)
        labels = [(trained, f"training {data} (smoothed): {smooth[-1]:.3f}")]
        if history.evaluated:
            _, when, found = zip(*history.evaluated, strict=True)
            (held_out,) = ax.plot(when, found, "o-", color=OURS, lw=THICK, ms=6, mec="white")
            sample = ", a sample" if "model" in figures else ""
            labels.append((held_out, f"held-out {data}{sample}: {found[-1]:.3f}"))
        if "model" in figures:
            (star,) = ax.plot(seconds[-1], figures["model"], "*", ms=17, color=OURS, mec="white", clip_on=False,
                              zorder=5)  # fmt: skip
            labels.append((star, f"judged at the end: {figures['model']:.3f}"))
        for name, said in BESIDE.items():
            if name in figures:
                line = ax.axhline(figures[name], color=INK, lw=1.2, ls=(0, (5, 4)))
                labels.append((line, f"{said}: {figures[name]:.3f}"))
        ends = [*figures.values(), *(found for *_, found in history.evaluated)]
        lowest, highest = min(ends + smooth), max(ends + smooth[len(smooth) // 50 :])
        room = 0.06 * (highest - lowest) + 1e-3 * abs(highest)
        ax.set(xlim=(0, 1.01 * seconds[-1]), ylim=(lowest - room, highest + room))
        ax.set(xlabel="seconds of training", ylabel="bits per byte" if of_bytes else unit)
        label_ends(ax, labels)


def smoothed(values: list[float]) -> list[float]:
    """Means over a window that grows with the steps: the start is steep."""
    result = []
    for i in range(len(values)):
        width = min(25, i // 5)
        near = values[i - width : i + width + 1]
        result.append(sum(near) / len(near))
    return result
