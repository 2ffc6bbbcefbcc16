"""The picture of an ablation: every run as a dot."""

from pathlib import Path

import torch

from ..studies import ablation as study
from .style import BLUE, GRID, INK, ORANGE, SOFT, pyplot, style_axes


def ablation(found: dict, path: Path) -> Path:
    """Every run as a dot, the mean of the seeds and their standard deviation as a bar, a panel for each task."""
    plt = pyplot()
    tasks = [t for t in study.TASKS if any(key.startswith(t) for key in found["cells"])]
    fig, axes = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks) + 1.2, 3.6), dpi=150, sharey=True, squeeze=False)
    names = list(study.LINES.items())[::-1]
    for ax, task in zip(axes[0], tasks, strict=True):
        style_axes(ax, study.TASKS[task] + (" (less is better)" if task == "text" else ""))
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        for y, (line, _) in enumerate(names):
            values = torch.tensor(list(study.column(found, task, line).values()))
            if not len(values):
                ax.text(50, y, "no memory in this task", color=SOFT, fontsize=8, va="center", ha="center")
                continue
            color, mean = BLUE if line == "" else ORANGE, float(values.mean())
            deviation = float(values.std()) if len(values) > 1 else 0.0
            if line == "":
                ax.axvline(mean, color=BLUE, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.6)
            ax.errorbar(mean, y, xerr=deviation, fmt="D", ms=5, color=color, capsize=4, lw=1.6, zorder=3)
            ax.plot(values, [y] * len(values), "o", ms=4, color=color, alpha=0.4, mec="none", zorder=2)
        ax.set(yticks=range(len(names)), yticklabels=[name for _, name in names], ylim=(-0.6, len(names) - 0.4))
        if task != "text":
            ax.set_xlim(-3, 103)
    o = found["options"]
    fig.suptitle(f"without a part: {o['steps']:,} steps, mean and standard deviation of the seeds", x=0.01, ha="left",
                 fontsize=12, color=INK, fontweight="bold")  # fmt: skip
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    return path
