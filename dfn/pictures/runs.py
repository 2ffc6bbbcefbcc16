"""The pictures of a run: what `dfn plot` draws."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..fields.sampler import reconstruct
from ..runs.bits import judged, text_baselines
from ..runs.digits import sample_digits
from ..runs.run import Run
from .drift import drift
from .studies import draw_study
from .style import GRID, INK, ORANGE, SOFT, pyplot, style_axes
from .training import loss_curve


def draw(folder: Path, say: Callable[[str], object] = print) -> list[Path]:
    """Draws the pictures of a run, or of a study, into its folder and returns their paths."""
    folder = Path(folder)
    if (folder / "study.json").exists():
        found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        return [draw_study(found, folder / "study.png")]
    run = Run.load(folder, say)
    run.model.cpu()
    paths = [folder / "loss_curve.png"]
    lines = {}
    if run.options.kind == "text":
        lines = text_baselines(run.task.corpus.train, judged(run.task.corpus.held_out), progress=True)
        paths.append(folder / "drift.png")
        drift(run.model, run.task.corpus.held_out[:4096], paths[-1])
    loss_curve(run.history, {n: lines[n] for n in ("bigram", "gzip") if n in lines}, paths[0], unit=run.task.unit)
    if run.options.kind == "masked" and run.options.field != "text":
        paths.append(folder / "reconstruction.png")
        reconstruction(run, paths[-1])
    if run.options.kind == "digits":
        paths.append(folder / "digits.png")
        digits(run, paths[-1])
    return paths


@torch.no_grad()
def reconstruction(run: Run, path: Path, columns: int = 8) -> None:
    """Held-out crops with the most in them, what the model is shown, and what it makes of the hidden entities."""
    plt, task = pyplot(), run.task
    generator = torch.Generator().manual_seed(2)
    values = task.crops.field(8 * columns, generator, True).values
    best = values.flatten(1, -2).var(1).mean(1).topk(columns).indices  # something must be there to see
    field = task.crops.make(values[best])
    entities = task.entities(field, generator)
    hidden = torch.rand(entities.influence.shape, generator=generator) < task.share
    found = run.model.reconstruct(entities, hidden)
    filled = entities._replace(states=torch.where(hidden[..., None], found, entities.states))
    blank = torch.where(hidden[..., None], torch.nan, entities.states)
    fig, axes = plt.subplots(4, columns, figsize=(1.45 * columns, 6.6), dpi=130)
    notes = ("the crop", "sampled and shown", "with what the model says", "rebuilt from those")
    rebuilt = reconstruct(filled, field)
    for row, (axs, note) in enumerate(zip(axes, notes, strict=True)):
        for i, ax in enumerate(axs):
            ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
            for side in ax.spines.values():
                side.set_color(GRID)
            if row in (0, 3):
                _show(ax, (field.values if row == 0 else rebuilt)[i])
            else:
                down, right = entities.positions[i].unbind(-1)
                states = (blank if row == 1 else filled).states[i] if row == 2 else blank[i]
                seen = states.isfinite().all(-1)
                colors = states[seen].clamp(0, 1).expand(-1, 3).numpy()
                ax.scatter(right[seen], down[seen], s=14, c=colors, linewidths=0, marker="s")
            if i == 0:
                ax.set_title(note, loc="left", fontsize=9.5, color=INK, pad=4)
    fig.suptitle(f"{task.share:.0%} of the entities hidden, held-out crops", x=0.01, ha="left", fontsize=13, color=INK,
                 fontweight="bold")  # fmt: skip
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def write_picture(path: Path, values: torch.Tensor) -> None:
    """``[H, W, c]`` in [0, 1], as they are; a spectrogram with time to the right and low frequencies below."""
    upright = values if values.shape[-1] == 3 else values.transpose(0, 1).flip(0)
    pyplot().imsave(path, upright.clamp(0, 1).expand(-1, -1, 3).contiguous().numpy())


def _show(ax, values: torch.Tensor) -> None:
    values = values.clamp(0, 1)
    ax.imshow(values.expand(-1, -1, 3).numpy(), extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")


@torch.no_grad()
def digits(run: Run, path: Path) -> None:
    """Held-out digits with their entities, and which digit is taken for which."""
    plt = pyplot()
    pictures, labels = run.task.split[1]
    entities = sample_digits(pictures, run.options.entities, torch.Generator().manual_seed(1))
    said = run.model(entities).argmax(1)
    wrong = (said != labels).nonzero()[:, 0].tolist()
    chosen = (wrong + [i for i in range(len(labels)) if i not in wrong])[:18]
    fig = plt.figure(figsize=(12, 4.6), dpi=130)
    left, right = fig.subfigures(1, 2, width_ratios=(1.7, 1))
    axes = left.subplots(3, 6, gridspec_kw=dict(left=0.02, right=0.98, top=0.92, bottom=0.03, hspace=0.25))
    for i, ax in zip(chosen, axes.flat, strict=True):
        ax.imshow(pictures[i, ..., 0], cmap="gray_r", extent=(0, 1, 1, 0))
        down, across = entities.positions[i].unbind(-1)
        ax.scatter(across, down, s=9, color=ORANGE, linewidths=0)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{labels[i]}" + (f", said {said[i]}" if i in wrong else ""), fontsize=9, pad=3,
                     color=ORANGE if i in wrong else INK)  # fmt: skip
        for side in ax.spines.values():
            side.set_color(GRID)
    count = torch.bincount(labels * 10 + said, minlength=100).view(10, 10)
    ax = right.subplots()
    style_axes(ax, f"{1 - len(wrong) / len(labels):.1%} of {len(labels)} held-out digits right")
    ax.imshow(count.float().sqrt(), cmap="Blues")
    for i in range(10):
        for j in range(10):
            if count[i, j]:
                color = "white" if count[i, j] > 9 else INK
                ax.text(j, i, int(count[i, j]), ha="center", va="center", fontsize=7.5, color=color)
    ax.set(xticks=range(10), yticks=range(10))
    ax.set_xlabel("said", color=SOFT, fontsize=9)
    ax.set_ylabel("is", color=SOFT, fontsize=9)
    fig.savefig(path)
    plt.close(fig)
