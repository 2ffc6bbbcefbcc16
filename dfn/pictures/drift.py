"""Entities on their way through a model."""

import math
from pathlib import Path

import torch
from torch import Tensor

from dfn_kernels import knn

from ..models.language import DFNLanguageModel
from .style import INK, ORANGE, SOFT, pyplot, style_axes

COLORS = {"letter": "#2f6fde", "digit": "#c77d0a", "space": "#8d95a8", "other": "#d6336c"}


@torch.no_grad()
def trace(model: DFNLanguageModel, ids: Tensor) -> list[Tensor]:
    """Where the entities of ``ids [1, N]`` are before the first block and after each: ``[H, N, D]`` each."""
    states = model.embed(ids)
    positions = model.positions(states)
    steps = [positions[0]]
    for block in model.blocks:
        states, positions = block(states, positions)
        steps.append(positions[0])
    return steps


def drift(model: DFNLanguageModel, text: Tensor, path: Path, length: int = 64) -> None:
    """A line of text as entities, layer by layer, in a semantic and a temporal head, with one entity's neighbours.

    Each entity is drawn as its character. A trace leads to where it was before the layer. Lines lead from the chosen
    entity, from where it looks, to its neighbours, as thick as their weight. Semantic positions are shown in the plane
    of their largest variance, temporal ones as time and the direction of the largest variance beside it.
    """
    plt = pyplot()
    from matplotlib.collections import LineCollection

    raw = bytes(text.tolist())
    start = max(raw.find(b"\n    ", len(raw) // 4), 0) + 1
    ids = torch.tensor(list(raw[start : start + length]))
    chosen = _choose(ids)
    steps = trace(model, ids[None].long())
    H, semantic = steps[0].shape[0], model.positions.semantic
    heads = ([0] if semantic else []) + ([H // 2] if H > semantic else [])
    fig, axes = plt.subplots(
        len(heads), len(steps), figsize=(4.1 * len(steps), 4.0 * len(heads) + 0.9), dpi=130, squeeze=False
    )
    for row, h in zip(axes, heads, strict=True):
        timed = h >= semantic
        places = torch.stack([p[h] for p in steps]).float()  # [layers + 1, N, D]
        plane = _plane(places, timed)
        flat = (places - places.mean((0, 1))) @ plane
        for layer, ax in enumerate(row):
            what = "temporal" if timed else "semantic"
            place = "at the start" if layer == 0 else f"after layer {layer}"
            style_axes(ax, f"{what} head {h}, {place}")
            ax.set_xticks([])
            ax.set_yticks([])
            here = flat[layer]
            if layer:
                _links(ax, model, layer - 1, h, places[layer], flat[layer], chosen, places.mean((0, 1)), plane)
                moves = torch.stack([flat[layer - 1], here], 1).tolist()
                ax.add_collection(LineCollection(moves, color="#9fb4dd", linewidth=0.7, alpha=0.55, zorder=1))
            for i, (x, y) in enumerate(here.tolist()):
                char = bytes([int(ids[i])]).decode("latin-1")
                ax.text(x, y, _visible(char), color=COLORS[_kind(char)], fontsize=9, ha="center", va="center", zorder=4,
                        family="monospace", fontweight="bold" if i == chosen else "normal")  # fmt: skip
            ax.plot(*here[chosen].tolist(), "o", ms=17, mfc="none", mec=ORANGE, mew=1.6, zorder=5)
            seen = torch.cat([here, flat[layer - 1]]) if layer else here
            low, high = seen.amin(0), seen.amax(0)
            pad = 0.08 * (high - low).clamp(min=1e-3)
            (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
            ax.set(xlim=(left, right), ylim=(bottom, top))
            if timed:
                ax.set_xlabel("time", color=SOFT, fontsize=8)
    line = bytes(ids.tolist()).decode("latin-1").replace("\n", "\u21b5").replace("$", r"\$")
    height = fig.get_figheight()
    fig.text(
        0.01,
        1 - 0.12 / height,
        "Entities drifting through the layers",
        fontsize=15,
        color=INK,
        va="top",
        fontweight="bold",
    )
    fig.text(0.01, 1 - 0.45 / height, "one for every character of:", fontsize=10, color=SOFT, va="top")
    fig.text(
        0.01 + 1.85 / fig.get_figwidth(), 1 - 0.45 / height, line, fontsize=10, color=INK, va="top", family="monospace"
    )
    notes = ((ORANGE, "lines: from where the circled entity looks (+) to those it reads, as thick as their weight"),
             ("#6f8cc9", "traces: the way that the layer moved each entity"))  # fmt: skip
    for i, (color, note) in enumerate(notes):
        fig.text(0.99, 1 - (0.16 + 0.27 * i) / height, note, fontsize=10, color=color, va="top", ha="right")
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.75 / height))
    fig.savefig(path)
    plt.close(fig)


def _links(
    ax, model, layer: int, head: int, places: Tensor, flat: Tensor, chosen: int, center: Tensor, plane: Tensor
) -> None:
    """Lines from where the chosen entity looks to its neighbours, as thick as their share of the weight."""
    attention = model.blocks[layer].attention
    query = places[chosen] + attention.offset[head]
    k = min(attention.k, chosen + 1)
    near = knn(places[: chosen + 1].contiguous(), k, queries=query[None].contiguous())
    sigma = attention.log_sigma[head].exp()
    share = (-near.sq_dists[0] / (2 * sigma**2)).softmax(0)
    x, y = ((query - center) @ plane).tolist()
    if (query - places[chosen]).norm() > 0.1:
        ax.plot([x], [y], "+", color=ORANGE, markersize=9, zorder=5)
    for j, w in zip(near.indices[0].tolist(), share.tolist(), strict=True):
        if j != chosen:
            to = flat[j].tolist()
            ax.plot([x, to[0]], [y, to[1]], color=ORANGE, lw=0.5 + 5 * math.sqrt(w), alpha=0.25 + 0.6 * w, zorder=2)


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
    return "letter" if char.isalpha() else "digit" if char.isdigit() else "space" if char.isspace() else "other"


def _visible(char: str) -> str:
    text = {" ": "\u2423", "\n": "\u21b5", "\t": "\u2192", "$": r"\$"}.get(char, char)
    return text if text.isprintable() else "?"
