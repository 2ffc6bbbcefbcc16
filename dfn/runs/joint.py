"""Text, image and audio entities in one space, in one run: a small world where the three belong together.

`small_world` draws scenes: a shape in a picture, a tone, and a line of text that says which shape and which tone.
`joint_losses` trains one `DFNFieldModel` on them: hidden entities are told from those of all kinds, and the three
kinds of one scene are told apart from those of the others (InfoNCE). ``dfn train joint`` does it, on scenes of your own
too: `Triples`.
"""

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from ..fields.field import Field, ImageField, SpectrogramField, TextField, WaveField
from ..fields.files import checksum, files_in, named_held_out
from ..fields.sampler import AdaptiveSampler, Entities
from ..models.field_models import DFNFieldModel, some_of
from ..training.batches import generator_for, map_tensors
from ..training.losses import contrastive, field_reconstruction, language_modelling, mean_state
from .crops import PICTURES, picture, random_crop, spectrogram

SHAPES = ("disc", "ring", "bars", "cross")
TONES = ("low", "mid", "high", "rising")
CHANNELS = {"text": 256, "image": 9, "audio": 9}  # one-hot bytes; patches of 3 x 3
KINDS = tuple(CHANNELS)
LINE = 26  # bytes in a line of the small world


def small_world(batch: int, generator: torch.Generator | None = None) -> tuple[dict[str, Field], Tensor]:
    """``batch`` scenes: a field of each kind, and int64 ``[batch, 2]``, which shape and which tone they are."""
    label = torch.stack([torch.randint(len(names), (batch,), generator=generator) for names in (SHAPES, TONES)], 1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, generator=generator)

    axis = (torch.arange(16) + 0.5) / 16
    y, x = axis.view(1, 16, 1) - uniform(0.4, 0.6), axis.view(1, 1, 16) - uniform(0.4, 0.6)
    r, size = (x * x + y * y).sqrt(), uniform(0.25, 0.35)
    shapes = torch.stack([(r < size), (r - size).abs() < 0.07, (16 * y).round() % 4 < 2 + 0 * x,
                          (x.abs() < 0.08) | (y.abs() < 0.08)], 1).float()  # fmt: skip
    pictures = shapes[torch.arange(batch), label[:, 0]]
    pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)

    t = torch.arange(1024) / 4096
    pitch = torch.tensor([300.0, 800.0, 1500.0, 300.0])[label[:, 1]].view(-1, 1) * uniform(0.9, 1.1)[:, 0]
    slope = torch.where(label[:, 1:] == 3, 4000.0, 0.0)
    sound = torch.sin(2 * math.pi * (pitch * t + slope * t * t / 2))
    sound = sound + 0.05 * torch.randn(sound.shape, generator=generator)

    lines = [f"a {SHAPES[s]} and a {TONES[a]} tone".ljust(LINE) for s, a in label.tolist()]
    fields = {
        "text": TextField(torch.tensor([list(line.encode()) for line in lines])),
        "image": ImageField(pictures[..., None]),
        "audio": SpectrogramField.of(WaveField(sound[..., None], 4096), window=62, hop=32),
    }
    return fields, label


def sample_world(
    fields: dict[str, Field], n: int = 24, generator: torch.Generator | None = None
) -> dict[str, Entities]:
    """n entities of every kind, states as in `CHANNELS`."""
    patches = AdaptiveSampler(distinct=True, floor=0.1, encode=lambda f, p: f.patch(p, 3))
    text = AdaptiveSampler("entropy", floor=0.5)
    return {kind: (text if kind == "text" else patches)(f, n, generator) for kind, f in fields.items()}


def hide(
    entities: dict[str, Entities], generator: torch.Generator | None = None, share: float = 0.3
) -> dict[str, Tensor]:
    """Which entities of each kind, at least one, are to be told from the others: bool ``[B, n]``."""
    return {kind: some_of(e.influence, share, generator) for kind, e in entities.items()}


def joint_losses(model: DFNFieldModel, entities: dict[str, Entities], hidden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reconstruction of ``hidden`` entities of each kind from all kinds together, and contrast between the kinds.

    Text against picture and text against sound: a line names both, a picture knows nothing of the sound.
    """
    together = model(entities, hidden).split([e.states.shape[1] for e in entities.values()], 1)
    losses = {}
    for (kind, e), states in zip(entities.items(), together, strict=True):
        found = model.values[kind](states)
        if kind == "text":
            losses[kind] = language_modelling(found, e.states.argmax(-1).masked_fill(~hidden[kind], -100))
        else:  # as a share of what saying the mean would leave: 1 is no better than that
            spread = (e.states - e.states.mean((0, 1))).square().mean().clamp(min=1e-8)  # states are in [0, 1]
            losses[kind] = field_reconstruction(found, e.states, hidden[kind]) / spread
    # Without their mean, which all fields share at the start, and which holds contrast back.
    views = {kind: model.represent(e, kind=kind) for kind, e in entities.items()}
    views = {kind: v - v.mean(0) for kind, v in views.items()}
    losses["contrast"] = (contrastive(views["text"], views["image"]) + contrastive(views["text"], views["audio"])) / 2
    return losses


@torch.no_grad()
def match_rate(model: DFNFieldModel, kind: str, batch: int = 256, seed: int = 1) -> float:
    """How often the line that is nearest to a picture (a sound) names its shape (its tone). Chance: one in four."""
    generator = generator_for("held out", seed)
    fields, label = small_world(batch, generator)
    device = next(model.parameters()).device
    entities = map_tensors(lambda x: x.to(device), sample_world(fields, generator=generator))
    text, other = (model.represent(entities[k], kind=k) for k in ("text", kind))
    text, other = (nn.functional.normalize(v - v.mean(0), dim=-1) for v in (text, other))
    column = 0 if kind == "image" else 1
    found = label[(other @ text.T).argmax(1).cpu(), column]
    return float((found == label[:, column]).float().mean())


def common_space(model: DFNFieldModel, entities: dict[str, Entities]) -> Tensor:
    """The mean state of all entities of all kinds, read together: ``[B, dim]``."""
    weight = torch.cat([e.influence for e in entities.values()], 1)
    return mean_state(model(entities), weight)


class SmallWorld:
    """`small_world` as the data of a run."""

    def fields(self, batch: int, generator: torch.Generator | None = None, held_out: bool = False) -> dict[str, Field]:
        return small_world(batch, generator)[0]

    def figures(self, model: DFNFieldModel) -> dict[str, float]:
        rates = {f"{kind} finds its line": match_rate(model, kind) for kind in ("image", "audio")}
        return {**rates, "chance": 1 / len(SHAPES)}

    def summary(self) -> str:
        return "a small world: shapes, tones and lines that name them, drawn anew in every step"

    def fingerprint(self) -> int:
        return 0


class Triples:
    """Scenes of your own: files of one name in a folder, such as ``bird.txt``, ``bird.png`` and ``bird.wav``.

    Of a text the first ``length`` bytes count; of a picture, in grey, and of a sound's spectrogram random crops of
    ``size`` cells a side (a spectrogram has 32 frequencies). Scenes with such a name (`named_held_out`) are held out,
    else one in ten.
    """

    def __init__(self, path: str | Path, size: int, length: int):
        if not Path(path).is_dir():
            raise ValueError(f"data must be a folder of scenes, got {path}")
        parts: dict[str, dict[str, Path]] = {}
        for name, file in files_in(path, (".txt", ".wav", *PICTURES), "scenes").items():
            ending = file.suffix.lower()
            what = {".txt": "text", ".wav": "audio"}.get(ending, "image")
            parts.setdefault(name.removesuffix(file.suffix), {}).setdefault(what, file)
        scenes = {}
        for name, of in parts.items():
            if len(of) < 3:
                continue
            seen, heard = picture(of["image"]).mean(-1, keepdim=True), spectrogram(of["audio"])
            if min(seen.shape[:2]) >= size and len(heard) >= size:
                text = of["text"].read_bytes()[:length].ljust(length)
                scenes[name] = torch.tensor(list(text)), seen, heard
        if len(scenes) < 2:
            want = f"x.txt, x.png and x.wav, at least {size} pixels and {size} steps of a spectrogram large"
            raise ValueError(f"{path} must hold at least two scenes ({want}), got {len(scenes)}")
        by_checksum = {n for n in scenes if checksum(n) % 10 == 0} - {max(scenes)} or {min(scenes)}
        out = named_held_out(scenes) or by_checksum
        self.path, self.size = path, size
        self.train, self.held_out = ([scenes[n] for n in scenes if (n in out) == held] for held in (False, True))

    def fields(self, batch: int, generator: torch.Generator | None = None, held_out: bool = False) -> dict[str, Field]:
        scenes = self.held_out if held_out else self.train
        chosen = [scenes[i] for i in torch.randint(len(scenes), (batch,), generator=generator).tolist()]
        text, seen, heard = zip(*chosen, strict=True)
        crops = [torch.stack([random_crop(x, (self.size,) * n, generator) for x in xs])
                 for xs, n in ((seen, 2), (heard, 1))]  # fmt: skip
        fields = TextField(torch.stack(text)), ImageField(crops[0]), SpectrogramField(crops[1])
        return dict(zip(KINDS, fields, strict=True))

    def figures(self, model: DFNFieldModel) -> dict[str, float]:
        return {}

    def summary(self) -> str:
        return f"{self.path}: {len(self.train)} scenes to train on, {len(self.held_out)} held out"

    def fingerprint(self) -> int:
        return zlib.crc32(b"".join(x.contiguous().numpy().tobytes() for s in (*self.train, *self.held_out) for x in s))
