"""What each part of a Dynamic Flow Network is good for: a model trained without it, on three tasks, over several seeds.

Text: bits per byte on held-out bytes, read in consecutive pieces with a memory between them. Recall: associative
recall of 8 pairs. Segments: questions about facts of the segment before, which only a memory can answer.
"""

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..models.language import DFNLanguageModel, ablated
from ..runs import run as runs
from ..runs.bits import streamed_bits
from ..runs.options import Options, UsageError
from ..runs.tasks import Text
from ..training.checkpoints import locked, write_whole
from ..training.trainer import Trainer
from .memory_task import segments_accuracy
from .recall import recall_batch

LINES = {"": "full model", "flow": "no flow", "memory": "no memory", "flow_norm": "no FlowNorm",
         "receiver_drift": "no receiver drift", "heads": "one head"}  # fmt: skip
TASKS = {"text": "text, bits per byte", "recall": "recall, %", "segments": "segments, %"}
NO_MEMORY = "recall", "memory"  # one segment: there is no memory to leave out
PAIRS = 8
MEMORY = 256
HELD_OUT = 2**16


def run(
    folder: Path, seeds: int, given: dict, tasks: Sequence[str] = tuple(TASKS), say: Callable[[str], object] = print
) -> str:
    """Trains what is missing in ``folder/ablation.json`` and returns the table, also in ``ablation.md``.

    Every run takes ``given["steps"]`` steps, 400 without; what else is given are options of `dfn train text`.
    A run that was stopped goes on from its last checkpoint.
    """
    options = Options.of("text", **{"steps": 400, "memory_size": MEMORY, **given})
    if options.without or not options.memory_size:
        raise UsageError("ablate leaves parts out itself: give no --without, and a --memory-size above 0")
    with locked(folder):
        return _run(folder, seeds, given, tasks, options, say)


def _run(folder: Path, seeds: int, given: dict, tasks: Sequence[str], options: Options, say) -> str:
    facts = {"options": asdict(options), "tokens": options.steps * options.batch * options.length}
    found = load(folder) if (folder / "ablation.json").exists() else {**facts, "cells": {}}
    if any(found[name] != value for name, value in facts.items()):
        raise UsageError(f"{folder} holds an ablation with other options; another --out begins a new one")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    flags = f" --seeds {seeds}" + ("" if set(tasks) == set(TASKS) else " --tasks " + " ".join(tasks))
    flags += "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items() if name != "threads")
    found |= {"machine": runs.machine(), "corpus": Text(options).corpus.name, "flags": flags}
    work = [
        (task, line, seed)
        for seed in range(options.seed, options.seed + seeds)
        for task in tasks
        for line in LINES
        if (task, line) != NO_MEMORY
    ]
    for number, (task, line, seed) in enumerate(work):
        key = f"{task}/{line}/{seed}"
        if key in found["cells"]:
            continue
        found["cells"][key] = CELLS[task](options, line, seed, folder)
        write_whole(folder / "ablation.json", (json.dumps(found, indent=1) + "\n").encode())
        say(f"{number + 1} of {len(work)}: {TASKS[task]}, {LINES[line]}, seed {seed}: {found['cells'][key]:.3f}")
    text = table(found)
    write_whole(folder / "ablation.md", text.encode())
    return text


def text_cell(options: Options, line: str, seed: int, folder: Path) -> float:
    options = replace(options, without=line, seed=seed, threads=options.threads or torch.get_num_threads())
    folder = folder / f"{line or 'full'}-{seed}"  # which a run that was stopped left behind, if any
    run = runs.train(options, folder, resume=True, evaluations=0, say=lambda text: None)
    shutil.rmtree(folder)
    return streamed_bits(run.model, run.task.corpus.held_out[:HELD_OUT], options.length)


def recall_cell(options: Options, line: str, seed: int, folder: Path) -> float:
    config = dict(vocab_size=64, dim=64, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DFNLanguageModel(**(ablated(config, line) if line else config))
    generator = torch.Generator().manual_seed(seed)
    batches = (recall_batch(32, PAIRS, generator=generator) for _ in range(options.steps))
    Trainer(model, steps=options.steps, lr=3e-3).fit(batches)
    ids, targets = recall_batch(500, PAIRS, generator=generator)
    with torch.no_grad():
        return 100 * float((model(ids)[0].argmax(-1) == targets)[targets >= 0].float().mean())


def segments_cell(options: Options, line: str, seed: int, folder: Path) -> float:
    remember, without = line != "memory", "" if line == "memory" else line
    found = segments_accuracy(remember=remember, without=without, steps=options.steps, seed=seed, progress=True)
    return 100 * found[1]


CELLS = {"text": text_cell, "recall": recall_cell, "segments": segments_cell}


def load(folder: Path) -> dict:
    return json.loads((Path(folder) / "ablation.json").read_text(encoding="utf-8"))


def column(found: dict, task: str, line: str) -> dict[int, float]:
    """The results of one cell of the table by seed."""
    keys = {key: key.split("/") for key in found["cells"]}
    return {int(seed): found["cells"][key] for key, (t, l, seed) in keys.items() if (t, l) == (task, line)}


def table(found: dict) -> str:
    """Markdown: mean and standard deviation over the seeds, and what leaving the part out costs, seed by seed."""
    o, tasks = found["options"], [t for t in TASKS if any(key.startswith(t) for key in found["cells"])]
    # Only seeds that every line has: an ablation that was stopped has some lines of one more.
    common = {
        t: set.intersection(*(set(column(found, t, line)) for line in LINES if (t, line) != NO_MEMORY)) for t in tasks
    }
    tasks = [t for t in tasks if common[t]]
    head = ["", *(f"{TASKS[t]}, {len(common[t])} seed{'s' * (len(common[t]) > 1)}" for t in tasks)]
    if "text" in tasks:
        head.insert(2, "worse by")
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for line, name in LINES.items():
        row = [name]
        for task in tasks:
            values = {s: x for s, x in column(found, task, line).items() if s in common[task]}
            digits = 3 if task == "text" else 1
            row.append(spread(list(values.values()), digits))
            if task == "text":
                full = column(found, task, "")
                row.append(spread([x - full[s] for s, x in values.items()], 3) if line else "")
        lines.append(" | ".join(row))
    shape = f"{o['layers']} layers, dim {o['dim']}, {o['heads']} heads, k {o['k']}, a memory of {o['memory_size']}"
    seen = f"{found['tokens'] / 1e6:.2f}M bytes seen, in rows of {o['length']}"
    notes = {
        "text": f"- Text: {shape}; {seen}; judged on the first "
        f"{HELD_OUT:,} held-out bytes of {found['corpus']}. Less is better. *Worse by* is the difference to the "
        "full model of the same seed.",
        "recall": f"- Recall: associative recall of {PAIRS} pairs; two layers, dim 64. More is better.",
        "segments": "- Segments: questions about facts of the segment before; one layer, dim 32. Guessing gives 25 %.",
    }
    paragraphs = [
        "# What each part is good for",
        f"Mean ± standard deviation over the seeds; every run takes {o['steps']:,} steps.",
        "\n".join(notes[task] for task in tasks),
        "\n".join(f"| {line} |" for line in lines),
        "![the same as a picture](ablation.png)",
        f"Machine: {found['machine']}. Made by `dfn ablate{found['flags']}`.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
