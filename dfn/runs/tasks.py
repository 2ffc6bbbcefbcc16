"""What `dfn train KIND` trains: for each kind its data, its model, its loss and what it is judged by.

A kind of your own is a subclass of `Task` in the dict `KINDS`; CONTRIBUTING.md has one of fifteen lines.
"""

import functools
import zlib

import torch
from torch import Tensor, nn

from ..fields.sampler import Entities
from ..models.field_models import DFNClassifier, DFNFieldModel
from ..models.language import DFNLanguageModel, ablated
from ..models.layers import FIRST_BLOCK, recommended_heads
from ..models.memory import MemoryState
from ..training.batches import generator_for, map_tensors
from ..training.losses import contrastive, field_reconstruction, language_modelling, mean_state_loss
from ..training.text import Corpus, batches, load_corpus, packed_batches
from ..training.trainer import language_model_loss
from . import bits, digits, joint
from .crops import FREQUENCIES, channels_of, load_crops, mean_error, sampler_of
from .options import KINDS, Options, UsageError
from .tables import Words


class Task:
    """One kind of run. Data is read when it is first needed, so that a model can be built without it.

    A batch is made of tensors with one row per example (see `Trainer`); what is random in it is drawn here, from
    ``generator``, whose state is the run's place in its data.
    """

    defaults: dict = {}
    own: tuple[str, ...] | None = None  # options it has a use for, of those that not every kind has (`options.OWN`)
    unit = "nats"  # of the loss, as shown; "bits" shows nats as bits
    counted = "entities"  # what a batch is made of
    partial = True  # the loss may leave out parameters of the model (see `Trainer`)
    graphable = True  # the loss keeps nothing of its own between steps, so that a CUDA graph can hold the step

    progress = False  # bars for what takes long in `figures`
    words: Words = {"held-out loss": ("loss on held-out data", "nats (less is better)")}  # of its `figures`

    def __init__(self, options: Options):
        self.options = options

    @classmethod
    def defaults_for(cls, given: dict) -> dict:
        """`defaults`, where they depend on other options."""
        return cls.defaults

    @classmethod
    def check(cls, options: Options, given: dict) -> None:
        """Raises UsageError for options that cannot be together."""

    def model(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must define model")

    def batch(self, generator: torch.Generator, held_out: bool = False):
        """The next batch, or one that was never trained on."""
        raise NotImplementedError(f"{type(self).__name__} must define batch")

    def loss(self, model: nn.Module, batch) -> Tensor:
        """The mean over the rows, 0-d."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What the trained model is judged by, held out, by name."""
        return {"held-out loss": self.held_out_loss(model, 16)}

    def summary(self) -> str:
        """The data, in one line."""
        return self.options.kind

    def judged_on(self) -> str:
        """The data that `figures` look at, in words."""
        return "held-out data"

    def fingerprint(self) -> int:
        """Tells other data from these: a run is resumed only on the data it began with."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside model, optimizer and generator; the same in every process."""
        return {}

    def row_state(self) -> dict[str, Tensor]:
        """The same for what every row has its own of: a process has that of its rows."""
        return {}

    def load_state(self, state: dict[str, Tensor], row_state: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, batches: int = 2) -> float:
        generator = generator_for("held out", 1)
        device = next(model.parameters()).device
        return sum(float(self.loss(model, move(self.batch(generator, True), device))) for _ in range(batches)) / batches


def fits(options: Options, cells: int, axes: int) -> None:
    if options.entities > cells:
        raise UsageError(f"entities must be at most the {cells} cells of a field, got {options.entities}")
    if options.pos_dim < axes:
        raise UsageError(f"pos_dim must be at least the {axes} axes of a field, got {options.pos_dim}")


def move(batch, device: torch.device):
    return map_tensors(lambda x: x.to(device), batch)


class Text(Task):
    """a causal language model of bytes"""

    defaults = dict(dim=128, layers=3, pos_dim=8, k=16, warmup=100)
    own = ("data", "length", "memory_size", "pack", "without", "block", "semantic", "dropout",
           "convolution", "attention_dropout", "confidence_penalty")  # fmt: skip
    unit, counted, partial = "bits", "bytes", False
    place, shift, memory = 0, 0, None  # of a text read in consecutive pieces
    words = {
        "model": ("this model", "bits per byte (less is better)"),
        "gzip": ("gzip -9, which has learned from nothing", "bits per byte"),
        "bzip2": ("bzip2 -9, the same", "bits per byte"),
        "xz": ("xz -9, the same", "bits per byte"),
        "bigram": ("byte bigram of the training bytes", "bits per byte"),
        "bytes judged": ("judged on", "held-out bytes"),
        "bytes held out": ("held out in all", "bytes"),
    }

    @classmethod
    def check(cls, options, given):
        try:
            recommended_heads(1 if options.without == "heads" else options.heads, options.semantic or None)
        except ValueError as error:
            raise UsageError(str(error).removeprefix("recommended_heads: ")) from None
        if options.block == "first" and given.get("convolution"):
            raise UsageError(f"convolution must be 0 with --block first, got {options.convolution}")

    @property
    def graphable(self) -> bool:
        return not self.options.memory_size

    @functools.cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.options.data)

    def model(self) -> DFNLanguageModel:
        o = self.options
        given = {name: value for name in ("semantic", "dropout", "attention_dropout") if (value := getattr(o, name))}
        options = {"convolution": o.convolution, **(FIRST_BLOCK if o.block == "first" else {}), **given}
        config = dict(vocab_size=256, memory_size=o.memory_size, block_options=options, **o.shape())
        return DFNLanguageModel(**(ablated(config, o.without) if o.without else config))

    def batch(self, generator, held_out=False):
        o = self.options
        if held_out or not o.memory_size:
            text = self.corpus.held_out if held_out else self.corpus.train
            if o.pack:
                ptr = self.corpus.held_out_ptr if held_out else self.corpus.train_ptr
                return next(packed_batches(text, ptr, o.batch, min(o.length, len(text) - 1), generator))
            return next(batches(text, o.batch, min(o.length, len(text) - 1), generator))
        stride = (len(self.corpus.train) - 1) // o.batch
        if stride < o.length:
            raise UsageError(f"length must be at most {stride}, the text's bytes in a row, got {o.length}")
        if self.place == 0 or self.place + o.length > stride:
            self.place, self.memory = 0, None
            self.shift = int(torch.randint(stride, (1,), generator=generator))
        starts = torch.arange(o.batch)[:, None] * stride + self.shift + self.place
        window = (starts + torch.arange(o.length + 1)) % len(self.corpus.train)
        self.place += o.length
        window = self.corpus.train[window].long()
        return window[:, :-1], window[:, 1:]

    def loss(self, model, batch):
        if not (model.training and self.options.memory_size):
            return language_model_loss(model, batch, self.options.confidence_penalty)
        logits, self.memory = model(batch[0], self.memory)
        return language_modelling(logits, batch[1], self.options.confidence_penalty)

    def figures(self, model):
        held_out = bits.judged(self.corpus.held_out)
        if self.options.memory_size:
            ours = bits.streamed_bits(model, held_out, self.options.length, progress=self.progress)
        else:
            ours = bits.held_out_bits(model, held_out, progress=self.progress)
        others = bits.text_baselines(self.corpus.train, held_out, self.progress)
        return {"model": ours, **others, "bytes judged": len(held_out), "bytes held out": len(self.corpus.held_out)}

    def summary(self):
        return self.corpus.summary()

    def judged_on(self):
        return f"{len(bits.judged(self.corpus.held_out)):,} of {len(self.corpus.held_out):,} held-out bytes"

    @functools.cached_property
    def _fingerprint(self) -> int:
        return zlib.crc32(self.corpus.train.numpy())

    def fingerprint(self):
        return self._fingerprint

    def state(self):
        return {"place": torch.tensor([self.place, self.shift])}

    def row_state(self):
        return {} if self.memory is None else self.memory.state_dict()

    def load_state(self, state, row_state):
        self.place, self.shift = state["place"].tolist()
        self.memory = MemoryState(**row_state) if row_state else None


class Digits(Task):
    """a classifier of scikit-learn's digits, from sampled pixels"""

    defaults = dict(steps=500, batch=64, entities=24, dim=48, warmup=150, weight_decay=0.05)
    own = ("entities",)
    words = {"accuracy": ("held-out digits told right", "of 1 (more is better)")}

    @classmethod
    def check(cls, options, given):
        fits(options, 64, 2)

    @functools.cached_property
    def split(self):
        return digits.digits()

    def model(self):
        return DFNClassifier(9, 10, **self.options.shape())

    def batch(self, generator, held_out=False):
        pictures, labels = self.split[held_out]
        chosen = torch.randint(len(pictures), (self.options.batch,), generator=generator)
        return digits.sample_digits(pictures[chosen], self.options.entities, generator), labels[chosen]

    def loss(self, model, batch):
        return mean_state_loss(model(batch[0]), batch[1])

    @torch.no_grad()
    def figures(self, model):
        pictures, labels = self.split[1]
        seen = digits.sample_digits(pictures, self.options.entities, torch.Generator().manual_seed(1))
        device = next(model.parameters()).device
        found = model(move(seen, device)).argmax(1).cpu()
        return {"accuracy": float((found == labels).float().mean())}

    def summary(self):
        return "scikit-learn's digits: {} to train on, {} held out".format(*(len(labels) for _, labels in self.split))


class FieldTask(Task):
    """Runs on crops of pictures, sounds or texts."""

    own = ("data", "field", "entities", "size")
    patch = 3  # side of the patch that a sampled state is

    @classmethod
    def check(cls, options, given):
        size = options.size
        cells = {"image": size * size, "sound": size * FREQUENCIES, "text": 4 * size}[options.field]
        fits(options, cells, 1 if options.field == "text" else 2)

    @functools.cached_property
    def crops(self):
        return load_crops(self.options.field, self.options.data, self.options.size)

    def model(self):
        return DFNFieldModel({"field": channels_of(self.options.field, self.patch)}, **self.options.shape())

    def entities(self, field, generator) -> Entities:
        return sampler_of(self.options.field, self.patch)(field, self.options.entities, generator)

    def summary(self):
        return self.crops.summary()

    def fingerprint(self):
        return self.crops.fingerprint()


class Contrastive(FieldTask):
    """vectors that tell fields apart: two samplings of one field are closer than those of others (InfoNCE)"""

    defaults = dict(steps=300, batch=32, dim=48)
    words = {
        **Task.words,
        "found": ("held-out fields found again by their vector", "of 1 (more is better)"),
        "chance": ("guessing finds", "of 1"),
    }

    def batch(self, generator, held_out=False):
        field = self.crops.field(self.options.batch, generator, held_out)
        return self.entities(field, generator), self.entities(field, generator)

    def loss(self, model, batch):
        return contrastive(*(model.represent(view) for view in batch))

    @torch.no_grad()
    def figures(self, model):
        generator, hits = generator_for("held out", 1), []
        device = next(model.parameters()).device
        for _ in range(8):
            left, right = (model.represent(view) for view in move(self.batch(generator, True), device))
            nearest = (nn.functional.normalize(left, dim=-1) @ nn.functional.normalize(right, dim=-1).T).argmax(1)
            hits.append((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean())
        figures = {"found": float(torch.stack(hits).mean()), "chance": 1 / self.options.batch}
        return {**super().figures(model), **figures}


class Masked(FieldTask):
    """reconstruction of hidden values of a field from the others (self-supervised)"""

    defaults = dict(steps=500, batch=32, entities=128, size=16)
    patch, share, unit = 1, 0.4, "error"
    words = {
        "held-out loss": ("error at hidden entities of held-out fields", "mean square (less is better)"),
        "saying the mean": ("the same, saying the mean everywhere", "mean square"),
    }

    @classmethod
    def defaults_for(cls, given):
        return {**cls.defaults, **(dict(size=64) if given.get("field") == "text" else {})}

    def batch(self, generator, held_out=False):
        entities = self.entities(self.crops.field(self.options.batch, generator, held_out), generator)
        return entities, torch.rand(entities.influence.shape, generator=generator) < self.share

    def loss(self, model, batch):
        return field_reconstruction(model.reconstruct(*batch), batch[0].states, batch[1])

    def figures(self, model):
        generator = generator_for("held out", 1)
        blind = mean_error(self.batch(generator, True)[0] for _ in range(16))
        return {**super().figures(model), "saying the mean": blind}


class Joint(Task):
    """one model over text, image and audio that belong together"""

    defaults = dict(steps=200, batch=32, entities=24, dim=32, warmup=20)
    own = ("data", "length", "entities", "size")
    partial = False
    words = {
        "held-out loss": ("loss on held-out scenes: hidden entities, and what belongs together", "(less is better)"),
        "image finds its line": ("pictures that find their line of text", "of 1 (more is better)"),
        "audio finds its line": ("tones that find their line of text", "of 1 (more is better)"),
        "chance": ("guessing finds", "of 1"),
    }

    @classmethod
    def check(cls, options, given):
        if options.data is None and (unused := [n for n in ("length", "size") if n in given]):
            raise UsageError(f"--{unused[0]} has no meaning for joint without --data")
        own = options.data is not None
        fits(options, min(options.length, options.size * min(options.size, FREQUENCIES)) if own else joint.LINE, 2)

    @functools.cached_property
    def world(self):
        if self.options.data is None:
            return joint.SmallWorld()
        return joint.Triples(self.options.data, self.options.size, self.options.length)

    def model(self):
        return DFNFieldModel(joint.CHANNELS, **self.options.shape())

    def batch(self, generator, held_out=False):
        fields = self.world.fields(self.options.batch, generator, held_out)
        entities = joint.sample_world(fields, self.options.entities, generator)
        return entities, joint.hide(entities, generator)

    def loss(self, model, batch):
        return sum(joint.joint_losses(model, *batch).values())

    def figures(self, model):
        return {**super().figures(model), **self.world.figures(model)}

    def summary(self):
        return self.world.summary()

    def fingerprint(self):
        return self.world.fingerprint()


KINDS.update(text=Text, contrastive=Contrastive, masked=Masked, digits=Digits, joint=Joint)
