"""A task that needs a memory: facts in one segment, questions about them in the next, which does not see the first."""

import torch
from torch import Tensor, nn

from ..models.language import DFNLanguageModel
from ..training.trainer import Trainer

KEYS, VALUES = 6, 4
CONFIG = dict(vocab_size=(KEYS + 1) * VALUES + KEYS, dim=32, layers=1, pos_dim=3, k=8, memory_size=32)


def two_segments(batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(first, its targets, second, its targets)``, int64: all keys with a value each and some questions, then more.

    A fact is one token, a key and its value together; a question is a key alone. The target of a question is the
    value; -100, "do not score", elsewhere.
    """

    def questions() -> tuple[Tensor, Tensor]:
        asked = torch.randint(KEYS, (batch, KEYS), generator=generator)
        return KEYS * VALUES + asked, value.gather(1, asked)

    value = torch.randint(VALUES, (batch, KEYS), generator=generator)
    order = torch.rand(batch, KEYS, generator=generator).argsort(1)
    facts = order * VALUES + value.gather(1, order)
    (first, targets), (second, second_targets) = questions(), questions()
    unscored = torch.full_like(facts, -100)
    return torch.cat([facts, first], 1), torch.cat([unscored, targets], 1), second, second_targets


def segments_accuracy(
    config: dict = CONFIG, *, remember: bool = True, steps: int = 130, seed: int = 0, progress: bool = False
) -> tuple[float, float]:
    """Trains a small model, and says how many questions it answers in the first and in the second segment.

    ``remember=False`` forgets between the segments; ``config`` are the arguments of a `DFNLanguageModel`.
    Guessing one of four gives 0.25.
    """

    def answers(model: nn.Module, batch: tuple) -> tuple[Tensor, Tensor]:
        first, _, second, _ = batch
        a, memory = model(first)
        return a, model(second, memory if remember else None)[0]

    def loss(model: nn.Module, batch: tuple) -> Tensor:
        found, wanted = torch.cat(answers(model, batch), 1), torch.cat([batch[1], batch[3]], 1)
        return nn.functional.cross_entropy(found.flatten(0, 1), wanted.flatten())

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DFNLanguageModel(**config)
    generator = torch.Generator().manual_seed(seed + 1)
    trainer = Trainer(model, loss=loss, steps=steps, lr=1.5e-2, warmup=10)
    trainer.fit((two_segments(48, generator) for _ in range(steps)), progress=progress)
    with torch.no_grad():
        test = two_segments(500, generator)
        found = [x.argmax(-1) for x in answers(model, test)]
    return tuple(float((f == t)[t >= 0].float().mean()) for f, t in zip(found, (test[1], test[3]), strict=True))


def run_memory(steps: int = 130, seed: int = 0) -> dict[str, float]:
    """The share of questions answered, with the memory and forgetting in between."""
    figures = {}
    for name, remember in (("with memory", True), ("forgetting", False)):
        same, following = segments_accuracy(remember=remember, steps=steps, seed=seed)
        figures |= {f"{name}, same": same, f"{name}, next": following}
    return {**figures, "guessing": 1 / VALUES}
