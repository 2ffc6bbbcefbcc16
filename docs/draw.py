"""The pictures of these pages, drawn with the ops and models themselves: `python docs/draw.py [NAME ..]`.

Without names all of them; `python docs/draw.py drift` makes the animation, which trains a model for that.
"""

import argparse
import math
from pathlib import Path

import torch

import dfn_kernels as dk
from dfn.pictures.animation import animate, record
from dfn.pictures.fields import entities_picture
from dfn.style import BLUE, EDGE, OURS, SMALL, SOFT, THICK, THIN, VERMILLION, bare, label_ends, picture

HERE = Path(__file__).parent


def two_clusters(n: int) -> torch.Tensor:
    return torch.cat([torch.rand(n // 2, 2), torch.tensor([0.72, 0.35]) + 0.05 * torch.randn(n - n // 2, 2)])


def knn(path: Path) -> None:
    points = two_clusters(600)
    queries = torch.tensor([[0.62, 0.36], [0.3, 0.7]])
    near = dk.knn(points, 12, queries=queries)
    note = "A grid fails where points crowd; slabs hold equally many. Circles: how far the 12 neighbours reach"
    with picture(path, 11, 4.7, "knn: the k nearest, exactly", note) as figure:
        axes = figure.subplots(1, 3)
        for axis, title in zip(axes, ("a uniform grid", "slabs of equal depth", "k = 12 neighbours"), strict=True):
            bare(axis)
            axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
            axis.scatter(*points.T, s=7, color=EDGE if title.startswith("k") else SOFT, linewidths=0)
        for line in torch.linspace(0, 1, 9):
            axes[0].axvline(line, color=BLUE, lw=0.9)
            axes[0].axhline(line, color=BLUE, lw=0.9)
        for cut in points[:, 0].quantile(torch.linspace(0, 1, 17)):
            axes[1].axvline(cut, color=BLUE, lw=0.9)
        for query, found, sq_dists in zip(queries, near.indices, near.sq_dists, strict=True):
            circle = dict(fill=False, color=VERMILLION, lw=1.6)
            axes[2].add_patch(_circle(query.tolist(), sq_dists[-1].sqrt().item(), **circle))
            axes[2].scatter(*points[found].T, s=18, color=BLUE)
        axes[2].scatter(*queries.T, s=60, marker="x", color=VERMILLION, linewidths=2)
        axes[2].set_xlabel("cross: the query, blue: its neighbours", size=SMALL)


def _circle(center: list[float], radius: float, **options):
    from matplotlib.patches import Circle

    return Circle(center, radius, **options)


def gaussian_gather(path: Path) -> None:
    t = torch.cat([torch.rand(60) * 0.5, 0.5 + torch.rand(15) * 0.5]).sort().values.unsqueeze(-1)
    values = torch.sin(2 * math.pi * 1.5 * t) + 0.3 * torch.randn_like(t)
    queries = torch.linspace(0, 1, 400).unsqueeze(-1)
    near = dk.knn(t, 12, queries=queries).indices
    note = "Dots: entities, a value at a position. Lines: the weighted mean of the nearest 12, everywhere"
    with picture(path, 11, 4.3, "gaussian_gather: read from the nearest entities", note) as figure:
        axis = figure.add_subplot()
        axis.scatter(t, values, s=24, color=SOFT, linewidths=0)
        lines = []
        for sigma, color, width in ((0.01, VERMILLION, 1.8), (0.04, OURS, THICK)):
            y = dk.gaussian_gather(t, values, near, sigma, query_positions=queries, normalize=True)
            (line,) = axis.plot(queries[:, 0], y[:, 0], color=color, lw=width)
            lines.append((line, f"sigma = {sigma}"))
        axis.set(xlim=(-0.01, 1.01), xlabel="position", ylabel="value")
        label_ends(axis, lines)


def flow_drift(path: Path) -> None:
    positions = torch.rand(1, 150, 2)
    around = positions - 0.5  # a state that makes the flow a vortex with a pull inwards
    drift = dk.flow_drift(around, positions, torch.tensor([[-0.5, -1.0], [1.0, -0.5]]), alpha=0.15)
    with picture(
        path, 6.4, 6, "flow_drift: p' = p + alpha W s", "Dot: an entity; arrow: where its state moves it"
    ) as figure:
        axis = figure.add_subplot()
        bare(axis)
        axis.scatter(*positions[0].T, s=18, color=SOFT, linewidths=0)
        step = drift.positions - positions
        axis.quiver(*positions[0].T, *step[0].T, angles="xy", scale_units="xy", scale=1, color=BLUE, width=0.005)
        axis.set_aspect("equal")


def flow_norm(path: Path) -> None:
    n = torch.arange(120)
    energy = 0.2 + 2.5 * torch.exp(-(((n - 45) / 7.0) ** 2)) + 0.15 * torch.rand(120)
    ones = torch.ones(1, 120, 1)
    note = "Grey: the energy |f|^2 of each entity's flow. Lines: what a state of 1 becomes"
    with picture(path, 11, 4.3, "flow_norm: entities that move fast speak softly", note) as figure:
        axis = figure.add_subplot()
        axis.fill_between(n, energy, color=EDGE, alpha=0.5, lw=0)
        lines = []
        for mode, color, width in (("mean", SOFT, THIN), ("entity", VERMILLION, THIN), ("causal", OURS, THICK)):
            y = dk.flow_norm(ones, energy[None], eps=0.1, mode=mode)
            (line,) = axis.plot(n, y[0, :, 0], color=color, lw=width)
            lines.append((line, f'"{mode}"'))
        axis.set(xlim=(0, 119), ylim=(0, 3), xlabel="entity", ylabel="energy, state")
        label_ends(axis, lines)


def short_convolution(path: Path) -> None:
    n = torch.arange(60)
    x = torch.zeros(60, 2)
    x[[6, 24, 27, 42, 43, 44], :] = torch.tensor([1.0, 1.0, 0.6, 0.8, 0.8, 0.8])[:, None]
    taps = torch.tensor([[1.0, 0.0], [0.7, 0.0], [0.4, 0.0], [0.2, 1.0]])
    y = dk.short_convolution(x, taps)
    note = "Grey: a channel of the entities. Lines: what two channels with other weights make of it"
    with picture(path, 11, 4.3, "short_convolution: each entity and the three before it", note) as figure:
        axis = figure.add_subplot()
        axis.bar(n, x[:, 0], width=0.8, color=EDGE, alpha=0.7)
        lines = []
        for channel, (said, color, width) in enumerate((("c = (1, .7, .4, .2)", OURS, THICK),
                                                        ("c = (0, 0, 0, 1)", VERMILLION, THIN))):  # fmt: skip
            (line,) = axis.plot(n, y[:, channel], color=color, lw=width, drawstyle="steps-mid")
            lines.append((line, said))
        axis.set(xlim=(0, 59), ylim=(0, 2.2), xlabel="entity", ylabel="value")
        label_ends(axis, lines)


def flow_attention(path: Path) -> None:
    N, k, sigma, asking = 160, 12, 0.05, 7
    positions = torch.rand(N, 2)
    around = positions - 0.5
    flow = torch.tensor([[-0.3, -0.8], [0.8, -0.3]])
    _, drift, near = dk.flow_attention(around, positions, flow, torch.ones(N, 1), sigma, k, alpha=0.2, normalize=True)
    weights = torch.exp(-near.sq_dists / (2 * sigma**2))
    note = f"All drift; then each reads from its {k} nearest, the nearer the more (width of the lines)"
    with picture(path, 11, 5.6, "flow_attention: drift, look around, read", note) as figure:
        left, right = figure.subplots(1, 2)
        for axis, title in ((left, "where they were, and where they drift"), (right, "what one of them reads there")):
            bare(axis)
            axis.set(title=title, aspect="equal", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        left.scatter(*positions.T, s=18, color=SOFT, linewidths=0)
        step = drift.positions - positions
        left.quiver(*positions.T, *step.T, angles="xy", scale_units="xy", scale=1, color=BLUE, width=0.005)
        moved, here = drift.positions, drift.positions[asking]
        right.scatter(*moved.T, s=18, color=SOFT, linewidths=0)
        for j, w in zip(near.indices[asking], weights[asking], strict=True):
            right.plot(*torch.stack([here, moved[j]]).T, color=BLUE, lw=0.4 + 6 * w.item(), solid_capstyle="round")
        right.scatter(*moved[near.indices[asking]].T, s=26, color=BLUE, zorder=3)
        right.scatter(*here, s=90, marker="x", color=VERMILLION, linewidths=2.4, zorder=4)
        left.scatter(*positions[asking], s=90, marker="x", color=VERMILLION, linewidths=2.4, zorder=4)
        right.set_xlabel("cross: the one that reads, blue: from whom", size=SMALL)


def pattern_route(path: Path) -> None:
    P, O, I = 4, 10, 14
    patterns = torch.randn(P, O, I)
    weights = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.1, 0.1, 0.8]])
    note = "A row is a token: by its weights w it mixes the four patterns into a matrix of its own (blue +, red -)"
    with picture(path, 11, 4.6, "pattern_route: a matrix for every token, none of them built", note) as figure:
        axes = figure.subplots(2, P + 2, width_ratios=[1] * P + [0.85, 1.15])
        for t in range(2):
            shown = dict(cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto")
            for p in range(P):
                bare(axes[t, p])
                axes[t, p].imshow(patterns[p], alpha=0.12 + 0.88 * weights[t, p].item(), **shown)
                axes[t, p].set_title(f"pattern {p}" if t == 0 else "")
                axes[t, p].set_xlabel(f"w = {weights[t, p]:.1f}")
            axes[t, P].bar(range(P), weights[t], color=BLUE)
            axes[t, P].set(xticks=range(P), yticks=[], ylim=(0, 1), xlabel="pattern")
            axes[t, P].spines["left"].set_visible(False)
            bare(axes[t, P + 1])
            axes[t, P + 1].imshow(torch.einsum("p,poi->oi", weights[t], patterns), **shown)
            axes[t, P + 1].set_xlabel(f"of token {t}")
        axes[0, P].set_title("w")
        axes[0, P + 1].set_title("their mixture")


def low_rank_route(path: Path) -> None:
    P, O, I, r = 2, 24, 32, 3
    up, down = torch.randn(P, O, r), torch.randn(P, r, I)
    size = f"{P} patterns of {O} x {I} from {P * r * (O + I)} numbers instead of {P * O * I:,}"
    with picture(path, 11, 3.6, "low_rank_route: each pattern is a product of two thin matrices", size) as figure:
        axes = figure.subplots(1, 3 * P, width_ratios=[O / 3, I, I] * P)
        for p in range(P):
            shown = dict(cmap="RdBu", vmin=-3, vmax=3)
            for axis, matrix, said in zip(axes[3 * p :], (up[p], down[p], up[p] @ down[p]), ("up", "down", "pattern"),
                                          strict=False):  # fmt: skip
                bare(axis)
                axis.imshow(matrix, **shown)
                axis.set_title(f"{said} {p}", size=SMALL)
                axis.set_xlabel(" x ".join(map(str, matrix.shape)), size=SMALL)


def field_sample(path: Path) -> None:
    cells = torch.linspace(0, 1, 400)
    bump = lambda at, width: torch.exp(-(((cells - at) / width) ** 2))  # noqa: E731
    density = (0.1 + bump(0.3, 0.05) + 0.6 * bump(0.75, 0.1)).unsqueeze(0)
    positions, influence = dk.field_sample(density, 70, generator=torch.Generator().manual_seed(0))
    note = "Dots: entities, as large as their influence. They lie close where the density (grey) is high"
    with picture(path, 11, 3.9, "field_sample: more entities where there is more to know", note) as figure:
        axis = figure.add_subplot()
        axis.fill_between(cells, density[0], color=EDGE, alpha=0.5, lw=0)
        axis.scatter(positions[0, :, 0], torch.full((70,), -0.08), s=26 * influence[0], color=VERMILLION, linewidths=0)
        axis.set(xlim=(0, 1), ylim=(-0.16, 1.15), yticks=[0, 0.5, 1], xlabel="position", ylabel="density")


OPS = (
    knn, gaussian_gather, flow_drift, flow_norm, short_convolution, flow_attention, pattern_route, low_rank_route,
    field_sample,
)  # fmt: skip
PICTURES = {
    **{f"{op.__name__}.png": op for op in OPS},
    "entities.png": entities_picture,
    "drift.gif": lambda path: animate(record(), path),
}
NAMES = {file.split(".")[0]: file for file in PICTURES}


def main(argv: list[str] | None = None, folder: Path = HERE) -> None:
    """Draws the pictures into ``folder``, each with the same numbers whether alone or with others."""
    parser = argparse.ArgumentParser(prog="python docs/draw.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    names = parser.parse_args(argv).names
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {unknown[0]}")
    for file in [NAMES[name] for name in names] or PICTURES:
        torch.manual_seed(0)
        PICTURES[file](folder / file)
        print(folder / file)


if __name__ == "__main__":
    main()
