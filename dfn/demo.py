"""``python -m dfn.demo``: trains a Dynamic Flow Network on real text in two minutes and reports what came of it."""

import argparse
import copy
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from . import data, pictures
from .layers import count_parameters
from .models import DFNLanguageModel
from .training import History, NonFiniteLoss, Trainer

MODEL = dict(vocab_size=256, dim=128, layers=3, heads=4, pos_dim=3, k=16)
TRAINING = dict(lr=6e-3, warmup=100)
LENGTH, BATCH = 128, 16
CONTEXT, STRIDE = 256, 128  # of the evaluation
GLANCES = 16  # stretches of 2 KiB of the held-out bytes that the evaluations during training look at


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dfn.demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--text", help="file or folder of text (default: the sources of the Python standard library)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_report"), help="where the report goes (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to train (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-table", action="store_true", help="leave out the kernel table")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"dfn.demo: needs {' and '.join(missing)}: pip install 'dfn-kernels[models]'", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    try:
        run(arguments.text, arguments.out, arguments.minutes, arguments.seed, table=not arguments.no_table)
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"dfn.demo: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def run(text: str | None, out: Path, minutes: float, seed: int, table: bool = True) -> dict:
    """The whole demo; returns the figures of the report."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = data.load_corpus(text)
    print(corpus.summary())
    length = min(LENGTH, len(corpus.train) - 1)
    autocast = fast_dtype()
    torch.manual_seed(seed)
    model = DFNLanguageModel(**MODEL)
    threads = torch.get_num_threads()
    torch.set_num_threads(fast_threads(model, corpus.train, length, autocast))
    ran_on = machine(autocast)
    print(
        f"DFNLanguageModel: {count_parameters(model):,} parameters, {MODEL['layers']} layers, {MODEL['heads']} heads, "
        f"{MODEL['k']} neighbours; {ran_on}"
    )

    trainer = Trainer(model, seconds=60 * minutes, autocast=autocast, **TRAINING)
    stream = data.batches(corpus.train, BATCH, length, torch.Generator().manual_seed(seed))
    starts = torch.linspace(0, max(0, len(corpus.held_out) - 2048), GLANCES).long().unique()
    glance = torch.cat([corpus.held_out[i : i + 2048] for i in starts.tolist()])
    history = trainer.fit(stream, evaluate=lambda: held_out_bits(model, glance, autocast))
    print("judging on all held-out bytes ...", flush=True)
    figures = {
        "model": held_out_bits(model, corpus.held_out, autocast),
        **data.compressed_bits_per_byte(corpus.held_out),
        "bigram": data.bigram_bits_per_byte(corpus.train, corpus.held_out),
    }
    print("\nbits per byte on the same held-out bytes (less is better)\n" + "\n".join(table_of_bits(figures)) + "\n")

    prompt, continuation = continue_prompt(model, corpus, seed)
    rule = "-" * 78
    print(
        f"a prompt from the held-out bytes\n{rule}\n{prompt}\n{rule}\n"
        f"and how the model goes on\n{rule}\n{continuation}\n{rule}"
    )

    pictures.loss_curve(history, figures, out / "loss_curve.png")
    pictures.drift(model, corpus.held_out[:4096], out / "drift.png")
    facts = (out, corpus, model, history, figures, prompt, continuation, minutes, ran_on)
    report(*facts, kernels=None)
    torch.set_num_threads(threads)  # the kernels get what the machine has
    kernels = kernel_table() if table else None
    if kernels:
        print("\n" + kernels)
        (out / "kernels.md").write_text(kernels, encoding="utf-8")
        report(*facts, kernels=kernels)
    print(f"\nreport: {out / 'report.md'}")
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


def fast_threads(model: DFNLanguageModel, text: Tensor, length: int, autocast: torch.dtype | None) -> int:
    """The number of threads that takes the least time for a step: fewer than there are on a large or a busy machine."""
    most = torch.get_num_threads()
    batch = next(data.batches(text, BATCH, length, torch.Generator().manual_seed(0)))
    times = {}
    for threads in sorted({n for n in (1, 2, 4, 8, 16) if n < most} | {most}):
        torch.set_num_threads(threads)
        trainer = Trainer(copy.deepcopy(model), steps=10, autocast=autocast)
        trainer.train_step(batch)
        began = time.perf_counter()
        for _ in range(4):
            trainer.train_step(batch)
        times[threads] = time.perf_counter() - began
    return min(times, key=times.get)


@torch.no_grad()
def held_out_bits(model: DFNLanguageModel, held_out: Tensor, autocast: torch.dtype | None = None) -> float:
    """Bits per byte. Every byte is predicted once from those before it; the first one of all counts as 8 bits."""
    nats, group = 0.0, []
    windows = list(data.segments(held_out, min(CONTEXT, len(held_out) - 1), min(STRIDE, len(held_out) - 1)))
    for n, window in enumerate(windows):
        group.append(window)
        if len(group) < 16 and n + 1 < len(windows):
            continue
        ids, targets = (torch.stack([w[i] for w in group]) for i in (0, 1))
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(ids)[0].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        for row, (_, _, first) in zip(losses.view(len(group), -1), group, strict=True):
            nats += row[first:].double().sum().item()
        group = []
    return (data.bits(nats) + 8) / len(held_out)


def table_of_bits(figures: dict[str, float]) -> list[str]:
    names = {"model": "this model", "gzip": "gzip -9", "bzip2": "bzip2 -9", "xz": "xz -9", "bigram": "byte bigram"}
    return [f"{names[name]:12s} {value:6.3f}" for name, value in sorted(figures.items(), key=lambda item: item[1])]


def continue_prompt(model: DFNLanguageModel, corpus: data.Corpus, seed: int, length: int = 320) -> tuple[str, str]:
    """A stretch of held-out text from the start of a function or line, and ``length`` bytes that the model adds."""
    held_out = bytes(corpus.held_out.tolist())
    start = max(held_out.find(b"\n    def ", len(held_out) // 3), held_out.rfind(b"\n", 0, len(held_out) // 3)) + 1
    end = held_out.rfind(b"\n", start, start + 240) + 1 or min(len(held_out), start + 240)
    ids = corpus.held_out[start:end].long()[None]
    new = model.generate(ids, length, temperature=0.6, generator=torch.Generator().manual_seed(seed))
    text = bytes(new[0].tolist())
    return text[: end - start].decode("utf-8", "replace"), text[end - start :].decode("utf-8", "replace")


def kernel_table() -> str | None:
    """The table of `bench`, which lies beside the packages in the repository, or None without it."""
    try:
        from bench import quick_table
    except ImportError:
        return None
    return quick_table()


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
        f"Text: {corpus.summary()}.",
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
