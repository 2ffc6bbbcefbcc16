"""What every picture must hold to: nothing cut off, overprinted, struck through, covered, faint, small or unnamed."""

import itertools
import re

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SMALLEST = 10  # pixels of the letters' em at half the size of the picture
CONTRAST = 4.5  # what WCAG 2.1 asks of text


def faults(fig: Figure, half: bool = True) -> list[str]:
    """One line for each, in a figure that has been drawn.

    Texts with the gid "mark" are marks: they need only lie inside.

    ``half``: whether it is looked at at half its size.
    """
    found = []
    hidden = not_drawn(fig)
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]
    boxes = [(t, Text.get_window_extent(t)) for t in texts]  # without the arrows of annotations
    for text, box in boxes:
        name = repr(text.get_text())
        inside = fig.bbox.x0 - 1 <= box.x0 and fig.bbox.y0 - 1 <= box.y0
        if not (inside and box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1):
            found.append(f"{name} is cut off: {box.extents} in {fig.bbox.extents}")
        if text.get_gid() == "mark":
            continue
        pixels = text.get_fontsize() * fig.dpi / 72 / (2 if half else 1)
        if pixels < SMALLEST:
            found.append(f"{name} is small: {pixels:.1f} pixels")
        if contrast(text.get_color()) < CONTRAST:
            found.append(f"{name} is faint: contrast {contrast(text.get_color()):.1f}")
    plain = [(t, padded(box, -2)) for t, box in boxes if t.get_gid() != "mark"]
    for (a, of_a), (b, of_b) in itertools.combinations(plain, 2):
        if of_a.overlaps(of_b):
            found.append(f"{a.get_text()!r} and {b.get_text()!r} overprint each other")
    curves = [(ax, line, in_pixels(line)) for ax in fig.axes for line in ax.lines if line.get_visible()]
    for (text, box), (_, line, points) in itertools.product(plain, curves):
        if within(points, box).any() and line.get_linestyle() != "None":
            found.append(f"{text.get_text()!r} is struck through by a line of {line.axes.get_title(loc='left')!r}")
    for ax, _line, points in curves:
        legend = ax.get_legend()
        if legend is not None and within(points, legend.get_window_extent()).any():
            found.append(f"the legend of {ax.get_title(loc='left')!r} covers a curve")
    for ax in (ax for ax in fig.axes if ax.axison):
        for axis, side in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            labels = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible() and t not in hidden]
            ticks = [t.get_text() for t in labels]
            named = axis.get_label_text().strip() or ax.get_title(loc="left") or getattr(fig, f"_sup{side}label", None)
            if ticks and all(is_number(t) for t in ticks) and not named:
                found.append(f"the {side} axis with the ticks {ticks} has no name")
    return found


def not_drawn(fig: Figure) -> set[Text]:
    """Labels of ticks outside the limits, and all those of axes that are off."""
    hidden = set()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = 1e-6 * (high - low)
            for tick in (*axis.majorTicks, *axis.minorTicks):
                if not (ax.axison and axis.get_visible() and low - room <= tick.get_loc() <= high + room):
                    hidden |= {tick.label1, tick.label2}
            if not ax.axison:
                hidden |= {axis.label, axis.offsetText}
    return hidden


def padded(box: Bbox, by: float) -> Bbox:
    return Bbox.from_extents(box.x0 - by, box.y0 - by, max(box.x0 - by, box.x1 + by), max(box.y0 - by, box.y1 + by))


def in_pixels(line) -> np.ndarray:
    """Points along the line, a pixel apart."""
    corners = line.get_transform().transform(np.column_stack(line.get_data(orig=False)).astype(float))
    corners = corners[np.isfinite(corners).all(1)]
    corners = np.clip(corners, -1e4, 1e4)
    pieces = [
        np.linspace(a, b, 2 + int(np.abs(b - a).max())) for a, b in zip(corners[:-1], corners[1:], strict=True)
    ] or [corners]
    points = np.concatenate(pieces)
    return points[within(points, padded(line.axes.bbox, 1))] if line.get_clip_on() else points


def within(points: np.ndarray, box: Bbox) -> np.ndarray:
    x, y = points.T
    return (box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)


def contrast(color) -> float:
    """Of a colour on white."""
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 1.05 / (0.05 + sum(c * weight for c, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True)))


def is_number(text: str) -> bool:
    """Also 10^3 as matplotlib writes it, and 4k."""
    return bool(re.fullmatch(r"[\d.,k]+", re.sub(r"mathdefault|[^\w.,]", "", text)))
