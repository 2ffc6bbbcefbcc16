"""Length: models trained at one length and judged far beyond it, and a needle found again over distance.

Text: bits per byte by place, so that one pass over the longest window tells of all shorter ones: these models are
causal. Needle: a mark and ``span`` symbols after it somewhere in noise, and the same symbols asked for at the end; a
span of one is a needle, a longer one a copy.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..runs.options import Options
from ..runs.tasks import Task
from ..training.batches import generator_for
from .cells import Study, add_flags, asked, best_cells, main, markdown, options_of, positive, spread, use_threads, where
from .language import SIZES
from .rivals import contender
from .sources import SplitText, bits_by_place, split_by_content, windows

# Of four heads two are without time, where the recommended block has one.
DFNS = {"dfn": {}, "semantic": dict(semantic=2)}  # options of their blocks
MODELS = (*DFNS, "transformer++", "window")  # the plain Transformer ends where it was trained
REMEMBERS = ", memory"  # what the name of a DFN with a memory ends with
TASKS = ("text", "needle")
HERE, WHICH, NOISE, SYMBOLS = 0, 1, 30, 32  # ids: two marks, then noise, then symbols
TOKENS = 2 + NOISE + SYMBOLS
NAMES, MEASURED = "task/model/learning rate/seed", "held-out bits per byte (less is better), or share of needles found"


def needle_batch(
    batch: int, length: int, span: int = 1, *, distance: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``(ids, targets)``, int64 ``[batch, length]``: the last ``span`` targets are the needle, all others -100.

    ``distance``: from the first symbol of the needle to where it is asked for; without it one of 1 to what fits, evenly
    on a scale of logarithms, for each row.
    """
    ask = length - span  # where WHICH stands
    most = ask - 1
    if distance is not None and not span <= distance <= most or span > most:
        raise ValueError(f"needle_batch: distance must be between span = {span} and {most}, got {distance}")
    ids = 2 + torch.randint(NOISE, (batch, length), generator=generator)
    symbols = 2 + NOISE + torch.randint(SYMBOLS, (batch, span), generator=generator)
    if distance is None:
        exponent = torch.rand(batch, 1, generator=generator, dtype=torch.float64)
        distances = (span * (most / span) ** exponent).long().clamp(span, most)
    else:
        distances = torch.full((batch, 1), distance)
    first = ask - distances
    ids.scatter_(1, first - 1, HERE)
    ids.scatter_(1, first + torch.arange(span), symbols)
    ids[:, ask] = WHICH
    ids[:, ask + 1 :] = symbols[:, :-1]
    targets = torch.full_like(ids, -100)
    targets[:, ask:] = symbols
    return ids, targets


class Needle(Task):
    """Needles; a model with a memory reads a row in segments of ``segment`` tokens, with the memory between them."""

    partial = False

    def __init__(self, options: Options, build: Callable[[], nn.Module], span: int, segment: int | None):
        super().__init__(options)
        self.build, self.span, self.segment, self.graphable = build, span, segment, segment is None

    def model(self) -> nn.Module:
        return self.build()

    def batch(self, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        return needle_batch(self.options.batch, self.options.length, self.span, generator=generator)

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Of the last ``span`` places."""
        memory, N = None, ids.shape[1]
        segment = self.segment or N
        for piece in ids.split([N % segment or segment, *[segment] * ((N - 1) // segment)], 1):  # the last one whole
            logits, memory = model(piece, memory)
        return logits[:, -self.span :]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.logits(model, batch[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[1][:, -self.span :].flatten())

    def held_out_loss(self, model: nn.Module, batches: int = 256) -> float:
        """The share of symbols found at the length trained on."""
        generator = generator_for("held out", self.options.seed)
        return self.found(model, needle_batch(batches, self.options.length, self.span, generator=generator))

    @torch.no_grad()
    def found(self, model: nn.Module, batch: tuple[Tensor, Tensor], tokens: int = 2**17) -> float:
        device = next(model.parameters()).device
        rows = max(1, tokens // batch[0].shape[1])
        right = [
            (self.logits(model, ids.to(device)).argmax(-1) == targets[:, -self.span :].to(device)).float().cpu()
            for ids, targets in zip(batch[0].split(rows), batch[1].split(rows), strict=True)
        ]
        return float(torch.cat(right).mean())


# ---- the study ------------------------------------------------------------------------------------------------------
def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--parameters", choices=SIZES, default="0.3M", help="parameters of the DFN (default: 0.3M)")
    parser.add_argument("--longest", type=positive, default=2**16, help="length judged at (default: 65,536)")
    parser.add_argument("--rows", type=positive, default=8, help="windows, and needles, of that length (default: 8)")
    parser.add_argument("--span", type=positive, default=1, help="symbols of a needle (default: 1; 8 is a copy)")
    parser.add_argument("--rates", type=float, nargs="+", default=[6e-3], help="learning rates to try (default: 6e-3)")
    parser.add_argument("--memory-size", type=positive, default=256, help="of the DFN with a memory (default: 256)")
    add_flags(parser, "study-length", data=None, steps=2000, batch=8, length=512, k=16, pos_dim=8, convolution=4,
              warmup=100, weight_decay=0.01, seed=0)  # fmt: skip


def model_of(kind: str, vocab_size: int, arguments: argparse.Namespace) -> nn.Module:
    """The model that the study calls so; a rival is as large as the DFN."""
    name, remembers, _ = kind.partition(REMEMBERS)
    config = dict(vocab_size=vocab_size, k=arguments.k, pos_dim=arguments.pos_dim, **SIZES[arguments.parameters],
                  memory_size=arguments.memory_size if remembers else 0,
                  block_options=dict(convolution=arguments.convolution, **DFNS.get(name, {})))  # fmt: skip
    return contender("dfn" if name in DFNS else name, config, arguments.length)


def lengths(shortest: int, longest: int) -> list[int]:
    """The shortest, doubled until the longest."""
    found = [shortest]
    while found[-1] * 2 <= longest:
        found.append(found[-1] * 2)
    return found


def needles(rows: int, length: int, longest: int) -> int:
    """How many are judged on at a length: the shorter, the more."""
    return max(rows, rows * longest // (8 * length))


def run(arguments: argparse.Namespace) -> dict:
    use_threads(arguments)
    if arguments.longest < arguments.length:
        raise ValueError(f"longest must be at least length = {arguments.length}, got {arguments.longest}")
    judged_at = lengths(arguments.length, arguments.longest)
    split = split_by_content(arguments.data) if "text" in arguments.tasks else None
    if split is not None:
        long = windows(split.held_out, judged_at[-1], arguments.rows)
        short = windows(split.held_out, arguments.length, arguments.rows * judged_at[-1] // arguments.length)
    study = Study("length", arguments.out, asked(arguments, "data", "models", "tasks", "rates"),
                  names=NAMES, evaluations=4, progress=not arguments.quiet)  # fmt: skip
    if split is not None:
        facts = study.found.setdefault("text", split.facts(long))
        if facts != split.facts(long):
            raise ValueError(f"{arguments.out} holds a study of other data; another --out begins a new one")

    def options(rate: float, seed: int) -> Options:
        return options_of(arguments, lr=rate, seed=seed, memory_size=0)

    def text(kind: str, rate: float, seed: int) -> dict:
        def cell(folder) -> dict:
            build = lambda: model_of(kind, 256, arguments)  # noqa: E731
            judge = lambda model: float(bits_by_place(model, short).mean())  # noqa: E731
            task = lambda o: SplitText(o, build, split, judge)  # noqa: E731
            model, result = (lambda r: (r[0].model, r[1]))(study.trained(task, options(rate, seed), folder))
            places = bits_by_place(model, long, rows=1)
            stretches = zip([0, *judged_at[:-1]], judged_at, strict=True)
            by_stretch = {str(end): float(places[start:end].mean()) for start, end in stretches}
            by_length = {str(end): float(places[:end].mean()) for end in judged_at}
            return {**result, "by_stretch": by_stretch, "by_length": by_length}

        return study.cell(f"text/{kind}/{rate:g}/{seed}", cell)

    def needle(kind: str, rate: float, seed: int) -> dict:
        segment = max(arguments.span + 1, arguments.length // 4) if kind.endswith(REMEMBERS) else None

        def cell(folder) -> dict:
            build = lambda: model_of(kind, TOKENS, arguments)  # noqa: E731
            trained, result = study.trained(
                lambda o: Needle(o, build, arguments.span, segment), options(rate, seed), folder
            )
            by_distance = {}
            for length in [max(2 * arguments.span + 2, arguments.length // 8), *judged_at]:
                generator = generator_for("judged", seed)
                distance = length - arguments.span - 1
                rows = needles(arguments.rows, length, judged_at[-1])
                batch = needle_batch(rows, length, arguments.span, distance=distance, generator=generator)
                by_distance[str(distance)] = trained.task.found(trained.model, batch)
            return {**result, "by_distance": by_distance}

        return study.cell(f"needle/{kind}/{rate:g}/{seed}", cell)

    remembering = [kind + REMEMBERS for kind in DFNS if kind in arguments.models]
    with study.reported(table):
        for task, compute, more in (("text", text, []), ("needle", needle, remembering)):
            if task not in arguments.tasks:
                continue
            for kind in (*arguments.models, *more):
                one = lambda r, s, a=(compute, kind): a[0](a[1], r, s)  # noqa: E731
                rate = study.best_rate(arguments.rates, arguments.seed, one, most=task == "needle")
                for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                    one(rate, seed)
    return study.found


def table(found: dict) -> str:
    """Markdown: bits per byte by length, and needles by distance."""
    o, parts = found["options"], ["# Length"]
    parts.append(f"Trained at {o['length']}, {o['steps']:,} steps of {o['batch']} rows; mean ± standard deviation of "
                 f"the seeds, {o['rows']} windows of the longest length.")  # fmt: skip
    for task, name, digits, factor in (("text", "by_length", 3, 1), ("needle", "by_distance", 0, 100)):
        both = best_cells(found, most=task == "needle")
        best = {kind: cells for (of, kind), cells in both.items() if of == task}
        if not best:
            continue
        ends = list(next(iter(best.values()))[1][0][name])
        rows = [
            [kind, f"{cells[0]['parameters']:,}", str(len(cells)),
             *(spread([factor * c[name][end] for c in cells], digits) for end in ends)]
            for kind, (_, cells) in best.items()
        ]  # fmt: skip
        said = "Bits per byte of windows of so many bytes, held out; less is better."
        if task == "needle":
            judged_at = [int(end) + o["span"] + 1 for end in ends]
            judged_on = ", ".join(str(needles(o["rows"], length, judged_at[-1])) for length in judged_at)
            said = (f"Needles of {o['span']} found over a distance, %; guessing finds {100 / SYMBOLS:.0f} %. "
                    f"Every seed is judged on {judged_on} of them.")  # fmt: skip
        parts += [said, markdown(["model", "parameters", "seeds", *(f"{int(end):,}" for end in ends)], rows)]
    if "text" in found:
        evenly = ", spread evenly over what is held out," if "judged_windows" in found["text"] else ""
        parts.append(f"Data: {found['text']['name']}; windows{evenly} run across files, which follow one another.")
    return "\n\n".join([*parts, where(found)]) + "\n"


if __name__ == "__main__":
    sys.exit(main("length"))
