"""Associative recall: a task that looks simple and that many attention-free models fail; and a Transformer to compare.

`recall_batch` makes the sequences: pairs of a key and a value, then queries, each a key that has been there. A model
that answers must look up what followed the same key earlier on.
"""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..models.language import DFNLanguageModel
from ..models.layers import count_parameters
from ..training.trainer import Trainer

MODELS = ("dfn", "transformer")
ENOUGH = 0.99


def recall_batch(
    batch: int, pairs: int, *, keys: int = 32, vocab_size: int = 64, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: ``(ids, targets)``, int64 ``[batch, 6 * pairs]``.

    First come ``pairs`` pairs of a key and a value, keys all different; then 2 * pairs queries, each a key of those
    followed by its value. Keys are the ids below ``keys``, values the others. targets are the value that follows
    where a queried key stands, and -100, "do not score", elsewhere.
    """
    if not 1 <= pairs <= keys < vocab_size:
        raise ValueError(f"recall_batch: needed is 1 <= pairs <= keys < vocab_size, got {pairs}, {keys}, {vocab_size}")
    key = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs]
    value = torch.randint(keys, vocab_size, (batch, pairs), generator=generator)
    asked = torch.randint(pairs, (batch, 2 * pairs), generator=generator)
    order = torch.cat([torch.arange(pairs).expand(batch, -1), asked], 1)
    ids = torch.stack([key.gather(1, order), value.gather(1, order)], -1).flatten(1)
    targets = torch.full_like(ids, -100)
    targets[:, 2 * pairs :: 2] = ids[:, 2 * pairs + 1 :: 2]
    return ids, targets


class TransformerLanguageModel(nn.Module):
    """The usual one, pre-norm with learned positions, of about as many parameters as `DFNLanguageModel`.

    Its MLP is 2 d wide, so that a layer has 8 d^2 weights like a `DFNBlock`. ``(ids [B, N], memory=None)`` gives
    ``(logits [B, N, V], None)``; N is at most ``max_length``.
    """

    def __init__(self, vocab_size: int = 256, dim: int = 128, layers: int = 3, heads: int = 4, max_length: int = 256):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, dim), nn.Embedding(max_length, dim)
        nn.init.normal_(self.place.weight, std=0.02)
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, heads, 2 * dim, **options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        N = ids.shape[1]
        states = self.embed(ids) + self.place.weight[:N]
        mask = nn.Transformer.generate_square_subsequent_mask(N, ids.device, states.dtype)
        for block in self.blocks:
            states = block(states, mask, is_causal=True)
        return self.head(self.norm(states)), None


@torch.no_grad()
def recall_accuracy(model: nn.Module, ids: Tensor, targets: Tensor) -> float:
    """The share of the queries, targets that are not -100, whose value is the likeliest."""
    right = [model(i)[0].argmax(-1) == t for i, t in zip(ids.split(250), targets.split(250), strict=True)]
    return torch.cat(right)[targets >= 0].float().mean().item()


def run_recall(
    model: str = "dfn", pairs: int = 8, seeds: Iterable[int] = (0, 1, 2), steps: int = 1500, *, batch: int = 32,
    dim: int = 64, layers: int = 2, vocab_size: int = 64, lr: float = 3e-3, warmup: int = 200,
    evaluations: int = 15, device: str = "cpu", progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Trains a model with default options per seed on ``recall_batch(batch, pairs)`` and says how much it recalls.

    Args:
        model: "dfn" or "transformer", of about the same number of parameters.
        pairs: 1 to half the vocabulary, whose lower half are keys; sequences are ``6 * pairs`` long.
        lr, warmup: the highest learning rate, and the steps that lead up to it. Fewer of them let a run end at 97 or
            98 % now and then: an id whose entities are thrown far away early on is out of reach of the Gaussian, and
            with it of the gradient.
        evaluations: how often the accuracy is taken on the way, on 250 sequences.
        progress: show a bar per run.

    Returns a dictionary per seed: ``model, pairs, length, seed, steps, batch, lr, warmup, parameters``, ``accuracy``
    (0 to 1, on 1,000 sequences not trained on), ``curve`` (pairs of step and accuracy), ``steps_to_99`` (the first of
    the curve with 99 %, or None), ``loss`` (mean of the last 20 steps, nats), ``seconds``. On the CPU it runs on one
    thread, for which such a model is just large enough.

    Raises ValueError (model, pairs) and NonFiniteLoss (training).
    """
    if model not in MODELS:
        raise ValueError(f"run_recall: model must be one of {', '.join(MODELS)}, got {model!r}")
    threads, keys = torch.get_num_threads(), vocab_size // 2

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids, targets = recall_batch(count, pairs, keys=keys, vocab_size=vocab_size, generator=generator)
        return ids.to(device), targets.to(device)

    def stream(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(batch, generator)

    results = []
    torch.set_num_threads(1)
    try:
        for seed in seeds:
            held_out = draw(1000, torch.Generator().manual_seed(seed + 2**32))
            glance = tuple(x[:250] for x in held_out)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                if model == "dfn":
                    net = DFNLanguageModel(vocab_size=vocab_size, dim=dim, layers=layers).to(device)
                else:
                    net = TransformerLanguageModel(vocab_size, dim, layers, max_length=6 * pairs).to(device)
            trainer, began = Trainer(net, steps=steps, lr=lr, warmup=warmup), time.perf_counter()
            history = trainer.fit(
                stream(torch.Generator().manual_seed(seed)),
                evaluate=lambda net=net, glance=glance: recall_accuracy(net, *glance),
                evaluations=evaluations,
                progress=progress,
            )
            curve = [(step, accuracy) for step, _, accuracy in history.evaluated]
            results.append(dict(
                model=model, pairs=pairs, length=6 * pairs, seed=seed, steps=steps, batch=batch, lr=lr, warmup=warmup,
                parameters=count_parameters(net), accuracy=recall_accuracy(net, *held_out), curve=curve,
                steps_to_99=next((step for step, accuracy in curve if accuracy >= ENOUGH), None),
                loss=sum(history.losses[-20:]) / len(history.losses[-20:]),
                seconds=round(time.perf_counter() - began, 1),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return results


def recall_table(results: list[dict]) -> str:
    """Markdown: a row per run of `run_recall`."""
    lines = ["| model | parameters | pairs | length | seed | recalled | 99 % after |", "|---|---|---|---|---|---|---|"]
    for r in results:
        after = "not reached" if r["steps_to_99"] is None else f"{r['steps_to_99']:,} steps"
        size = f"{r['parameters']:,} | {r['pairs']} | {r['length']} | {r['seed']}"
        lines.append(f"| {r['model']} | {size} | {100 * r['accuracy']:.2f} % | {after} |")
    return "\n".join(lines)
