"""The pictures of a run: what `dfn plot` draws."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..fields.sampler import reconstruct
from ..runs.bits import judged, text_baselines
from ..runs.digits import sample_digits
from ..runs.run import Run
from ..style import INK, SMALL, VERMILLION, bare, picture
from .drift import drift
from .studies import draw_study
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
        lines = judged_at(run.history.steps[-1], folder) or text_baselines(
            run.task.corpus.train, judged(run.task.corpus.held_out), progress=True
        )
        paths.append(folder / "drift.png")
        drift(run.model, run.task.corpus.held_out[:4096], paths[-1])
    loss_curve(
        run.history, {n: lines[n] for n in ("model", "bigram", "gzip") if n in lines}, paths[0], unit=run.task.unit
    )
    if run.options.kind == "masked" and run.options.field != "text":
        paths.append(folder / "reconstruction.png")
        reconstruction(run, paths[-1])
    if run.options.kind == "digits":
        paths.append(folder / "digits.png")
        digits(run, paths[-1])
    return paths


def judged_at(step: int, folder: Path) -> dict[str, float]:
    """The figures that the folder keeps of this step; none if it was judged at another one, or not at all."""
    path = folder / "figures.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return kept["figures"] if kept.get("step") == step else {}


@torch.no_grad()
def reconstruction(run: Run, path: Path, columns: int = 6) -> None:
    """Held-out crops with the most in them, what the model is shown, and what it makes of the hidden entities."""
    task = run.task
    generator = torch.Generator().manual_seed(2)
    values = task.crops.field(8 * columns, generator, True).values
    best = values.flatten(1, -2).var(1).mean(1).topk(columns).indices  # something must be there to see
    field = task.crops.make(values[best])
    entities = task.entities(field, generator)
    hidden = torch.rand(entities.influence.shape, generator=generator) < task.share
    found = run.model.reconstruct(entities, hidden)
    filled = entities._replace(states=torch.where(hidden[..., None], found, entities.states))
    blank = torch.where(hidden[..., None], torch.nan, entities.states)
    rebuilt = reconstruct(filled, field)
    title = f"{task.share:.0%} of the entities are hidden; the model fills them in"
    what = f"Crops of {' x '.join(map(str, field.grid))} cells, never trained on, as {hidden.shape[1]} entities each"
    with picture(path, 1.55 * columns, 7.6, title, what, colors=None) as fig:
        rows = ("the crop", "the entities that the model is shown", "and those that it fills in",
                "the crop rebuilt from them all")  # fmt: skip
        for row, (axes, note) in enumerate(zip(fig.subplots(4, columns), rows, strict=True)):
            axes[0].set_title(note).set_in_layout(False)  # wider than its column
            for i, ax in enumerate(axes):
                bare(ax)
                ax.set(xlim=(0, 1), ylim=(1, 0))
                if row in (0, 3):
                    _show(ax, (field.values if row == 0 else rebuilt)[i])
                else:
                    down, right = entities.positions[i].unbind(-1)
                    states = blank[i] if row == 1 else filled.states[i]
                    seen = states.isfinite().all(-1)
                    colors = states[seen].clamp(0, 1).expand(-1, 3).numpy()
                    ax.scatter(right[seen], down[seen], s=20, c=colors, linewidths=0, marker="s")


def write_picture(path: Path, values: torch.Tensor) -> None:
    """``[H, W, c]`` in [0, 1], as they are; a spectrogram with time to the right and low frequencies below."""
    from matplotlib.image import imsave

    upright = values if values.shape[-1] == 3 else values.transpose(0, 1).flip(0)
    imsave(path, upright.clamp(0, 1).expand(-1, -1, 3).contiguous().numpy())


def _show(ax, values: torch.Tensor) -> None:
    values = values.clamp(0, 1)
    ax.imshow(values.expand(-1, -1, 3).numpy(), extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")


@torch.no_grad()
def digits(run: Run, path: Path, shown: int = 15) -> None:
    """Held-out digits with their entities, those taken for others first, and which digit is taken for which."""
    pictures, labels = run.task.split[1]
    entities = sample_digits(pictures, run.options.entities, torch.Generator().manual_seed(1))
    said = run.model(entities).argmax(1)
    wrong = (said != labels).nonzero()[:, 0].tolist()
    chosen = (wrong + [i for i in range(len(labels)) if i not in wrong])[:shown]
    title = f"{1 - len(wrong) / len(labels):.1%} of {len(labels)} held-out digits are right"
    note = f"Dots: the {entities.influence.shape[1]} sampled pixels that the model sees"
    with picture(path, 11, 5.6, title, note) as fig:
        grid = fig.add_gridspec(1, 2, width_ratios=(1.25, 1))
        places = grid[0].subgridspec(3, shown // 3)
        for i, place in zip(chosen, places, strict=True):
            ax = fig.add_subplot(place)
            bare(ax)
            ax.imshow(pictures[i, ..., 0], cmap="gray_r", vmax=1.6, extent=(0, 1, 1, 0))
            down, across = entities.positions[i].unbind(-1)
            ax.scatter(across, down, s=22, color=VERMILLION, linewidths=0.7, edgecolors="white")
            ax.set_title(
                f"{labels[i]}, said {said[i]}" if i in wrong else f"{labels[i]}, right", pad=4, size=11
            ).set_in_layout(False)
        count = torch.bincount(labels * 10 + said, minlength=100).view(10, 10)
        ax = fig.add_subplot(grid[1])
        ax.set_title("how many of each were said to be what")
        ax.imshow(count.float().sqrt(), cmap="Blues")
        for i in range(10):
            for j in range(10):
                if count[i, j]:
                    dark = count[i, j] > 0.3 * count.max()
                    ax.text(j, i, int(count[i, j]), ha="center", va="center", size=SMALL,
                            color="white" if dark else INK, gid="mark")  # fmt: skip
        ax.set(xticks=range(10), yticks=range(10), xlabel="what the model says", ylabel="the digit")
