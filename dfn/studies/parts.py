"""Parts: what each part of a Dynamic Flow Network is worth, and what could take its place, on three tasks.

Text: bits per byte held out, read in consecutive pieces with a memory between them. Recall: associative recall of 8
pairs. Segments: questions about facts of the segment before, which only a memory can answer.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..models.language import DFNLanguageModel, ablated
from ..models.layers import FIRST_BLOCK, count_parameters
from ..runs import bits
from ..runs.options import UsageError
from .cells import Study, add_flags, asked, main, markdown, options_of, positive, spread, use_threads, where
from .memory_task import CONFIG, segments_accuracy
from .recall import Recall, recall_batch
from .sources import SplitText, split_by_content

TASKS = {"text": "text, bits per byte", "recall": "recall, %", "segments": "segments, %"}
PAIRS = 8
MEMORY = 256
RECALL = dict(vocab_size=64, dim=64, layers=2)
RECALL_OPTIONS = dict(dim=64, layers=2, lr=3e-3, warmup=200, batch=32)
NAMES, MEASURED = "task/part/seed", "held-out bits per byte (less is better), or share answered"


def block(config: dict, **options) -> dict:
    return {**config, "block_options": {**(config.get("block_options") or {}), **options}}


def deeper(config: dict) -> dict:
    """Twice the layers, as wide as the same number of parameters allows."""
    heads, dim = config.get("heads", 4), config["dim"]
    with torch.device("meta"):
        count = lambda c: count_parameters(DFNLanguageModel(**c))  # noqa: E731
        shapes = [{**config, "layers": 2 * config["layers"], "dim": d} for d in range(heads, dim + 1, heads)]
        return min(shapes, key=lambda c: abs(count(c) - count(config)))


LEFT_OUT: dict[str, tuple[str, Callable[[dict], dict]]] = {
    "full": ("as it is", lambda c: c),
    "flow": ("no flow", lambda c: ablated(c, "flow")),
    "memory": ("no memory", lambda c: ablated(c, "memory")),
    "flow_norm": ("no FlowNorm", lambda c: ablated(c, "flow_norm")),
    "receiver_drift": ("no receiver's offset", lambda c: ablated(c, "receiver_drift")),
    "receiver_flow": ("no receiver's flow", lambda c: block(c, receiver_flow=False)),
    "salience": ("no learned influence", lambda c: block(c, salience=False)),
    "heads": ("one head", lambda c: ablated(c, "heads")),
    "semantic": ("no semantic head", lambda c: block(c, semantic=0)),
    "normalize": ("weights not normalised", lambda c: block(c, normalize=False)),
    "convolution": ("no short convolution", lambda c: ablated(c, "convolution")),
}
CANDIDATES: dict[str, tuple[str, Callable[[dict], dict]]] = {
    **{f"k{k}": (f"k = {k}", lambda c, k=k: {**c, "k": k}) for k in (4, 8, 16, 32)},
    "gelu": ("GELU in place of SwiGLU", lambda c: block(c, mlp="gelu")),
    "layer_norm": ("LayerNorm in place of RMSNorm", lambda c: block(c, norm="layer")),
    "bias": ("biases", lambda c: block(c, bias=True)),
    "output": ("output maps start as others do", lambda c: block(c, output_scale=1.0)),
    "first": ("the block of before 26 November 2026", lambda c: block(c, **FIRST_BLOCK)),
    "deeper": ("twice the layers, narrower", deeper),
    "dimensions3": ("positions in three dimensions", lambda c: {**c, "pos_dim": 3}),
    "semantic2": ("two semantic heads", lambda c: block(c, semantic=2)),
    "sigma0.5": ("half the sigma at the start", lambda c: block(c, sigma=0.5)),
    "sigma2": ("twice the sigma at the start", lambda c: block(c, sigma=2.0)),
}
LINES = {**LEFT_OUT, **CANDIDATES}
NO_MEMORY = "recall", "memory"  # one segment: there is no memory to leave out


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", nargs="+", choices=("all", *LINES), default=["all"], help="lines of the table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--judged", type=positive, default=2**18, help="held-out bytes judged on (default: 262,144)")
    add_flags(parser, "study-parts", data=None, steps=2000, batch=16, length=128, dim=96, layers=3, heads=4, pos_dim=8,
              k=16, memory_size=MEMORY, convolution=4, lr=6e-3, warmup=100, weight_decay=0.01, seed=0)  # fmt: skip


def add_left_out(parser: argparse.ArgumentParser) -> None:
    """The flags of ``dfn ablate``: this study with the parts left out only, 400 steps unless given."""
    add(parser)
    parser.set_defaults(lines=list(LEFT_OUT), out=Path("runs/ablation"), steps=400)


def run(arguments: argparse.Namespace) -> dict:
    use_threads(arguments)
    if not arguments.memory_size:
        raise UsageError("parts leaves the memory out itself: give a --memory-size above 0")
    split = split_by_content(arguments.data)
    judged = bits.judged(split.held_out, arguments.judged)
    asked_for = list(LINES) if "all" in arguments.lines else arguments.lines
    study = Study("parts", arguments.out, asked(arguments, "data", "lines", "tasks"), split.facts(judged),
                  names=NAMES, evaluations=4, progress=not arguments.quiet)  # fmt: skip
    study.found["lines"] = {line: said for line, (said, _) in LINES.items()}
    names = ("dim", "layers", "heads", "pos_dim", "k", "memory_size")
    config = block(dict(vocab_size=256, **{name: getattr(arguments, name) for name in names}),
                   convolution=arguments.convolution)  # fmt: skip

    def text(change: Callable[[dict], dict], seed: int, folder: Path) -> dict:
        build = lambda: DFNLanguageModel(**change(config))  # noqa: E731
        judge = lambda model: bits.streamed_bits(model, judged, arguments.length)  # noqa: E731
        return study.trained(lambda o: SplitText(o, build, split, judge), options_of(arguments, seed=seed), folder)[1]

    def recall(change: Callable[[dict], dict], seed: int, folder: Path) -> dict:
        options = options_of(arguments, seed=seed, length=6 * PAIRS, memory_size=0, **RECALL_OPTIONS)
        draw = lambda batch, generator: recall_batch(batch, PAIRS, generator=generator)  # noqa: E731
        lookup = {**RECALL, "pos_dim": arguments.pos_dim}
        build = lambda: DFNLanguageModel(**change(block(lookup, convolution=arguments.convolution)))  # noqa: E731
        return study.trained(lambda o: Recall(o, build, draw), options, folder)[1]

    def segments(change: Callable[[dict], dict], seed: int, folder: Path) -> dict:
        without = change(CONFIG)["memory_size"] == 0  # it keeps its size and forgets, which is the same question
        found = segments_accuracy(CONFIG if without else change(CONFIG), remember=not without, steps=arguments.steps,
                                  seed=seed, progress=study.progress)  # fmt: skip
        return dict(value=found[1], curve=[])

    compute = {"text": text, "recall": recall, "segments": segments}
    with study.reported(table):
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            for task in arguments.tasks:
                for line in asked_for:
                    if (task, line) != NO_MEMORY:
                        one = lambda folder, a=(task, line, seed): compute[a[0]](LINES[a[1]][1], a[2], folder)  # noqa: E731
                        study.cell(f"{task}/{line}/{seed}", one)
    return study.found


def column(found: dict, task: str, line: str) -> dict[int, float]:
    """The results of one cell of the table by seed; shares as per cent."""
    factor = 1 if task == "text" else 100
    keys = {key: key.split("/") for key, cell in found["cells"].items() if cell.get("value") is not None}
    return {int(seed): factor * found["cells"][key]["value"] for key, (t, l, seed) in keys.items()
            if (t, l) == (task, line)}  # fmt: skip


def complete(found: dict) -> tuple[list[str], dict[str, set[int]]]:
    """The lines that are there, and for each task the seeds that all of them have: a stopped study has more of some."""
    lines = [line for line in LINES if any(key.split("/")[1] == line for key in found["cells"])]
    failed = {tuple(key.split("/")[:2]) for key, cell in found["cells"].items() if "failed" in cell}
    seeds = {}
    for task in TASKS:
        there = [set(column(found, task, line)) for line in lines if (task, line) not in {NO_MEMORY, *failed}]
        if there and (common := set.intersection(*there)):
            seeds[task] = common
    return lines, seeds


def table(found: dict) -> str:
    """Markdown: mean and standard deviation over the seeds, and what a change costs, seed by seed."""
    o, d = found["options"], found["data"]
    lines, seeds = complete(found)
    head = [""]
    for task, common in seeds.items():
        head.append(f"{TASKS[task]}, {len(common)} seed{'s' * (len(common) > 1)}")
        head += ["worse by", "parameters"] if task == "text" else []
    rows = []
    for line in lines:
        row = [LINES[line][0]]
        for task, common in seeds.items():
            values = {s: x for s, x in column(found, task, line).items() if s in common}
            row.append(spread(list(values.values()), 3 if task == "text" else 1))
            if task == "text":
                full = column(found, task, "full")
                against = [x - full[s] for s, x in values.items() if s in full]
                mine = [c for key, c in found["cells"].items() if key.startswith(f"text/{line}/")]
                sizes = {c["parameters"] for c in mine if "parameters" in c}
                row += ["" if line == "full" else spread(against, 3), ", ".join(f"{n:,}" for n in sizes)]
        rows.append(row)
    failed = "; ".join(f"{key} {c['failed']}" for key, c in found["cells"].items() if "failed" in c)
    shape = f"{o['layers']} layers, dim {o['dim']}, {o['heads']} heads, k {o['k']}, a memory of {o['memory_size']}"
    notes = {
        "text": f"- Text: {shape}; {o['steps'] * o['batch'] * o['length'] / 1e6:.2f}M bytes seen, in rows of "
        f"{o['length']}; judged on {d['judged_bytes']:,} held-out bytes of {d['name']}. Less is better. *Worse by* is "
        "the difference to the model as it is, of the same seed.",
        "recall": f"- Recall: associative recall of {PAIRS} pairs; two layers, dim 64. More is better.",
        "segments": "- Segments: questions about facts of the segment before; one layer, dim 32. Guessing gives 25 %.",
    }
    return "\n\n".join([
        "# What each part is good for",
        f"Mean ± standard deviation over the seeds; every run takes {o['steps']:,} steps.",
        "\n".join(notes[task] for task in seeds),
        markdown(head, rows),
        *([f"Ended early: {failed}."] if failed else []),
        where(found),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("parts"))
