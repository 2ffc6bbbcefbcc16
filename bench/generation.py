"""Time per generated token over the length of the context.

    python -m bench.generation [--contexts 1024 ... 262144] [--tokens 300] [--train 100] [--out bench/results]

A byte-level `DFNLanguageModel` of the demo's size, trained for --train steps, reads a context of real text in one pass
and goes on byte by byte, --tokens of them; a pass and a few bytes before that are not counted. What it is given is the
text itself: its own likeliest bytes would repeat. Prints a table; writes JSON and a plot.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dfn.data import batches, load_corpus
from dfn.decoding import Decoder
from dfn.demo import MODEL
from dfn.models import DFNLanguageModel
from dfn.training import Trainer

from .report import machine

CONTEXTS = (1024, 4096, 16384, 65536, 262144)


def measure(model: DFNLanguageModel, text: Tensor, context: int, tokens: int, device: str) -> dict:
    """{context, prompt_s, median_ms, mean_ms, p99_ms, state_mib}: times per token, and what the decoder holds."""

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    ids = text[: context + tokens + 8].long()[None].to(device)
    decoder = Decoder(model, capacity=context + tokens + 8)
    began = wait()
    decoder(ids[:, :context])
    prompt_s, times = wait() - began, []
    for i in range(context, context + tokens + 8):
        began = wait()
        decoder(ids[:, i : i + 1]).argmax(-1)
        times.append(1e3 * (wait() - began))
    times = sorted(times[8:])
    held = sum(seen.values.nbytes + getattr(seen.search, "points", seen.values[:0]).nbytes for seen in decoder.seen)
    return {
        "context": context, "prompt_s": prompt_s, "median_ms": statistics.median(times),
        "mean_ms": statistics.mean(times), "p99_ms": times[len(times) * 99 // 100], "state_mib": held / 2**20,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("context", "prompt, s", "ms a token, median", "mean", "99 %", "tokens/s", "median to first", "values, MiB")
    cells = [head] + [
        (
            f"{r['context']:,}", f"{r['prompt_s']:.2f}", f"{r['median_ms']:.3f}", f"{r['mean_ms']:.3f}",
            f"{r['p99_ms']:.3f}", f"{1e3 / r['mean_ms']:,.0f}", f"{r['median_ms'] / rows[0]['median_ms']:.2f}x",
            f"{r['state_mib']:.0f}",
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    contexts = [r["context"] for r in rows]
    for name, style in (("median", "o-"), ("mean", "s--")):
        axis.plot(contexts, [r[f"{name}_ms"] for r in rows], style, label=name)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.5 * max(r["mean_ms"] for r in rows))
    axis.set(title="Generation: time per token", xlabel="entities in the context", ylabel="ms")
    axis.grid(True, alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--train", type=int, default=100, help="steps")
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads or torch.get_num_threads())
    torch.manual_seed(0)
    corpus = load_corpus()
    model = DFNLanguageModel(**MODEL).to(given.device)
    text = corpus.train.repeat(1 + (max(given.contexts) + given.tokens + 8) // len(corpus.train))
    if given.train:
        stream = batches(corpus.train, 16, 128, torch.Generator().manual_seed(0))
        stream = (tuple(x.to(given.device) for x in batch) for batch in stream)
        Trainer(model, steps=given.train, lr=6e-3, warmup=given.train // 4).fit(stream)
    rows = [
        measure(model.eval(), text, context, given.tokens, given.device)
        for context in tqdm([min(given.contexts), *given.contexts], desc="contexts")
    ][1:]
    print(table(rows))
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {**machine(), "device": given.device, "trained_steps": str(given.train), "tokens": str(given.tokens)}
    path = given.out / f"{facts['date']}-generation-{given.device}-{facts['threads']}threads.json"
    path.write_text(json.dumps({"machine": facts, "model": model.config, "rows": rows}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"))
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
