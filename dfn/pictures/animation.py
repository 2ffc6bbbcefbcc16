"""An animation of a model that learns to look things up: its entities drift until each question lies by its answer.

The task is associative recall (`dfn.studies.recall`): eight pairs of a key and a value, then each key again. What is
shown are places in the semantic head of the last layer of a small `DFNLanguageModel` with two dimensions, as they are:
nothing is projected. Between two looks at the model they are interpolated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.language import DFNLanguageModel
from ..studies.recall import recall_batch
from ..style import BLUE, EDGE, GREEN, INK, ORANGE, OURS, PURPLE, SKY, SOFT, THICK, VERMILLION, figure, shade
from ..training.trainer import Trainer
from .drift import trace

PAIRS, KEYS, UNSEEN = 8, 16, 200  # UNSEEN: sequences that tell how many questions are answered
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, INK, "#8a6d3b")
MILLISECONDS = 70


class Look(NamedTuple):
    """One look at the model."""

    step: int
    pairs: Tensor  # [PAIRS, 2], where the values of the pairs are
    asked: Tensor  # [PAIRS, 2], where the questions look, in the order of the pairs
    reach: float  # sigma: how far they see
    said: list[int]  # what is answered to them
    share: float  # of the questions of unseen sequences that are answered


class Recorded(NamedTuple):
    keys: list[int]
    values: list[int]
    looks: list[Look]


def record(steps: int = 180, every: int = 3, seed: int = 0) -> Recorded:
    """Trains a model for so many steps and looks at it every so often."""
    torch.manual_seed(seed)
    model = DFNLanguageModel(vocab_size=2 * KEYS, dim=64, layers=2, pos_dim=2, block_options=dict(convolution=0))
    generator = torch.Generator().manual_seed(seed + 1)
    keys = torch.randperm(KEYS, generator=generator)[:PAIRS]
    values = torch.randperm(10, generator=generator)[:PAIRS]  # of one digit, so that they fit into their dots
    order = torch.randperm(PAIRS, generator=generator)
    pairs = torch.stack([keys, KEYS + values], 1)
    ids = torch.cat([pairs, pairs[order]]).flatten()[None]
    unseen = recall_batch(UNSEEN, PAIRS, keys=KEYS, vocab_size=2 * KEYS, generator=generator)
    trainer = Trainer(model, steps=4 * steps, lr=6e-3, warmup=100)  # the step length hardly falls while it is watched
    looks = [look(model, ids, order, unseen, 0)]
    for step in range(1, steps + 1):
        trainer.train_step(recall_batch(32, PAIRS, keys=KEYS, vocab_size=2 * KEYS, generator=generator))
        if step % every == 0:
            looks.append(look(model, ids, order, unseen, step))
    return Recorded(keys.tolist(), values.tolist(), looks)


@torch.no_grad()
def look(model: DFNLanguageModel, ids: Tensor, order: Tensor, unseen: tuple[Tensor, Tensor], step: int) -> Look:
    """``ids [1, 4 * PAIRS]``: the pairs, then in this order each key again, the question, and its value."""
    back, last = order.argsort(), trace(model, ids)[-1]
    said = model(ids)[0][0, 2 * PAIRS :: 2].argmax(-1)[back]
    asked, reach = last.looks[0, 2 * PAIRS :: 2][back], model.blocks[-1].attention.log_sigma[0].exp()
    scored = unseen[1] >= 0
    right = model(unseen[0])[0].argmax(-1)[scored] == unseen[1][scored]
    return Look(step, last.positions[0, 1 : 2 * PAIRS : 2], asked, float(reach), (said - KEYS).tolist(),
                float(right.float().mean()))  # fmt: skip


def animate(recorded: Recorded, path: str | Path, frames: int = 80, hold: int = 22) -> None:
    """Writes the animation to ``path`` (GIF); the last frame stands ``hold`` frames long."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    images = []
    with drawn() as (fig, axes):
        canvas = FigureCanvasAgg(fig)
        for time in times(recorded.looks, frames):
            draw_frame(axes, recorded, time)
            canvas.draw()
            image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
            images.append(image.convert("RGB"))
    wide = Image.new("RGB", (images[0].width, 3 * images[0].height))  # one palette for all frames
    for place, number in enumerate((0, len(images) // 2, -1)):
        wide.paste(images[number], (0, place * images[0].height))
    palette = wide.quantize(64)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [MILLISECONDS] * (len(images) - 1) + [MILLISECONDS * hold]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


@contextmanager
def drawn() -> Iterator[tuple]:
    """The figure of all frames and its axes: the map, the answers, the share."""
    note = "First it reads pairs (E=7), then questions (E?): each drifts to the pair that answers it"
    with figure(8, 4.6, "A model learns where to look", note, dpi=100) as fig:
        fig.set_layout_engine("none")
        places = (0.015, 0.03, 0.53, 0.8), (0.6, 0.33, 0.38, 0.5), (0.67, 0.12, 0.3, 0.17)
        yield fig, [fig.add_axes(place) for place in places]


def times(looks: list[Look], frames: int) -> list[float]:
    """Places between the looks, in numbers of looks: time goes slower where more moves."""
    moved = [0.0]
    for before, after in zip(looks, looks[1:], strict=False):
        scale = after.pairs.std(0).norm()
        way = (after.pairs - before.pairs).norm(dim=1).mean() + (after.asked - before.asked).norm(dim=1).mean()
        moved.append(moved[-1] + float(way / scale))
    even = [0.5 * i / (len(looks) - 1) + 0.5 * m / moved[-1] for i, m in enumerate(moved)]
    found, at = [], 0
    for frame in range(frames):
        wanted = frame / (frames - 1)
        while at < len(even) - 2 and even[at + 1] < wanted:
            at += 1
        found.append(at + min(1.0, (wanted - even[at]) / (even[at + 1] - even[at])))
    return found


def draw_frame(axes: list, recorded: Recorded, time: float) -> None:
    """The map, the questions and their answers, and the curve of the share answered, at a place between two looks."""
    looks = recorded.looks
    first = min(int(time), len(looks) - 2)
    part = time - first
    between = lambda name: (1 - part) * getattr(looks[first], name) + part * getattr(looks[first + 1], name)  # noqa: E731
    now = looks[round(time)]
    names = [chr(ord("A") + key) for key in recorded.keys]
    for ax in axes:
        ax.clear()
    draw_map(
        axes[0], names, recorded.values, between("pairs"), between("asked"), between("reach"), half_width(looks, time)
    )
    draw_answers(axes[1], names, recorded.values, now.said)
    draw_share(axes[2], looks, time, between("step"), between("share"))


def half_width(looks: list[Look], time: float) -> float:
    """Of the map: it grows with the places, smoothly."""
    sizes = [float(torch.cat([a.pairs, a.asked]).sub(a.pairs.mean(0)).abs().max()) for a in looks]
    near = [max(0.0, 1 - abs(i - time) / 6) for i in range(len(sizes))]
    return 1.25 * sum(n * size for n, size in zip(near, sizes, strict=True)) / sum(near)


def draw_map(ax, names: list[str], values: list[int], pairs: Tensor, asked: Tensor, reach: float, half: float) -> None:
    from matplotlib.patches import Circle

    middle = pairs.mean(0)
    pairs, asked = (pairs - middle).tolist(), (asked - middle).tolist()
    ax.set(xticks=[], yticks=[], xlim=(-1.22 * half, 1.22 * half), ylim=(-half, half))
    for side in ax.spines.values():
        side.set(visible=True, color=EDGE)
    for color, name, value, pair, question in zip(COLORS, names, values, pairs, asked, strict=True):
        ax.add_patch(Circle(question, reach, color=color, alpha=0.09, lw=0))
        ax.plot(*zip(question, pair, strict=True), color=color, lw=1.2, zorder=2)
        ax.plot(*pair, "o", ms=30, color=color, mec="white", zorder=3)
        letters = INK if color in (ORANGE, SKY, PURPLE) else "white"
        ax.text(*pair, f"{name}={value}", color=letters, size=9, weight="bold", ha="center", va="center", zorder=7,
                gid="mark")  # fmt: skip
        ax.plot(*question, "o", ms=37, mfc="none", mec=color, mew=2.6, zorder=5)
        ax.annotate(f"{name}?", question, (20, 17), textcoords="offset points", color=shade(color), size=11,
                    weight="bold", ha="center", va="center", zorder=6, gid="mark")  # fmt: skip


def draw_answers(ax, names: list[str], values: list[int], said: list[int]) -> None:
    ax.axis("off")
    ax.set(xlim=(0, 2), ylim=(-4.4, 1))
    ax.text(0, 0.55, "What it answers now", color=INK)
    for i, (color, name, value, answer) in enumerate(zip(COLORS, names, values, said, strict=True)):
        x, y, right = i // 4, -0.6 - i % 4, answer == value
        ax.text(x, y, f"{name}?", color=shade(color), weight="bold", size=13)
        # an answer that is no value at all is possible at first
        ax.text(x + 0.24, y, f"{answer if answer >= 0 else '–'}", color=INK if right else SOFT, size=13)
        ax.text(x + 0.52, y, "right" if right else "wrong", color=shade(GREEN if right else VERMILLION), size=11)


def draw_share(ax, looks: list[Look], time: float, step: float, share: float) -> None:
    past = looks[: int(time) + 1]
    ax.plot([*(a.step for a in past), step], [*(100 * a.share for a in past), 100 * share], color=OURS, lw=THICK)
    ax.plot(step, 100 * share, "o", color=OURS, ms=7, mec="white", clip_on=False)
    ax.set(xlim=(0, looks[-1].step), ylim=(0, 105), yticks=[0, 50, 100], xlabel="training steps")
    ax.set_ylabel("unseen,\n% right", size=11)
    ax.tick_params(labelsize=10)
    ax.xaxis.label.set_size(11)
