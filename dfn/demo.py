"""``python -m dfn.demo``: trains a Dynamic Flow Network on real text in two minutes and reports what came of it."""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .models.language import DFNLanguageModel
from .models.layers import count_parameters
from .pictures.drift import drift
from .pictures.training import loss_curve
from .runs.bits import CONTEXT, JUDGED, STRIDE, continue_prompt, held_out_bits, judged, table_of_bits, text_baselines
from .runs.needed import check_installed
from .runs.threads import fast_threads
from .training.text import batches, load_corpus
from .training.trainer import History, Trainer

MODEL = dict(vocab_size=256, dim=128, layers=3, heads=4, pos_dim=8, k=16)
TRAINING = dict(lr=6e-3, warmup=100)
LENGTH, BATCH = 128, 16
GLANCES = 16  # stretches of 2 KiB of the held-out bytes that the evaluations during training look at


def main(
    argv: list[str] | None = None, kernel_table: Callable[[Path], str] | None = None, prog: str = "python -m dfn.demo"
) -> int:
    """Runs the demo: 0, or 1 for a failure.

    ``kernel_table`` gives what the report says of the kernels, in Markdown; what more it has goes into the folder.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split(": ", 1)[1])
    parser.add_argument("--text", help="file or folder of text (default: the sources of the Python standard library)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_report"), help="where the report goes (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to train (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and prompt (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    threads = torch.get_num_threads()
    try:
        check_installed("matplotlib", "tqdm")
        run(arguments.text, arguments.out, arguments.minutes, arguments.seed, kernel_table)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        there = arguments.out / "report.md"
        kept = f"; {there} has what there is" if there.exists() else ""
        print(f"\n{parser.prog}: stopped{kept}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def run(
    text: str | None, out: Path, minutes: float, seed: int, kernel_table: Callable[[Path], str] | None = None
) -> dict:
    """The whole demo; returns the figures of the report."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(text)
    print(f"data: {corpus.summary()}")
    length = min(LENGTH, len(corpus.train) - 1)
    autocast = fast_dtype()
    torch.manual_seed(seed)
    model = DFNLanguageModel(**MODEL)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_for(model, corpus.train, length, autocast))
    ran_on = machine(autocast)
    print(
        f"model: DFNLanguageModel, {count_parameters(model):,} parameters, {MODEL['layers']} layers, "
        f"{MODEL['heads']} heads, {MODEL['k']} neighbours; {ran_on}"
    )

    trainer = Trainer(model, seconds=60 * minutes, autocast=autocast, counted="bytes", **TRAINING)
    stream = batches(corpus.train, BATCH, length, torch.Generator().manual_seed(seed))
    starts = torch.linspace(0, max(0, len(corpus.held_out) - 2048), GLANCES).long().unique()
    glance = torch.cat([corpus.held_out[i : i + 2048] for i in starts.tolist()])
    history = trainer.fit(stream, evaluate=lambda: held_out_bits(model, glance, autocast))
    held_out = judged(corpus.held_out)
    print(f"judging on {len(held_out):,} of {len(corpus.held_out):,} held-out bytes", flush=True)
    figures = {"model": held_out_bits(model, held_out, autocast, progress=True)}
    figures |= text_baselines(corpus.train, held_out, progress=True)
    print("\nbits per byte on the same held-out bytes (less is better)\n" + "\n".join(table_of_bits(figures)) + "\n")

    prompt, continuation = continue_prompt(model, corpus, seed)
    rule = "-" * 78
    print(
        f"a prompt from the held-out bytes\n{rule}\n{prompt}\n{rule}\n"
        f"and how the model goes on\n{rule}\n{continuation}\n{rule}"
    )

    loss_curve(history, figures, out / "loss_curve.png")
    drift(model, corpus.held_out[:4096], out / "drift.png")
    facts = (out, corpus, model, history, figures, prompt, continuation, minutes, ran_on)
    report(*facts, kernels=None)
    torch.set_num_threads(threads)  # the kernels get what the machine has
    if kernel_table:
        print("\nmeasuring the kernels beside what one could use instead", flush=True)
        kernels = kernel_table(out)
        print("\n" + kernels)
        report(*facts, kernels=kernels)
    print(f"\nwritten to {out}: report.md, which shows all of this, and its pictures")
    return figures


def machine(autocast: torch.dtype | None) -> str:
    dtype = str(autocast or torch.float32).removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} ({os.cpu_count()} cores), {dtype}"


def fast_dtype() -> torch.dtype | None:
    """bfloat16 for autocast where this CPU multiplies it much faster than float32, else None."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for another thread on a busy machine would drown the difference
    for _ in range(12):
        for dtype in best:
            x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    torch.set_num_threads(threads)
    return torch.bfloat16 if best[torch.bfloat16] < 0.7 * best[torch.float32] else None


def threads_for(model: DFNLanguageModel, text: Tensor, length: int, autocast: torch.dtype | None) -> int:
    batch = next(batches(text, BATCH, length, torch.Generator().manual_seed(0)))

    def make() -> Callable[[], float]:
        trainer = Trainer(copy.deepcopy(model), steps=10, autocast=autocast)
        return lambda: trainer.train_step(batch)

    return fast_threads(make)


def report(out, corpus, model, history: History, figures, prompt, continuation, minutes, ran_on, kernels) -> None:
    best = min(("gzip", "bigram"), key=figures.get)
    gap = figures["gzip"] - figures["model"]
    verdict = f"{abs(gap):.3f} bits per byte {'below' if gap > 0 else 'above'} gzip"
    rate = history.tokens[-1] / history.seconds[-1]
    fence = "~~~~"
    lines = [
        "# What two minutes of a Dynamic Flow Network give" if minutes == 2 else "# What a Dynamic Flow Network gives",
        "",
        f"A language model of {count_parameters(model):,} parameters, trained for {history.seconds[-1]:.0f} s on "
        f"{ran_on}: {history.steps[-1]:,} steps, {history.tokens[-1] / 1e6:.2f}M bytes seen, "
        f"{rate:,.0f} bytes/s.",
        f"Text: {corpus.summary()}."
        + (f" Judged are {JUDGED:,} of them, in 16 stretches." if len(corpus.held_out) > JUDGED else ""),
        "",
        "## Bits per byte on the held-out bytes",
        "",
        "| | bits per byte |",
        "|---|---|",
        *(f"| {row[:12].strip()} | {row[12:].strip()} |" for row in table_of_bits(figures)),
        "",
        f"The model ends {verdict}{'' if best == 'gzip' else ' and above the byte bigram'}. What is compared: the "
        "compressors get the held-out bytes alone, in one piece, and start knowing nothing; the model and the bigram "
        "have learned from the training bytes, and their own size is not counted. Every byte is predicted from at "
        f"least {CONTEXT - STRIDE} bytes before it, where there are as many, and at most {CONTEXT}.",
        "",
        "![loss](loss_curve.png)",
        "",
        "## Entities drifting",
        "",
        "![drift](drift.png)",
        "",
        "## A prompt and how the model goes on",
        "",
        f"{fence}\n{prompt}{fence}" if prompt.endswith("\n") else f"{fence}\n{prompt}\n{fence}",
        "",
        f"{fence}\n{continuation}\n{fence}",
        "",
    ]
    if kernels:
        lines += ["## Kernels", "", kernels, ""]
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
