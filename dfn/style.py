"""How every picture looks: one palette, one set of sizes, titles and labels that leave the curves alone.

Pictures are drawn on figures of their own: nothing here touches pyplot, a screen, or the settings of who calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which colour-blind people tell apart; their yellow is too faint on white.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, SOFT, EDGE, GRID, PALE = "#1f2430", "#565d6d", "#aab0bd", "#e4e6ec", "#c4c8d1"
OURS, OTHERS = BLUE, (ORANGE, GREEN, VERMILLION, PURPLE, SKY, SOFT)
THICK, THIN = 3.2, 1.6  # our curve, and everybody else's
DPI = 150
TITLE, TEXT, SMALL = 15, 12, 10.5  # points; at half the pixels the smallest letters are still 11 pixels high

STYLE = {
    "figure.dpi": DPI, "savefig.dpi": "figure", "font.size": TEXT,
    "text.color": INK, "axes.labelcolor": SOFT, "axes.titlecolor": INK, "xtick.color": SOFT, "ytick.color": SOFT,
    "axes.titlesize": TEXT, "axes.titlelocation": "left", "axes.titlepad": 8, "axes.labelsize": TEXT,
    "xtick.labelsize": 11, "ytick.labelsize": 11, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.fontsize": 11, "legend.frameon": False,
    "axes.edgecolor": EDGE, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": GRID, "lines.linewidth": THIN, "lines.solid_capstyle": "round",
}  # fmt: skip


@contextmanager
def figure(width: float, height: float, title: str = "", note: str = "", dpi: int = DPI) -> Iterator["Figure"]:
    """A figure of so many inches to draw on. ``note`` stands below the title; what is drawn, below both."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        fig = Figure((width, height), dpi, layout="constrained")
        top = height - 0.1
        for text, size, weight, color in ((title, TITLE, "bold", INK), (note, TEXT, "normal", SOFT)):
            if text:
                fig.text(0.12 / width, top / height, text, size=size, weight=weight, color=color, va="top")
                top -= 1.45 * size / 72 * (1 + text.count("\n"))
        fig.get_layout_engine().set(rect=(0, 0, 1, (top - 0.02) / height), w_pad=0.08, h_pad=0.08)
        yield fig


@contextmanager
def picture(
    path: str | Path, width: float, height: float, title: str = "", note: str = "", colors: int | None = 96
) -> Iterator["Figure"]:
    """A `figure` that is written to ``path`` (PNG) at the end.

    So few ``colors`` make the file small; None is for photographs.
    """
    from PIL import Image

    with figure(width, height, title, note) as fig:
        yield fig
        fig.savefig(path)
    if colors:
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


def shade(color: str) -> str:
    """The colour, ``#rrggbb``, dark enough for letters on white."""
    red, green, blue = (round(0.68 * int(color[i : i + 2], 16)) for i in (1, 3, 5))
    return f"#{red:02x}{green:02x}{blue:02x}"


def bare(ax: "Axes") -> None:
    """No ticks, a faint frame: for pictures within the picture."""
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=True, color=GRID)


def label_ends(
    ax: "Axes", labels: list[tuple["Line2D", str]], *, column: bool = True, gap: float = 20, **options: Any
) -> None:
    """Writes each curve's name to the right of the plot, in its colour, instead of a legend.

    The names stand ``gap`` points off in a column, or, without ``column``, beside each curve's last point. Those that
    would overprint each other are moved apart, and joined to their curves by a thin line. Limits, scales and further
    axes must be there.
    """
    from matplotlib.transforms import offset_copy

    options = {"size": 11, "va": "center", "annotation_clip": False, **options}
    across = offset_copy(ax.transAxes, ax.figure, gap, units="points") if column else "offset points"
    notes = []
    for line, text in labels:
        x, y = (values[-1] for values in line.get_data(orig=False))
        y = min(max(y, min(ax.get_ylim())), max(ax.get_ylim()))
        if line.get_transform() != ax.transData:  # a line across the whole plot
            x = ax.get_xlim()[1]
        color = shade(line.get_color())
        thin = dict(arrowstyle="-", color=color, lw=0.8, ls=(0, (1, 2)), shrinkA=1, shrinkB=2, relpos=(0, 0.5))
        notes.append(ax.annotate(text, (x, y), (1 if column else gap, 0), textcoords=(across, "offset points"),
                                 color=color, arrowprops=thin, **options))  # fmt: skip
    if not notes:
        return
    ax.figure.draw_without_rendering()  # for the places in pixels
    box, ends = ax.get_window_extent(), ax.transData.transform([note.xy for note in notes])
    height = 1.08 * max(note.get_window_extent().height for note in notes)
    order = sorted(range(len(notes)), key=lambda i: ends[i, 1])
    places = spread([float(ends[i, 1]) for i in order], height, box.y0 + height / 2, box.y1 - height / 2)
    for i, place in zip(order, places, strict=True):
        up, far = place - ends[i, 1], column and box.x1 - ends[i, 0] > 0.1 * box.width
        notes[i].xyann = (notes[i].xyann[0], up * 72 / ax.figure.dpi)
        notes[i].arrow_patch.set_visible(bool(far or abs(up) > height / 4))


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as it takes (in squares) to lie ``gap`` apart, between ``low`` and ``high``.

    Where there is no room for all, those at the top stand out.
    """
    blocks: list[list[float]] = []  # sum and number of places that have run into each other, less the gaps
    for i, place in enumerate(places):
        blocks.append([place - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += number
    levels = [total / number for total, number in blocks for _ in range(int(number))]
    return [max(low, min(level, high - (len(places) - 1) * gap)) + i * gap for i, level in enumerate(levels)]
