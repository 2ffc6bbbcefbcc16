"""Everything that decides what a run ends with: the flags of `dfn train`, and the keys of its TOML file."""

import os
from dataclasses import dataclass, field, fields

from dfn_kernels.knn import MOST_NEIGHBORS

from ..models.language import ABLATIONS
from ..training.checkpoints import CheckpointError

# What `dfn train KIND` knows, by name. Subclasses of `dfn.runs.Task`, which hold their defaults, register here.
KINDS: dict[str, type] = {}
LARGEST = 2**31 - 1  # integer


class UsageError(ValueError):
    """An option that cannot be: bad usage, not a failed run."""


def option(default, help: str, least: float | None = None, choices: tuple[str, ...] = (), most: float = 0):
    """``most`` 0: no limit but that of integers, `LARGEST`."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))


@dataclass(frozen=True)
class Options:
    """One field for each flag; its metadata say what it means and what it may be."""

    kind: str
    data: str | None = option(None, "file or folder to learn from (default: what this machine has)")
    field: str = option("image", "what contrastive and masked runs look at", choices=("image", "sound", "text"))
    seed: int = option(0, "of the weights and of the data's order", 0, most=2**63 - 1)
    steps: int = option(1000, "length of the run", 1)
    batch: int = option(16, "rows in a step, over all processes", 1)
    accumulate: int = option(1, "parts that a batch is worked through in, to save memory", 1)
    length: int = option(128, "bytes in a row of text", 1)
    entities: int = option(48, "entities sampled from a field", 1)
    size: int = option(32, "side of a crop, in pixels, in steps of a spectrogram, or in fours of bytes of a text", 3)
    dim: int = option(64, "size of a state", 1)
    layers: int = option(2, "blocks", 1)
    heads: int = option(4, "heads in a block; they divide the size of a state", 1)
    pos_dim: int = option(2, "dimension of a position", 1)
    k: int = option(8, "neighbours that a head reads from", 1, most=MOST_NEIGHBORS)
    memory_size: int = option(0, "entities of a persistent memory; rows then are consecutive pieces of the text", 0)
    pack: bool = option(False, "keep files apart: no row of text mixes two, each is read as if alone")
    without: str = option("", "a part to leave out of a language model", choices=("", *ABLATIONS))
    block: str = option("recommended", "of a language model: today's, or that of runs begun before 26 November 2026",
                        choices=("recommended", "first"))  # fmt: skip
    semantic: int = option(0, "heads without time, which find what lies far back (0: one in four)", 0)
    convolution: int = option(
        4, "bytes, it and those before, that a language model's block brings together (0: none)", 0
    )
    dropout: float = option(0.0, "share of a language model's updates that is left out in training", 0, most=1)
    attention_dropout: float = option(0.0, "share of the entities that a head hardly hears in training", 0, most=0.99)
    confidence_penalty: float = option(0.0, "how much a language model is rewarded for the entropy of what it says", 0)
    lr: float = option(6e-3, "largest step length of AdamW", 0)
    warmup: int = option(50, "steps until lr is reached", 0)
    weight_decay: float = option(0.01, "how much AdamW shrinks the matrices in a step, times lr", 0)
    geometry_rate: float = option(1.0, "step length of the heads' widths, offsets and time scales, times lr", 1e-3)
    clip: float = option(1.0, "largest norm of the gradient; a longer one is scaled down", 0)
    dtype: str = option("float32", "of matrix products", choices=("float32", "bfloat16"))
    keep: str = option("last", "the weights to end with: the last, or the best held out", choices=("last", "best"))
    threads: int = option(0, "threads of the CPU (0: as many as take the least time for a step)", 0)

    @classmethod
    def of(cls, kind: str, **given) -> "Options":
        """The kind's defaults and what is given. Raises UsageError for what is out of range or of no use to the kind.

        A relative path of data is meant from here, wherever the run is gone on with.
        """
        if kind not in KINDS:
            raise UsageError(f"KIND must be one of {', '.join(KINDS)}, got {kind}")
        task = KINDS[kind]
        for name in given:
            if task.own is not None and name in OWN and name not in task.own:
                raise UsageError(f"--{name.replace('_', '-')} has no meaning for {kind}")
        if given.get("data") is not None:
            given["data"] = os.path.abspath(given["data"])
            if not os.path.exists(given["data"]):
                raise UsageError(f"no such file or folder: {given['data']}")
        options = cls(kind, **{**task.defaults_for(given), **given})
        options._check()
        task.check(options, given)
        return options

    @classmethod
    def restored(cls, facts: dict, where: object) -> "Options":
        """Those of a checkpoint. Raises CheckpointError for what this version of the package does not know."""
        kept = facts.get("options", {})
        if unknown := sorted(set(kept) - {f.name for f in fields(cls)}):
            raise CheckpointError(f"{where} has an option that is not known here: {unknown[0]}")
        if kept.get("kind") not in KINDS:
            raise CheckpointError(f"{where} is of a kind that is not known here: {kept.get('kind')}")
        return cls(**{"block": "first", "convolution": 0, **kept})  # older checkpoints do not say

    def _check(self) -> None:
        for f in fields(self)[1:]:
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            if least is not None and not least <= value < float("inf"):
                raise UsageError(f"{f.name} must be at least {least}, got {value}")
            most = f.metadata["most"] or (LARGEST if isinstance(value, int) else None)
            if most is not None and value > most:
                raise UsageError(f"{f.name} must be at most {most}, got {value}")
            if choices and value not in choices:
                raise UsageError(f"{f.name} must be one of {', '.join(filter(None, choices))}, got {value}")
        if self.dim % self.heads:
            raise UsageError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.batch % self.accumulate:
            raise UsageError(f"batch must be a multiple of accumulate, got {self.batch} and {self.accumulate}")
        if self.accumulate > 1 and self.kind in ("contrastive", "joint"):
            raise UsageError(f"accumulate must be 1 for {self.kind}, which tells the rows of a batch apart, "
                             f"got {self.accumulate}")  # fmt: skip
        if self.memory_size and self.pack:
            raise UsageError("pack has no meaning with a memory: its rows are consecutive pieces of one text")
        if self.memory_size and self.accumulate > 1:
            raise UsageError(f"accumulate must be 1 with a memory, got {self.accumulate}")

    def shape(self) -> dict:
        """The arguments that all models share."""
        return {name: getattr(self, name) for name in SHAPE}


SHAPE = ("dim", "layers", "heads", "pos_dim", "k")
MODEL = (*SHAPE, "memory_size", "without", "block", "semantic", "convolution")  # what weights depend on
# which not every kind has a use for
OWN = ("data", "field", "length", "entities", "size", "memory_size", "pack", "without", "block", "semantic",
       "convolution", "dropout", "attention_dropout", "confidence_penalty")  # fmt: skip
