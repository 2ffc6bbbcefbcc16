"""Time per generated token over the length of the context.

    python -m bench.generation [--contexts 1024 ... 262144] [--tokens 300] [--train 100] [--out bench/results]

A byte-level `DFNLanguageModel` of the demo's size, trained for --train steps, reads a context of real text in one pass
and goes on byte by byte. What it is given is the text itself: its own likeliest bytes would repeat. The contexts take
turns, so that what else runs on the machine slows all of them; CPU time is what others do not add to. Prints a table;
writes JSON and a plot.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dfn.demo import MODEL
from dfn.models.decoding import Decoder, Scan
from dfn.models.language import DFNLanguageModel
from dfn.style import GREEN, ORANGE, OURS, SKY, THICK, THIN, label_ends, picture
from dfn.training.text import batches, load_corpus
from dfn.training.trainer import Trainer

from .report import machine

CONTEXTS = (1024, 4096, 16384, 65536, 262144)
ROUNDS, WARM = 6, 4  # turns, and the first tokens of each that do not count


class Course:
    """One context: the pass over it, and then times per token, in milliseconds."""

    def __init__(self, model: DFNLanguageModel, text: Tensor, context: int, tokens: int, device: str):
        self.device, self.context = device, context
        self.ids = text[: context + tokens].long()[None].to(device)
        self.decoder, self.at, self.wall, self.cpu = Decoder(model, capacity=context + tokens), context, [], []
        began = self.clock()
        self.decoder(self.ids[:, :context])
        self.prompt_s = self.clock()[0] - began[0]

    def clock(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def go_on(self, tokens: int) -> None:
        """The first few after something else has used the caches do not count."""
        for i in range(tokens):
            began = self.clock()
            self.decoder(self.ids[:, self.at : self.at + 1]).argmax(-1)
            self.at += 1
            if i >= WARM:
                for times, end, start in zip((self.wall, self.cpu), self.clock(), began, strict=True):
                    times.append(1e3 * (end - start))

    def row(self) -> dict:
        wall, seen = sorted(self.wall), self.decoder.seen
        held = sum(s.values.nbytes + (s.search.points.nbytes if isinstance(s.search, Scan) else 0) for s in seen)
        return {
            "context": self.context, "prompt_s": self.prompt_s, "median_ms": statistics.median(wall),
            "mean_ms": statistics.mean(wall), "p99_ms": wall[len(wall) * 99 // 100],
            "cpu_ms": statistics.mean(self.cpu), "cpu_median_ms": statistics.median(self.cpu),
            "state_mib": held / 2**20,
        }  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("context", "prompt, s", "ms a token, median", "mean", "99 %", "CPU ms, median", "mean", "CPU to first",
            "values, MiB")  # fmt: skip
    cells = [head] + [
        (
            f"{r['context']:,}", f"{r['prompt_s']:.2f}", f"{r['median_ms']:.3f}", f"{r['mean_ms']:.3f}",
            f"{r['p99_ms']:.3f}", f"{r['cpu_median_ms']:.3f}", f"{r['cpu_ms']:.3f}",
            f"{r['cpu_median_ms'] / rows[0]['cpu_median_ms']:.2f}x",
            f"{r['state_mib']:.0f}",
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def plot(rows: list[dict], path: Path) -> None:
    contexts = [r["context"] for r in rows]
    note = "Wall: what a clock shows, other work on the machine included; CPU: the time this process computed"
    with picture(path, 9, 4.6, "Time for the next token, by the length of what came before", note) as figure:
        axis = figure.add_subplot()
        axis.grid()
        lines = []
        for name, label, color, width in (
            ("mean_ms", "wall, mean", ORANGE, THIN), ("median_ms", "wall, median", GREEN, THIN),
            ("cpu_ms", "CPU, mean", SKY, THIN), ("cpu_median_ms", "CPU, median", OURS, THICK),
        ):  # fmt: skip
            (line,) = axis.plot(contexts, [r[name] for r in rows], "o-", color=color, lw=width)
            lines.append((line, label))
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{n // 1024:,}k" if n >= 1024 else str(n) for n in contexts])
        axis.minorticks_off()
        axis.set_ylim(0, 1.1 * max(r["mean_ms"] for r in rows))
        axis.set(xlabel="entities (bytes) in the context", ylabel="milliseconds a token")
        label_ends(axis, lines)


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
    text = corpus.train.repeat(1 + (max(given.contexts) + 2 * given.tokens + 100) // len(corpus.train))
    if given.train:
        stream = batches(corpus.train, 16, 128, torch.Generator().manual_seed(0))
        stream = (tuple(x.to(given.device) for x in batch) for batch in stream)
        Trainer(model, steps=given.train, lr=6e-3, warmup=given.train // 4).fit(stream)
    model.eval()
    courses, tokens = [], given.tokens // ROUNDS + WARM
    for context in tqdm(given.contexts, desc="contexts"):
        courses.append(Course(model, text, context, ROUNDS * tokens, given.device))
    for _ in tqdm(range(ROUNDS), desc="tokens"):
        for course in courses:
            course.go_on(tokens)
    rows = [course.row() for course in courses]
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
