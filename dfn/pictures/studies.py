"""The pictures of studies, drawn from study.json alone: every seed, their mean and their spread."""

import statistics
from pathlib import Path

from ..studies.cells import best_cells
from .style import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, SAND, SOFT, pyplot, style_axes

COLORS = {"dfn": BLUE, "transformer++": ORANGE, "window": GREEN, "transformer": SOFT, "flownetwork": PURPLE,
          "dfn, memory": SAND}  # fmt: skip


def draw_study(found: dict, path: Path) -> Path:
    """The picture of any study: language, recall, length or parts."""
    plt = pyplot()
    fig = {"language": language, "recall": recall, "length": length, "parts": parts}[found["study"]](found, plt)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    return path


def moments(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def title(fig, text: str) -> None:
    fig.suptitle(text, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")


def band(ax, x: list[float], values: list[list[float]], name: str, **options) -> None:
    """A line through the means, a band of one standard deviation; ``values`` has a list of seeds for every x."""
    color = COLORS.get(name, INK)
    means, deviations = zip(*map(moments, values), strict=True)
    ax.plot(x, means, color=color, lw=1.8, label=name, **options)
    low, high = ([m + s * d for m, d in zip(means, deviations, strict=True)] for s in (-1, 1))
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def language(found: dict, plt):
    """Bits per byte over bytes seen and over seconds, compressors as lines."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150, sharey=True)
    o, best = found["options"], {kind: cells for (kind,), (_, cells) in best_cells(found, most=False).items()}
    ends = {kind: moments([c["value"] for c in cells])[0] for kind, cells in best.items()}
    for ax, of, label in zip(axes, ("bytes", "seconds"), ("megabytes seen", "seconds of training"), strict=True):
        style_axes(ax)
        ax.grid(color=GRID, lw=0.8)
        for kind in sorted(best, key=ends.get):
            points = list(zip(*(c["curve"] for c in best[kind]), strict=True))
            x = [moments([p[of] for p in point])[0] / (1e6 if of == "bytes" else 1) for point in points]
            band(ax, x, [[p["value"] for p in point] for point in points], kind)
        ax.set_xlabel(label, color=SOFT, fontsize=9)
    axes[0].set_ylabel("bits per byte, held out", color=SOFT, fontsize=9)
    values = [p["value"] for cells in best.values() for c in cells for p in c["curve"]]
    if values:  # what is known after the first steps would flatten the rest
        low, high = min(values), min(max(values), min(values) + 3 * (statistics.median(values) - min(values)) + 0.1)
        axes[0].set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        for name in (n for n in ("bzip2", "xz") if low < found["beside"][n] < high):
            for ax in axes:
                ax.axhline(found["beside"][name], color=SOFT, lw=0.9, ls=(0, (4, 4)))
            axes[0].text(0.99, found["beside"][name], name, transform=axes[0].get_yaxis_transform(), ha="right",
                         va="bottom", fontsize=8, color=SOFT)  # fmt: skip
    axes[1].legend(frameon=False, fontsize=9, labelcolor=INK)
    seeds = max(map(len, best.values()), default=0)
    title(
        fig, f"{o['parameters']} parameters each: mean and spread of {seeds} seed{'s' * (seeds != 1)} (less is better)"
    )
    return fig


def recall(found: dict, plt):
    """Share of queries answered over the number of pairs, a panel for every depth and size."""
    best = {place: cells for place, (_, cells) in best_cells(found, most=True).items()}
    shapes = sorted({(int(layers), int(dim)) for _, layers, dim, _ in best}) or [(0, 0)]
    kinds = sorted({kind for kind, *_ in best}, key=list(COLORS).index)
    fig, axes = plt.subplots(1, len(shapes), figsize=(3.3 * len(shapes) + 1, 3.6), dpi=150, sharey=True, squeeze=False)
    for ax, (layers, dim) in zip(axes[0], shapes, strict=True):
        style_axes(ax, f"{layers} layer{'s' * (layers != 1)}, dim {dim}")
        ax.grid(color=GRID, lw=0.8)
        for kind in kinds:
            cells = {int(p): c for (k, l, d, p), c in best.items() if (k, int(l), int(d)) == (kind, layers, dim)}
            if cells:
                pairs = sorted(cells)
                band(ax, pairs, [[100 * c["value"] for c in cells[p]] for p in pairs], kind, marker="o", ms=4)
        ticks = sorted({int(p) for *_, p in best})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(p) for p in ticks])
        ax.set_ylim(-3, 103)
        ax.set_xlabel("pairs", color=SOFT, fontsize=9)
    axes[0][0].set_ylabel("queries answered, %", color=SOFT, fontsize=9)
    axes[0][-1].legend(frameon=False, fontsize=9, labelcolor=INK)
    title(fig, "Associative recall: mean and spread of the seeds (more is better)")
    return fig


def length(found: dict, plt):
    """Bits per byte by the stretch of a long window, and needles found over their distance."""
    ways = {task: best_cells(found, most=task == "needle") for task in ("text", "needle")}
    best = {key: cells for task, way in ways.items() for key, (_, cells) in way.items() if key[0] == task}
    panels = [task for task in ways if any(key[0] == task for key in best)]
    fig, axes = plt.subplots(1, max(1, len(panels)), figsize=(5.4 * max(1, len(panels)), 4), dpi=150, squeeze=False)
    wants = {"text": ("by_stretch", 1, "up to place", "bits per byte at these places (less is better)"),
             "needle": ("by_distance", 100, "distance", "found, % (more is better)")}  # fmt: skip
    for ax, task in zip(axes[0], panels, strict=False):
        name, factor, below, said = wants[task]
        style_axes(ax, said)
        ax.grid(color=GRID, lw=0.8)
        for (of, kind), cells in best.items():
            if of == task:
                x = [int(end) for end in cells[0][name]]
                band(ax, x, [[factor * c[name][str(end)] for c in cells] for end in x], kind, marker="o", ms=4)
        ax.axvline(found["options"]["length"], color=SOFT, lw=0.9, ls=(0, (4, 4)))
        ax.set_xscale("log", base=2)
        ticks = [int(end) for end in next(c for k, c in best.items() if k[0] == task)[0][name]]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
        if task == "needle":
            ax.set_ylim(-3, 103)
        ax.set_xlabel(f"{below}; trained at {found['options']['length']:,}", color=SOFT, fontsize=9)
        ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    title(fig, "Beyond the length trained on: mean and spread of the seeds")
    return fig


PANELS = {"text": ("text, bits per byte (less is better)", 1), "recall": ("recall, %", 100),
          "segments": ("segments, %", 100)}  # fmt: skip


def parts(found: dict, plt):
    """Every run as a dot, the mean of the seeds and their standard deviation as a bar, a panel for each task."""
    cells = {tuple(key.split("/")): c["value"] for key, c in found["cells"].items() if c.get("value") is not None}
    tasks = [task for task in PANELS if any(t == task for t, *_ in cells)]
    lines = list(dict.fromkeys(line for _, line, _ in cells))[::-1]
    fig, axes = plt.subplots(1, max(1, len(tasks)), figsize=(4.4 * len(tasks) + 1.6, 0.32 * len(lines) + 1.5), dpi=150,
                             sharey=True, squeeze=False)  # fmt: skip
    for ax, task in zip(axes[0], tasks, strict=False):
        said, factor = PANELS[task]
        style_axes(ax, said)
        ax.grid(axis="x", color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        for y, line in enumerate(lines):
            values = [factor * x for (t, l, _), x in cells.items() if (t, l) == (task, line)]
            if not values:
                continue
            (mean, deviation), color = moments(values), BLUE if line == "full" else ORANGE
            if line == "full":
                ax.axvline(mean, color=BLUE, lw=0.8, ls=(0, (4, 4)), alpha=0.6)
            ax.errorbar(mean, y, xerr=deviation, fmt="D", ms=5, color=color, capsize=4, lw=1.6, zorder=3)
            ax.plot(values, [y] * len(values), "o", ms=4, color=color, alpha=0.4, mec="none", zorder=2)
        ax.set_yticks(range(len(lines)), [found["lines"][line] for line in lines])
        ax.set_ylim(-0.6, len(lines) - 0.4)
        if task != "text":
            ax.set_xlim(-3, 103)
    title(fig, f"One thing changed: {found['options']['steps']:,} steps, mean and standard deviation of the seeds")
    return fig
