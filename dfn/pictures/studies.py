"""The pictures of studies, drawn from study.json alone: every seed, their mean and their spread."""

import math
import statistics
from pathlib import Path

from ..studies.cells import best_cells
from ..style import GREEN, GRID, INK, ORANGE, OURS, PURPLE, SKY, SOFT, THICK, THIN, VERMILLION, label_ends, picture

# color, mark, and the name that is read
MODELS = {
    "dfn": (OURS, "o", "DFN"),
    "transformer++": (VERMILLION, "s", "Transformer++"),
    "window": (GREEN, "^", "Transformer++, window"),
    "convolved": (INK, "X", "Transformer++, convolutions"),
    "transformer": (ORANGE, "D", "Transformer"),
    "flownetwork": (PURPLE, "v", "FlowNetwork"),
    "dfn, memory": (SKY, "P", "DFN with memory"),
    "semantic": (INK, "X", "DFN, two semantic heads"),
    "semantic, memory": (SOFT, "*", "two semantic heads, memory"),
}


def draw_study(found: dict, path: Path) -> Path:
    """The picture of any study: language, recall, length or parts."""
    {"language": language, "recall": recall, "length": length, "parts": parts}[found["study"]](found, path)
    return path


def moments(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def band(ax, x: list[float], values: list[list[float]], kind: str, marks: bool = True, each: bool = False):
    """A line through the means, a band of one standard deviation; ``values`` has a list of seeds for every x.

    ``each``: a dotted line for each seed in place of the band, where a seed finds all or nothing. Ours is thick and
    lies below the others: where curves meet, all are seen.
    """
    color, mark, _ = MODELS[kind]
    ours = kind == "dfn"
    means, deviations = zip(*map(moments, values), strict=True)
    (line,) = ax.plot(x, means, mark + "-" if marks else "-", color=color, lw=THICK if ours else THIN,
                      ms=8 if ours else 5, zorder=2.5 if ours else 3)  # fmt: skip
    if each:
        ax.plot(x, values, color=color, lw=1, ls=":", alpha=0.7)
        return line
    low, high = ([m + s * d for m, d in zip(means, deviations, strict=True)] for s in (-1, 1))
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    return line


def of_seeds(best: dict[tuple, list[dict]]) -> str:
    """What a line is the mean of; lines need not have as many seeds."""
    fewest, most = min(map(len, best.values()), default=1), max(map(len, best.values()), default=1)
    if most == 1:
        return "one seed"
    return f"mean of {most if fewest == most else f'{fewest} to {most}'} seeds, band: standard deviation"


def language(found: dict, path: Path) -> None:
    """Bits per byte over seconds and over bytes seen, compressors as lines."""
    best = {kind: cells for (kind,), (_, cells) in best_cells(found, most=False).items()}
    values = [p["value"] for cells in best.values() for c in cells for p in c["curve"]]
    note = f"Less is better; {of_seeds(best)}"
    title = f"Bits per byte of held-out text, {found['options']['parameters']} parameters each"
    with picture(path, 11, 5, title, note) as fig:
        axes = fig.subplots(1, 2, sharey=True)
        for ax, of, label in zip(axes, ("seconds", "bytes"), ("seconds of training", "megabytes seen"), strict=True):
            ax.grid()
            ax.set_xlabel(label)
            if not values:
                ax.set(xticks=[], yticks=[])
            lines = []
            for kind in (kind for kind in MODELS if kind in best):
                points = list(zip(*(c["curve"] for c in best[kind]), strict=True))
                x = [moments([p[of] for p in point])[0] / (1e6 if of == "bytes" else 1) for point in points]
                line = band(ax, x, [[p["value"] for p in point] for point in points], kind, marks=False)
                lines.append((line, MODELS[kind][2]))
            if values:  # what is known after the first steps would flatten the rest
                low, high = min(values), min(max(values), min(values) + 3 * (statistics.median(values) - min(values)))
                ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low) + 0.1)
                for name in (n for n in ("bzip2", "xz") if low < found["beside"][n] < high):
                    line = ax.axhline(found["beside"][name], color=SOFT, lw=1, ls=(0, (4, 4)))
                    lines.append((line, name))
        axes[0].set_ylabel("bits per byte")
        label_ends(axes[1], lines)


def recall(found: dict, path: Path) -> None:
    """Share of queries answered over the number of pairs, a panel for every depth and size."""
    best = {place: cells for place, (_, cells) in best_cells(found, most=True).items()}
    shapes = sorted({(int(layers), int(dim)) for _, layers, dim, _ in best}) or [(0, 0)]
    ticks = sorted({int(p) for *_, p in best})
    columns = min(2, len(shapes))
    rows = math.ceil(len(shapes) / columns)
    note = f"Associative recall: more is better; {of_seeds(best)}"
    with picture(path, 3.9 * columns + 2.6, 2.9 * rows + 1.2, "How many looked-up values are right", note) as fig:
        axes = fig.subplots(rows, columns, sharey=True, squeeze=False)
        labels, named = [], {}
        for place, ((layers, dim), ax) in enumerate(zip(shapes, axes.flat, strict=False)):
            ax.set_title(f"{layers} layer{'s' * (layers != 1)}, dim {dim}")
            ax.grid()
            lines = []
            for kind in MODELS:
                cells = {int(p): c for (k, l, d, p), c in best.items() if (k, int(l), int(d)) == (kind, layers, dim)}
                if cells:
                    pairs = sorted(cells)
                    line = band(ax, pairs, [[100 * c["value"] for c in cells[p]] for p in pairs], kind)
                    lines.append((line, MODELS[kind][2]))
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(p) for p in ticks])
            ax.minorticks_off()
            ax.set_ylim(-3, 105)
            named.update({name: line for line, name in lines})  # to be named on the right, also who is not there
            if place % columns == columns - 1 or place == len(shapes) - 1:
                labels.append((ax, [(line, name) for name, line in named.items()]))
                named = {}
        for ax in axes.flat[len(shapes) :]:
            ax.axis("off")
        fig.supxlabel("pairs of key and value in the sequence", size=12, color=SOFT)
        fig.supylabel("queries answered, %", size=12, color=SOFT)
        for ax, lines in labels:
            label_ends(ax, lines)


LENGTHS = {
    "text": ("by_stretch", 1, "bytes read before (up to)", "Text: bits per byte (less is better)"),
    "needle": ("by_distance", 100, "tokens back to the needle", "Needles found, % (more is better)"),
}


def length(found: dict, path: Path) -> None:
    """Bits per byte by the stretch of a long window, and needles found over their distance."""
    ways = {task: best_cells(found, most=task == "needle") for task in ("text", "needle")}
    best = {key: cells for task, way in ways.items() for key, (_, cells) in way.items() if key[0] == task}
    panels = [task for task in ways if any(key[0] == task for key in best)] or ["text"]
    trained = found["options"]["length"]
    seeds = of_seeds(best)
    note = f"Grey: further than the {trained:,} trained on; {seeds}{', dotted: each' if 'needle' in panels else ''}"
    with picture(path, 11 if len(panels) > 1 else 7.5, 5, "Beyond the length trained on", note) as fig:
        labels = []
        for ax, task in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            name, factor, below, said = LENGTHS[task]
            ax.set_title(said)
            ax.grid(axis="y")
            lines, ends = [], [trained]
            for kind in (kind for kind in MODELS if (task, kind) in best):
                cells = best[task, kind]
                ends = [int(end) for end in cells[0][name]]
                values = [[factor * c[name][str(end)] for c in cells] for end in ends]
                line = band(ax, ends, values, kind, each=task == "needle")
                lines.append((line, MODELS[kind][2]))
            ax.set_xscale("log", base=2)
            ticks = ends[-1::-2] if len(ends) > 5 else ends  # all of them would overprint each other
            ax.set_xticks(ticks, [short(tick) for tick in ticks])
            ax.minorticks_off()
            if ends[-1] > trained:
                ax.axvspan(trained, ends[-1], color=GRID, alpha=0.55, lw=0, zorder=0)
            if task == "needle":
                ax.set_ylim(-3, 105)
            ax.set_xlabel(below)
            labels.append((ax, lines))
        for ax, lines in labels:
            label_ends(ax, lines)


def short(number: int) -> str:
    """65536 as 64k."""
    return f"{number / 1024:.0f}k" if number >= 1000 else str(number)


PANELS = {
    "text": ("text: bits per byte\n(less is better)", 1),
    "recall": ("recall: answered, %\n(more is better)", 100),
    "segments": ("segments: answered, %\n(more is better)", 100),
}


def parts(found: dict, path: Path) -> None:
    """Every run as a dot, the mean of the seeds and their standard deviation as a bar, a panel for each task."""
    cells = {tuple(key.split("/")): c["value"] for key, c in found["cells"].items() if c.get("value") is not None}
    tasks = [task for task in PANELS if any(t == task for t, *_ in cells)] or ["text"]
    lines = list(dict.fromkeys(line for _, line, _ in cells))[::-1]
    title = f"One thing changed, {found['options']['steps']:,} steps each"
    note = "Diamond, bar: mean and deviation of the seeds; rings: the runs; dashed: the model as it is"
    with picture(path, 2.9 * max(2, len(tasks)) + 2.6, 0.34 * len(lines) + 2.2, title, note) as fig:
        for ax, task in zip(fig.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
            said, factor = PANELS[task]
            ax.set_title(said)
            ax.grid(axis="x")
            for y, line in enumerate(lines):
                values = [factor * x for (t, l, _), x in cells.items() if (t, l) == (task, line)]
                if not values:
                    continue
                (mean, deviation), full = moments(values), line == "full"
                color = OURS if full else INK
                if full:
                    ax.axvline(mean, color=OURS, lw=1, ls=(0, (4, 4)))
                ax.errorbar(mean, y, xerr=deviation, fmt="D", ms=6, color=color, capsize=4, lw=THIN, zorder=3)
                ax.plot(values, [y] * len(values), "o", ms=7, mfc="none", mec=color, mew=0.9, zorder=2)
            ax.set_yticks(range(len(lines)), [found["lines"][line] for line in lines], color=INK)
            ax.set_ylim(-0.6, len(lines) - 0.4)
            if task != "text":
                ax.set_xlim(-3, 103)
