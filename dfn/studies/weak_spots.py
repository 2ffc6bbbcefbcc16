"""Weak spots: digits as 64 tokens, one a pixel, beside self-attention; and copying what was said, over a distance.

``python -m dfn.studies.weak_spots``. Every line changes one thing, so that the table says which thing is the cause.
Both tasks are small: what counts is the difference between lines. The pictures are scikit-learn's.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.language import DFNLanguageModel
from ..models.layers import DynamicFlowAttention, FlowMixer
from ..runs.digits import digits
from ..runs.options import Options, UsageError
from ..runs.tasks import Task
from ..training.batches import generator_for
from ..training.checkpoints import write_whole
from ..training.losses import language_modelling
from . import one_head
from .cells import Study, asked, markdown, options_of, positive, spread, where

TASKS = {"digits": "digits, % right held out", "copy": "copy, nats of what can be known"}
HEAD_STEPS = 1500
DIGITS = dict(steps=440, batch=16, dim=32, layers=2, heads=4, pos_dim=3, k=16, lr=6e-3, warmup=50)
COPY = dict(steps=500, batch=32, dim=32, layers=1, heads=4, pos_dim=8, k=16, lr=3e-3, warmup=50, length=12)
SYMBOLS = 16  # of the copy
GRID = (8, 8)


# ---- what a line changes in a mixer or a block's attention -----------------------------------------------------------
def shared_map(attention: DynamicFlowAttention, places: nn.Module) -> DynamicFlowAttention:
    """As it was before 26 November 2026: an entity looks for others where it is itself, and all weigh the same."""
    attention.receiver = attention.salience = None
    return attention


def scaled(*, positions: float = 1.0, sigma: float = 1.0) -> Callable:
    """Positions and widths at the start times a factor."""

    @torch.no_grad()
    def change(attention: DynamicFlowAttention, places: nn.Module) -> DynamicFlowAttention:
        places.place.weight *= positions
        attention.log_sigma += torch.tensor(sigma).log()
        return attention

    return change


def looks_back(distance: float) -> Callable:
    """The head that looks at the previous entity begins so far back instead."""

    @torch.no_grad()
    def change(attention: DynamicFlowAttention, places: nn.Module) -> DynamicFlowAttention:
        attention.offset[-1, 0] = -distance
        return attention

    return change


# ---- digits ---------------------------------------------------------------------------------------------------------
class PixelClassifier(nn.Module):
    """A Transformer encoder of pixels ``[B, 64, 1]``; a mixer takes the place of its attention unless that is None."""

    def __init__(self, options: Options, mixer: Callable[[], nn.Module] | None, places: bool):
        super().__init__()
        o = options
        self.embed = nn.Linear(1, o.dim)
        self.places = nn.Parameter(0.5 * torch.randn(64, o.dim)) if places else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(o.dim, o.heads, 2 * o.dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(o.layers)
        )
        for layer in self.layers if mixer else ():
            layer.self_attn = mixer()
        self.norm, self.head = nn.LayerNorm(o.dim), nn.Linear(o.dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x if self.places is None else x + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class PixelCNN(nn.Sequential):
    """What one would take for such pictures, ``[B, 64, 1]``: two convolutions of 3 x 3, with as many weights."""

    def __init__(self, channels: int = 32):
        super().__init__(
            nn.Unflatten(1, (1, *GRID)), nn.Flatten(-2),
            nn.Conv2d(1, channels, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(2 * channels, 10),
        )  # fmt: skip


class Pixels(Task):
    """``held_out_loss`` is the share of the held-out digits that are told."""

    def __init__(self, options: Options, line: dict):
        super().__init__(options)
        self.line, self.split = line, digits()

    def model(self) -> nn.Module:
        o, line = self.options, self.line

        def mixer() -> FlowMixer:
            one = FlowMixer(o.dim, o.heads, o.k, causal=False, pos_dim=o.pos_dim, grid=line.get("grid"))
            if change := line.get("change"):
                one.attention = change(one.attention, one.positions)
            return one

        if line.get("cnn"):
            return PixelCNN()
        return PixelClassifier(o, None if line.get("attention") else mixer, line.get("places", True))

    def batch(self, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        pictures, labels = self.split[held_out]
        chosen = torch.randint(len(pictures), (self.options.batch,), generator=generator)
        return pictures[chosen].flatten(1, 2), labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, batches: int = 0) -> float:
        pictures, labels = self.split[1]
        return (model(pictures.flatten(1, 2)).argmax(1) == labels).float().mean().item()


# ---- copying --------------------------------------------------------------------------------------------------------
class Copies(Task):
    """Random symbols said twice; ``held_out_loss`` is the loss where the symbol can be known: in the second half.

    With ``vary`` the half is longer or shorter by up to so many symbols, so that no fixed distance serves.
    """

    partial = False

    def __init__(self, options: Options, line: dict):
        super().__init__(options)
        self.line, self.vary = line, line.get("vary", 0)

    def model(self) -> nn.Module:
        o = self.options
        model = DFNLanguageModel(SYMBOLS, o.dim, o.layers, o.heads, o.pos_dim, o.k)
        for block in model.blocks if (change := self.line.get("change")) else ():
            block.attention = change(block.attention, model.positions)
        return model

    def batch(self, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        o = self.options
        half = o.length + int(torch.randint(-self.vary, self.vary + 1, (), generator=generator))
        said = torch.randint(SYMBOLS, (o.batch, half), generator=generator)
        ids = torch.cat([said, said], 1)
        return ids[:, :-1], ids[:, 1:]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return language_modelling(model(batch[0])[0], batch[1])

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, batches: int = 8) -> float:
        generator, losses = generator_for("held out", self.options.seed), []
        for _ in range(batches):
            ids, targets = self.batch(generator)
            second = ids.shape[1] // 2
            losses.append(language_modelling(model(ids)[0][:, second:], targets[:, second:]))
        return torch.stack(losses).mean().item()


# ---- lines: what is said of them, and what they change ---------------------------------------------------------------
LINES: dict[str, dict[str, tuple[str, dict]]] = {
    "digits": {
        "attention": ("self-attention", dict(attention=True)),
        "attention-placeless": ("self-attention without position embeddings", dict(attention=True, places=False)),
        "cnn": ("a CNN of two layers", dict(cnn=True)),
        "mixer": ("FlowMixer", {}),
        "placeless": ("without position embeddings", dict(places=False)),
        "k32": ("k = 32", dict(k=32)),
        "k64": ("k = 64, all pixels", dict(k=64)),
        "grid": ("grid = (8, 8)", dict(grid=GRID)),
        "grid-k32": ("grid, k = 32", dict(grid=GRID, k=32)),
        "grid-k64": ("grid, k = 64", dict(grid=GRID, k=64)),
        "grid-placeless": ("grid, without position embeddings", dict(grid=GRID, places=False)),
        "positions": ("positions 10 times as far apart at the start", dict(change=scaled(positions=10))),
        "narrow": ("half the sigma at the start", dict(change=scaled(sigma=0.5))),
        "wide": ("twice the sigma at the start", dict(change=scaled(sigma=2))),
        "shared": ("sender and receiver share one map", dict(change=shared_map)),
        "shared-k64": ("that, k = 64", dict(change=shared_map, k=64)),
        "shared-grid": ("that, grid", dict(change=shared_map, grid=GRID)),
        "geometry": ("the heads' geometry learns 10 times as fast", dict(geometry_rate=10.0)),
        "grid-geometry": ("that, grid", dict(grid=GRID, geometry_rate=10.0)),
        "slow": ("learning rate 3e-3", dict(lr=3e-3)),
        "attention-slow": ("self-attention, learning rate 3e-3", dict(attention=True, lr=3e-3)),
    },
    "copy": {
        "copy": ("12 symbols", {}),
        "geometry": ("the heads' geometry learns 10 times as fast", dict(geometry_rate=10.0)),
        "geometry3": ("3 times as fast", dict(geometry_rate=3.0)),
        "fast": ("learning rate 6e-3", dict(lr=6e-3)),
        "k32": ("k = 32", dict(k=32)),
        "positions": ("positions 10 times as far apart at the start", dict(change=scaled(positions=10))),
        "wide": ("twice the sigma at the start", dict(change=scaled(sigma=2))),
        "shared": ("sender and receiver share one map", dict(change=shared_map)),
        "far": ("17 symbols, one beyond the 16 that k = 16 sees", dict(length=17)),
        "far-geometry": ("that, geometry 10 times", dict(length=17, geometry_rate=10.0)),
        "far-k32": ("17 symbols, k = 32", dict(length=17, k=32)),
        "far-k32-geometry": ("17 symbols, k = 32, geometry 10 times", dict(length=17, k=32, geometry_rate=10.0)),
        "unknown": ("8 to 16 symbols, two layers", dict(vary=4, layers=2, geometry_rate=10.0)),
        "unknown-shared": ("that, one map", dict(vary=4, layers=2, geometry_rate=10.0, change=shared_map)),
    },
}
MAKES = {"digits": (Pixels, DIGITS), "copy": (Copies, COPY)}
EVERY_LINE = ["head/alone", *(f"{task}/{line}" for task, lines in LINES.items() for line in lines)]


def heads_of(model: nn.Module) -> list[dict]:
    """Where the heads of each layer ended: widths, step lengths, how far back the receiver looks."""
    found = [m for m in model.modules() if isinstance(m, DynamicFlowAttention)]
    rounded = lambda x: [round(v, 3) for v in x.detach().flatten().tolist()]  # noqa: E731
    return [dict(sigma=rounded(a.log_sigma.exp()), alpha=rounded(a.alpha), offset=rounded(a.offset[:, 0]))
            for a in found]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    said = __doc__.split("\n\n")[0].replace("\n", " ")
    parser = argparse.ArgumentParser(prog="python -m dfn.studies.weak_spots", description=said)
    parser.add_argument("--lines", nargs="+", choices=EVERY_LINE, default=EVERY_LINE, metavar="TASK/LINE",
                        help="default: all; they are " + ", ".join(EVERY_LINE))  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/study-weak-spots"), help="a study in it goes on")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of everything (default: 3)")
    steps = f"default: {HEAD_STEPS} (head), {DIGITS['steps']} (digits), {COPY['steps']} (copy)"
    parser.add_argument("--steps", type=positive, help=steps)
    parser.add_argument("--result", type=Path, help="write it there, too, without curves, a line for each run")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def run(arguments: argparse.Namespace) -> dict:
    torch.set_num_threads(arguments.threads)
    settings = {task: defaults for task, (_, defaults) in MAKES.items()}
    study = Study("weak spots", arguments.out, asked(arguments, "lines", "result"), names="task/line/seed",
                  evaluations=2, progress=not arguments.quiet)  # fmt: skip
    if study.found.setdefault("settings", settings) != settings:
        raise UsageError(f"{arguments.out} holds a study with other settings; another --out begins a new one")
    study.found["lines"] = {
        f"{task}/{line}": said for task, lines in LINES.items() for line, (said, _) in lines.items()
    }

    def compute(task: str, line: str, seed: int, folder: Path) -> dict:
        if task == "head":
            heads = one_head.one_head(arguments.steps or HEAD_STEPS, seed)
            return dict(value=sum(h["loss"] < one_head.SOLVED for h in heads) / len(heads), heads=heads)
        make, defaults = MAKES[task]
        change = LINES[task][line][1]
        of_options = {name: value for name, value in change.items() if name in Options.__dataclass_fields__}
        given = {**defaults, **of_options, "seed": seed}
        given["steps"] = arguments.steps or given["steps"]
        trained, cell = study.trained(lambda o: make(o, change), options_of(arguments, **given), folder)
        return {**cell, "heads": heads_of(trained.model)}

    with study.reported(table):
        for seed in range(arguments.seeds):
            for place in arguments.lines:
                task, line = place.split("/")
                study.cell(f"{place}/{seed}", lambda folder, a=(task, line, seed): compute(*a, folder))
    if arguments.result:
        write_whole(arguments.result, in_short(study.found).encode())
    return study.found


def in_short(found: dict) -> str:
    """JSON, a line for each run."""
    cells = {key: {name: value for name, value in cell.items() if name != "curve"}
             for key, cell in found["cells"].items()}  # fmt: skip
    lines = (f"  {json.dumps(key)}: {json.dumps(cell)}" for key, cell in sorted(cells.items()))
    head = json.dumps({name: value for name, value in found.items() if name != "cells"}, indent=1)
    return head.removesuffix("\n}") + ',\n "cells": {\n' + ",\n".join(lines) + "\n }\n}\n"


def values_of(found: dict, place: str) -> list[float]:
    """The results of one line, a seed each; shares as per cent."""
    factor = 100 if place.startswith("digits/") else 1
    cells = {key: cell for key, cell in found["cells"].items() if key.rsplit("/", 1)[0] == place}
    return [factor * cell["value"] for cell in cells.values() if cell.get("value") is not None]


def head_table(found: dict) -> list[str]:
    """Of `one_head`: how many of the heads, over the seeds, find the place."""
    heads = [h for key, cell in found["cells"].items() if key.startswith("head/") for h in cell["heads"]]
    if not heads:
        return []
    options = one_head.SETTINGS
    columns = [(lr, rate) for lr in options["lr"] for rate in options["geometry_rate"]]
    rows = []
    for distance in options["distance"]:
        for k in options["k"]:
            of = [h for h in heads if (h["distance"], h["k"]) == (distance, k)]
            found_by = [
                [h["loss"] < one_head.SOLVED for h in of if (h["lr"], h["geometry_rate"]) == c] for c in columns
            ]
            rows.append([str(distance), str(k), *(f"{sum(f)} of {len(f)}" for f in found_by)])
    said = f"One head alone: below {one_head.SOLVED} nats after {found['options']['steps'] or HEAD_STEPS} steps."
    return [said, markdown(["places back", "k", *(f"{lr:g}, geometry x {rate}" for lr, rate in columns)], rows)]


def table(found: dict) -> str:
    """Markdown: for each task its lines, mean and standard deviation of the seeds."""
    parts = ["# Weak spots", *head_table(found)]
    for task, said in TASKS.items():
        rows = []
        for line, (of, _) in LINES[task].items():
            if values := values_of(found, f"{task}/{line}"):
                mine = [c for key, c in found["cells"].items() if key.startswith(f"{task}/{line}/")]
                rows.append([of, f"{mine[0]['parameters']:,}", str(len(values)),
                             spread(values, 1 if task == "digits" else 2)])  # fmt: skip
        if rows:
            o = {**found["settings"][task]}
            o["steps"] = found["options"]["steps"] or o["steps"]
            shape = ", ".join(f"{name} {value:g}" for name, value in o.items())
            parts += [f"{said}. Each line changes one thing of: {shape}.",
                      markdown(["", "parameters", "seeds", said], rows)]  # fmt: skip
    failed = "; ".join(f"{key} {c['failed']}" for key, c in found["cells"].items() if "failed" in c)
    return "\n\n".join([*parts, *([f"Ended early: {failed}."] if failed else []), where(found)]) + "\n"


if __name__ == "__main__":
    run(build_parser().parse_args())
    sys.exit(0)
