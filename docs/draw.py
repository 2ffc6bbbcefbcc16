"""The pictures of docs/ops.md, drawn with the ops themselves: `python docs/draw.py`."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import dfn_kernels as dk

HERE = Path(__file__).parent
BLUE, ORANGE, GREY = "#1b6e8c", "#d9622b", "#c4c4c4"


def save(figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=110)
    plt.close(figure)


def plain(axis, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])


def two_clusters(n: int) -> torch.Tensor:
    return torch.cat([torch.rand(n // 2, 2), torch.tensor([0.72, 0.35]) + 0.05 * torch.randn(n - n // 2, 2)])


def knn() -> None:
    points = two_clusters(600)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, title in zip(axes, ("a uniform grid", "slabs of equal depth", "k = 12 neighbours"), strict=True):
        axis.scatter(*points.T, s=5, color=GREY if title.startswith("k") else "#888888", linewidths=0)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        plain(axis, title)
    for line in torch.linspace(0, 1, 9):
        axes[0].axvline(line, color=BLUE, lw=0.6)
        axes[0].axhline(line, color=BLUE, lw=0.6)
    for cut in points[:, 0].quantile(torch.linspace(0, 1, 17)):
        axes[1].axvline(cut, color=BLUE, lw=0.8)
    queries = torch.tensor([[0.62, 0.36], [0.3, 0.7]])
    near = dk.knn(points, 12, queries=queries)
    for query, found, sq_dists in zip(queries, near.indices, near.sq_dists, strict=True):
        axes[2].add_patch(plt.Circle(query.tolist(), sq_dists[-1].sqrt().item(), fill=False, color=ORANGE))
        axes[2].scatter(*points[found].T, s=12, color=BLUE)
    axes[2].scatter(*queries.T, s=30, marker="x", color=ORANGE)
    save(figure, "knn")


def gaussian_gather() -> None:
    t = torch.cat([torch.rand(60) * 0.5, 0.5 + torch.rand(15) * 0.5]).sort().values.unsqueeze(-1)
    values = torch.sin(2 * math.pi * 1.5 * t) + 0.3 * torch.randn_like(t)
    queries = torch.linspace(0, 1, 400).unsqueeze(-1)
    near = dk.knn(t, 12, queries=queries).indices
    figure, axis = plt.subplots(figsize=(12, 3.2), layout="constrained")
    axis.scatter(t, values, s=14, color=GREY, label="entities: position, value")
    for sigma, color in ((0.01, ORANGE), (0.04, BLUE)):
        y = dk.gaussian_gather(t, values, near, sigma, query_positions=queries, normalize=True)
        axis.plot(queries, y, color=color, lw=1.6, label=f"gathered, normalised, sigma = {sigma}")
    axis.legend(fontsize=8)
    plain(axis, "gaussian_gather: every query reads its 12 nearest entities")
    save(figure, "gaussian_gather")


def flow_drift() -> None:
    positions = torch.rand(1, 150, 2)
    around = positions - 0.5  # a state that makes the flow a vortex with a pull inwards
    drift = dk.flow_drift(around, positions, torch.tensor([[-0.5, -1.0], [1.0, -0.5]]), alpha=0.15)
    figure, axis = plt.subplots(figsize=(4.4, 4.2), layout="constrained")
    axis.scatter(*positions[0].T, s=8, color=GREY)
    step = drift.positions - positions
    axis.quiver(*positions[0].T, *step[0].T, angles="xy", scale_units="xy", scale=1, color=BLUE, width=0.004)
    axis.set_aspect("equal")
    plain(axis, "flow_drift: p' = p + alpha W s")
    save(figure, "flow_drift")


def pattern_route() -> None:
    P, O, I = 4, 10, 14
    patterns = torch.randn(P, O, I)
    weights = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.1, 0.1, 0.8]])
    figure, axes = plt.subplots(2, P + 2, figsize=(12, 4), layout="constrained", width_ratios=[1] * P + [0.9, 1.2])
    for t in range(2):
        for p in range(P):
            axes[t, p].imshow(patterns[p], cmap="RdBu", vmin=-2.5, vmax=2.5, alpha=0.15 + 0.85 * weights[t, p].item())
            plain(axes[t, p], f"pattern {p}, w = {weights[t, p]:.1f}")
        axes[t, P].bar(range(P), weights[t], color=BLUE)
        plain(axes[t, P], f"weights of token {t}")
        axes[t, P + 1].imshow(torch.einsum("p,poi->oi", weights[t], patterns), cmap="RdBu", vmin=-2.5, vmax=2.5)
        plain(axes[t, P + 1], "its matrix: never built")
    save(figure, "pattern_route")


def field_sample() -> None:
    cells = torch.linspace(0, 1, 400)
    bump = lambda at, width: torch.exp(-(((cells - at) / width) ** 2))  # noqa: E731
    density = (0.1 + bump(0.3, 0.05) + 0.6 * bump(0.75, 0.1)).unsqueeze(0)
    positions, influence = dk.field_sample(density, 70, generator=torch.Generator().manual_seed(0))
    figure, axis = plt.subplots(figsize=(12, 2.6), layout="constrained")
    axis.fill_between(cells, density[0], color=BLUE, alpha=0.2, lw=0)
    axis.scatter(positions[0, :, 0], torch.zeros(70), s=12 * influence[0], color=ORANGE)
    plain(axis, "field_sample: more entities where the density is high, each with less influence")
    save(figure, "field_sample")


if __name__ == "__main__":
    torch.manual_seed(0)
    for draw in (knn, gaussian_gather, flow_drift, pattern_route, field_sample):
        draw()
