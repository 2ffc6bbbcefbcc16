"""Recall: associative recall of many pairs, which looks simple and which many attention-free models fail.

`recall_batch` makes the sequences: pairs of a key and a value, then queries, each a key that has been there. A model
that answers must look up what followed the same key earlier on. `scattered_batch` is the same as Zoology has it: a
large vocabulary, queries strewn over random tokens, mostly near, now and then far from their pair.

Source: Arora et al., Zoology: measuring and improving recall in efficient language models (2023).
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..runs.options import Options, UsageError
from ..runs.tasks import Task
from ..training.batches import generator_for
from ..training.losses import language_modelling
from .cells import Study, add_flags, asked, best_cells, main, markdown, options_of, positive, spread, use_threads, where
from .rivals import KINDS, contender

MODELS = ("dfn", "transformer++", "window")
ENOUGH = 0.99
LONGEST = 256
VOCABULARY = 8192  # Zoology's
POWER = 0.01  # of its gaps
JUDGED = 1000  # sequences
NAMES, MEASURED = "model/layers/dim/pairs/learning rate/seed", "share of queries answered (more is better)"


def recall_batch(
    batch: int, pairs: int, *, queries: int | None = None, keys: int = 32, vocab_size: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Multi-query associative recall: ``(ids, targets)``, int64 ``[batch, 2 * (pairs + queries)]``.

    First come ``pairs`` pairs of a key and a value, keys all different; then queries, 2 * pairs of them unless given,
    each a key of those followed by its value. Keys are the ids below ``keys``, values the others. targets are the value
    that follows where a queried key stands, and -100, "do not score", elsewhere.
    """
    if not 1 <= pairs <= keys < vocab_size:
        raise ValueError(f"recall_batch: needed is 1 <= pairs <= keys < vocab_size, got {pairs}, {keys}, {vocab_size}")
    key = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs]
    value = torch.randint(keys, vocab_size, (batch, pairs), generator=generator)
    asked = torch.randint(pairs, (batch, 2 * pairs if queries is None else queries), generator=generator)
    order = torch.cat([torch.arange(pairs).expand(batch, -1), asked], 1)
    ids = torch.stack([key.gather(1, order), value.gather(1, order)], -1).flatten(1)
    targets = torch.full_like(ids, -100)
    targets[:, 2 * pairs :: 2] = ids[:, 2 * pairs + 1 :: 2]
    return ids, targets


def scattered_batch(
    batch: int, pairs: int, length: int, *, vocab_size: int = VOCABULARY, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """As Zoology has it: ``(ids, targets)``, int64 ``[batch, length]``.

    After the pairs every key is asked once, at an even place; how far off falls with the power ``0.01 - 1``. All else
    is random. targets are the value where a queried key stands, which does not follow there, and -100 elsewhere.
    """
    free, keys = (length - 2 * pairs) // 2, vocab_size // 2
    if not 1 <= pairs <= min(free, keys - 1):
        raise ValueError(
            f"scattered_batch: length must be at least {4 * pairs} and vocab_size above {2 * pairs} for {pairs} pairs, "
            f"got {length} and {vocab_size}"
        )
    key = 1 + torch.rand(batch, keys - 1, generator=generator).argsort(1)[:, :pairs]
    value = keys + torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs]
    chance = torch.arange(1, free + 1, dtype=torch.float64) ** (POWER - 1)
    gaps = torch.multinomial(chance.expand(batch, -1), pairs, generator=generator)
    ids = torch.randint(vocab_size, (batch, length), generator=generator)
    ids[:, : 2 * pairs] = torch.stack([key, value], -1).flatten(1)
    places = 2 * pairs + 2 * gaps
    ids.scatter_(1, places, key)
    return ids, torch.full_like(ids, -100).scatter_(1, places, value)


class Recall(Task):
    """Batches of recall; ``held_out_loss`` is the share of `JUDGED` sequences' queries that are answered."""

    partial = False

    def __init__(self, options: Options, build: Callable[[], nn.Module], draw: Callable, vocab_size: int = 64):
        super().__init__(options)
        self.build, self.draw, self.vocab_size = build, draw, vocab_size

    def model(self) -> nn.Module:
        return self.build()

    def batch(self, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        return self.draw(self.options.batch, generator)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return language_modelling(model(batch[0])[0], batch[1])

    def held_out_loss(self, model: nn.Module, batches: int = 0) -> float:
        ids, targets = self.draw(JUDGED, generator_for("held out", self.options.seed))
        device = next(model.parameters()).device
        return recall_accuracy(model, ids.to(device), targets.to(device), self.vocab_size)


@torch.no_grad()
def recall_accuracy(model: nn.Module, ids: Tensor, targets: Tensor, vocab_size: int = 64) -> float:
    """The share of the queries, targets that are not -100, whose value is the likeliest."""
    rows = max(1, 2**25 // (ids.shape[1] * vocab_size))  # what 128 MiB of logits hold
    right = [model(i)[0].argmax(-1) == t for i, t in zip(ids.split(rows), targets.split(rows), strict=True)]
    return torch.cat(right)[targets >= 0].float().mean().item()


# ---- the study ------------------------------------------------------------------------------------------------------
def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(MODELS), help="default: " + " ".join(MODELS))
    parser.add_argument("--pairs", type=positive, nargs="+", default=[4, 8, 16, 32, 64], help="default: 4 8 16 32 64")
    parser.add_argument("--dims", type=positive, nargs="+", default=[64, 128], help="sizes of a state")
    parser.add_argument("--depths", type=positive, nargs="+", default=[1, 2], help="numbers of layers")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3], help="learning rates to try")
    parser.add_argument("--zoology", action="store_true", help="8,192 tokens and scattered queries")
    parser.add_argument("--evaluations", type=positive, default=15, help="points of a curve (default: 15)")
    add_flags(parser, "study-recall", steps=1500, batch=32, k=16, pos_dim=8, convolution=4, warmup=200,
              weight_decay=0.01, seed=0)  # fmt: skip


def setting(pairs: int, zoology: bool) -> tuple[int, int]:
    """Vocabulary and length."""
    if pairs > 64:
        raise UsageError(f"pairs must be at most 64, which {LONGEST} tokens hold with their queries, got {pairs}")
    if zoology:
        return VOCABULARY, min(LONGEST, max(64, 16 * pairs))
    return 2 * max(32, pairs), min(6 * pairs, LONGEST)


def run(arguments: argparse.Namespace) -> dict:
    use_threads(arguments)
    grows = ("models", "pairs", "dims", "depths", "rates")
    settings = {pairs: setting(pairs, arguments.zoology) for pairs in arguments.pairs}
    study = Study("recall", arguments.out, asked(arguments, *grows), names=NAMES, evaluations=arguments.evaluations,
                  progress=not arguments.quiet)  # fmt: skip

    def compute(kind: str, layers: int, dim: int, pairs: int, rate: float, seed: int) -> dict:
        vocab_size, length = settings[pairs]
        config = dict(vocab_size=vocab_size, dim=dim, layers=layers, k=arguments.k, pos_dim=arguments.pos_dim,
                      block_options=dict(convolution=arguments.convolution))  # fmt: skip
        options = options_of(arguments, lr=rate, seed=seed, dim=dim, layers=layers, length=length)

        def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            if arguments.zoology:
                return scattered_batch(batch, pairs, length, vocab_size=vocab_size, generator=generator)
            queries, keys = length // 2 - pairs, vocab_size // 2
            return recall_batch(batch, pairs, queries=queries, keys=keys, vocab_size=vocab_size, generator=generator)

        def cell(folder) -> dict:
            build = lambda: contender(kind, config, length, same_shape=True)  # noqa: E731
            result = study.trained(lambda o: Recall(o, build, draw, vocab_size), options, folder)[1]
            after = next((point["step"] for point in result["curve"] if point["value"] >= ENOUGH), None)
            return {**result, "steps_to_99": after, "length": length, "vocabulary": vocab_size}

        return study.cell(f"{kind}/{layers}/{dim}/{pairs}/{rate:g}/{seed}", cell)

    with study.reported(table):
        for layers in arguments.depths:
            for dim in arguments.dims:
                for pairs in arguments.pairs:
                    for kind in arguments.models:
                        one = lambda r, s, a=(kind, layers, dim, pairs): compute(*a, r, s)  # noqa: E731
                        rate = study.best_rate(arguments.rates, arguments.seed, one, most=True)
                        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                            one(rate, seed)
    return study.found


def table(found: dict) -> str:
    """Markdown: a row per number of layers, size, number of pairs and model."""
    o, rows = found["options"], []
    best = best_cells(found, most=True)
    places = {(int(layers), int(dim), int(pairs), kind): cells for (kind, layers, dim, pairs), cells in best.items()}
    for (layers, dim, pairs, kind), (rate, cells) in sorted(places.items()):
        reached = [c["steps_to_99"] for c in cells]
        after = spread([r for r in reached if r is not None], 0) if any(reached) else "not reached"
        missed = f" ({reached.count(None)} not)" if any(reached) and None in reached else ""
        rows.append([str(layers), str(dim), str(pairs), str(cells[0]["length"]), kind, f"{cells[0]['parameters']:,}",
                     rate, str(len(cells)), spread([100 * c["value"] for c in cells], 2),
                     f"{100 * min(c['value'] for c in cells):.2f}", after + missed])  # fmt: skip
    failed = "; ".join(f"{key} {c['failed']}" for key, c in found["cells"].items() if "failed" in c)
    head = ["layers", "dim", "pairs", "length", "model", "parameters", "learning rate", "seeds", "recalled, %",
            "worst seed", "99 % after steps"]  # fmt: skip
    kind = "8,192 tokens, scattered queries" if o["zoology"] else "a small vocabulary, queries after the pairs"
    return "\n\n".join([
        f"# Recall, {kind}",
        f"{o['steps']:,} steps of {o['batch']} sequences; queries of {JUDGED:,} sequences not trained on, mean ± "
        "standard deviation of the seeds. Rivals have as many layers, the same dim and as many parameters.",
        markdown(head, rows),
        *([f"Ended early: {failed}."] if failed else []),
        where(found),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("recall"))
