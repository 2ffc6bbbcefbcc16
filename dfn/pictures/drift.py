"""Entities on their way through a model."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dfn_kernels import knn

from ..models.language import DFNLanguageModel
from ..models.layers import DynamicFlowAttention
from ..style import BLUE, GREEN, INK, ORANGE, PALE, SMALL, SOFT, VERMILLION, bare, picture, shade

COLORS = {"vowel": shade(BLUE), "consonant": shade(GREEN), "digit": INK, "space": SOFT,
          "other": shade(VERMILLION)}  # fmt: skip


class Stage(NamedTuple):
    """The entities at the start, or after a block: ``[H, N, D]``, and ``[H, N]`` for the learned influence."""

    positions: Tensor
    looks: Tensor | None = None  # where they looked in the block
    log_influence: Tensor | None = None


@torch.no_grad()
def trace(model: DFNLanguageModel, ids: Tensor) -> list[Stage]:
    """The entities of ``ids [1, N]`` before the first block and after each."""
    states = model.embed(ids)
    positions = model.positions(states)
    stages = [Stage(positions[0])]
    for block in model.blocks:
        attention, s = block.attention, block.said(states)
        states, positions = block(states, positions)
        looks, loud = positions + attention.offset[:, None], None
        if attention.receiver is not None:
            flow = attention.receiver(s).unflatten(-1, (attention.heads, attention.pos_dim)).transpose(1, 2)
            looks = looks + attention.alpha[:, None, None] * flow
        if attention.salience is not None:
            loud = attention.log_influence(s)[0].T
        stages.append(Stage(positions[0], looks[0], loud))
    return stages


def drift(model: DFNLanguageModel, text: Tensor, path: Path, length: int = 64) -> None:
    """A line of text as entities in a semantic and a temporal head: at the start, after the first and the last layer.

    Each entity is drawn as its character. A trace leads to where it was in the panel before. Lines lead from the chosen
    entity, from where it looks, to its neighbours, as thick as their weight. Semantic positions are shown in the plane
    of their largest variance, temporal ones as time and the direction of the largest variance beside it.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    raw = bytes(text.tolist())
    start = max(raw.find(b"\n    ", len(raw) // 4), 0) + 1
    ids = torch.tensor(list(raw[start : start + length]))
    chosen = _choose(ids)
    steps = trace(model, ids[None].long())
    stages = sorted({0, 1, len(steps) - 1})
    H, semantic = steps[0].positions.shape[0], model.positions.semantic
    heads = ([0] if semantic else []) + ([H // 2] if H > semantic else [])
    line = "".join(_visible(chr(byte)) for byte in ids.tolist())
    with picture(path, 11, 3.9 * len(heads) + 2.1, "Entities drift through the layers", " \n\n ") as fig:
        top = fig.get_figheight() - 0.5
        fig.text(0.12 / 11, top / fig.get_figheight(), "One for every character of", color=SOFT, va="top")
        fig.text(0.12 / 11, (top - 0.27) / fig.get_figheight(), line, va="top", family="monospace", size=11)
        axes = fig.subplots(len(heads), len(stages), squeeze=False)
        for row, h in zip(axes, heads, strict=True):
            timed = h >= semantic
            places = torch.stack([step.positions[h] for step in steps]).float()  # [layers + 1, N, D]
            plane = _plane(places, timed)
            flat = (places - places.mean((0, 1))) @ plane
            for place, (layer, ax) in enumerate(zip(stages, row, strict=True)):
                head = f"{'temporal' if timed else 'semantic'} head {h}"
                ax.set_title(f"{head}, after layer {layer} of {len(steps) - 1}" if layer else f"{head}, at the start")
                bare(ax)
                here = seen = flat[layer]
                if layer:
                    before = flat[stages[place - 1]]
                    _links(
                        ax, model.blocks[layer - 1].attention, steps[layer], h, here, chosen, places.mean((0, 1)), plane
                    )
                    moves = torch.stack([before, here], 1).tolist()
                    ax.add_collection(LineCollection(moves, color=PALE, linewidth=0.8, zorder=1))
                    seen = torch.cat([here, before])
                for i, (x, y) in enumerate(here.tolist()):
                    char = chr(int(ids[i]))
                    ax.text(x, y, _visible(char), color=COLORS[_kind(char)], size=11, ha="center", va="center",
                            zorder=4, family="monospace", weight="bold" if i == chosen else "normal",
                            gid="mark")  # fmt: skip
                ax.plot(*here[chosen].tolist(), "o", ms=19, mfc="none", mec=ORANGE, mew=2.2, zorder=5)
                low, high = seen.amin(0), seen.amax(0)
                pad = 0.08 * (high - low).clamp(min=1e-3)
                (left, bottom), (right, above) = (low - pad).tolist(), (high + pad).tolist()
                ax.set(xlim=(left, right), ylim=(bottom, above))
                ax.set_xlabel(
                    "from early to late in the text" if timed else "direction of the largest spread", size=SMALL
                )
                if not place:
                    ax.set_ylabel("the largest spread beside it" if timed else "of the second largest", size=SMALL)
        kinds = {_kind(chr(byte)) for byte in ids.tolist()}
        marks = [Line2D([], [], ls="", marker="o", color=COLORS[kind], label=kind) for kind in COLORS if kind in kinds]
        marks += [
            Line2D(
                [], [], ls="", marker="o", ms=11, mfc="none", mec=ORANGE, mew=2, label="the one whose reading is shown"
            ),
            Line2D([], [], color=ORANGE, lw=3, label="whom it reads, thicker is more"),
            Line2D([], [], ls="", marker="+", ms=10, mew=2, color=ORANGE, label="where it looks, if elsewhere"),
            Line2D([], [], color=PALE, lw=1.5, label="the way since the panel before"),
        ]
        fig.legend(handles=marks, loc="outside lower left", ncols=5, columnspacing=1.2, handlelength=1.4)


@torch.no_grad()
def neighbours(attention: DynamicFlowAttention, stage: Stage, head: int, chosen: int) -> tuple[Tensor, Tensor]:
    """Whom the chosen entity reads from, and their shares of the weight."""
    k, places = min(attention.k, chosen + 1), stage.positions[head, : chosen + 1].contiguous()
    near = knn(places, k, queries=stage.looks[head, chosen][None].contiguous())
    indices, sigma = near.indices[0], attention.log_sigma[head].exp()
    loud = 0.0 if stage.log_influence is None else stage.log_influence[head, indices]
    return indices, (loud - near.sq_dists[0] / (2 * sigma**2)).softmax(0)


def _links(ax, attention, stage: Stage, head: int, flat: Tensor, chosen: int, center: Tensor, plane: Tensor) -> None:
    """Lines from where the chosen entity looks to its neighbours, as thick as their share of the weight."""
    query = stage.looks[head, chosen].float()
    indices, share = neighbours(attention, stage, head, chosen)
    x, y = ((query - center) @ plane).tolist()
    if (query - stage.positions[head, chosen]).norm() > 0.1:
        ax.plot([x], [y], "+", color=ORANGE, ms=10, mew=2, zorder=5)
    for j, w in zip(indices.tolist(), share.tolist(), strict=True):
        if j != chosen:
            to = flat[j].tolist()
            ax.plot([x, to[0]], [y, to[1]], color=ORANGE, lw=0.7 + 5 * math.sqrt(w), alpha=0.4 + 0.6 * w, zorder=2)


def _plane(places: Tensor, timed: bool) -> Tensor:
    """``[D, 2]``: the two directions to show."""
    D = places.shape[-1]
    if D == 1:
        return torch.eye(1, 2)
    first = int(timed)
    rest = places[..., first:].flatten(0, 1)
    axes = torch.linalg.svd(rest - rest.mean(0), full_matrices=False).Vh
    plane = torch.zeros(D, 2)
    if timed:
        plane[0, 0], plane[1:, 1] = 1, axes[0]
    else:
        plane[:, 0] = axes[0]
        plane[:, 1] = axes[1] if len(axes) > 1 else 0
    return plane


def _choose(ids: Tensor) -> int:
    """A letter in the last quarter, so that it has much to choose from."""
    letters = [i for i in range(3 * len(ids) // 4, len(ids)) if chr(int(ids[i])).isalpha()]
    return letters[0] if letters else len(ids) - 1


def _kind(char: str) -> str:
    if char.isalpha():
        return "vowel" if char.lower() in "aeiouy" else "consonant"
    return "digit" if char.isdigit() else "space" if char.isspace() else "other"


def _visible(char: str) -> str:
    text = {" ": "\u2423", "\n": "\u21b5", "\t": "\u2192", "$": r"\$"}.get(char, char)
    return text if text.isprintable() else "?"
