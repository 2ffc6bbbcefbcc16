"""What a trained run makes of files of yours: vectors, classes, values that were hidden.

Models of fields have seen crops of one size, so a file is cut into pieces of that size, side by side; what is left over
at its end does not count.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..fields.field import Field, ImageField, SpectrogramField, TextField
from ..fields.files import read_picture
from ..fields.sampler import Entities
from ..fields.sampler import reconstruct as rebuilt_from
from ..training.losses import field_reconstruction
from .crops import FREQUENCIES, PICTURES, mean_error, picture, spectrogram
from .digits import sample_digits
from .joint import sample_world
from .options import UsageError
from .run import Run
from .tasks import move

ROWS = 256  # pieces at a time


def pieces(kind: str, path: str | Path, size: int) -> tuple[Field, tuple[int, int]]:
    """The pieces of a file of ``kind`` "image", "sound" or "text" as one field, and how many rows and columns of them.

    Sizes as in `load_crops`. Raises ValueError for a file that is smaller than a piece.
    """
    if kind == "image":
        values, cell, make = picture(Path(path)), (size, size), ImageField
    elif kind == "sound":
        values, cell, make = spectrogram(Path(path)), (size, FREQUENCIES), SpectrogramField
    else:
        values = torch.tensor([list(Path(path).read_bytes())], dtype=torch.int64)
        cell, make = (1, 4 * size), TextField
    rows, columns = (have // want for have, want in zip(values.shape[:2], cell, strict=True))
    if not rows * columns:
        want, got = (" x ".join(map(str, x)) for x in (cell, values.shape[:2]))
        raise ValueError(f"{path} must have at least {want} cells, got {got}")
    values = values[: rows * cell[0], : columns * cell[1]]
    values = values.unflatten(1, (columns, cell[1])).unflatten(0, (rows, cell[0])).transpose(1, 2).flatten(0, 1)
    return make(values.flatten(1, 2) if kind == "text" else values), (rows, columns)


@torch.no_grad()
def embed(run: Run, path: str | Path, seed: int = 0) -> Tensor:
    """A vector of length 1 for a file: ``[dim]``, the mean over its pieces. Files that are alike have a large cosine.

    For runs of kind contrastive, and of joint ones with scenes of yours, where the ending says what a file is. Raises
    UsageError for others.
    """
    o, generator = run.options, torch.Generator().manual_seed(seed)
    if o.kind == "contrastive":
        name = "field"
        entities = run.task.entities(pieces(o.field, path, o.size)[0], generator)
    elif o.kind == "joint" and o.data is not None:
        ending = Path(path).suffix.lower()
        name = "audio" if ending == ".wav" else "image" if ending in PICTURES else "text"
        if name == "text":
            field = TextField(Path(path).read_bytes()[: o.length].ljust(o.length))
        else:
            field = pieces("sound" if name == "audio" else "image", path, o.size)[0]
            field = ImageField(field.values.mean(-1, keepdim=True)) if name == "image" else field
        entities = sample_world({name: field}, o.entities, generator)[name]
    else:
        raise UsageError(f"{run.folder} is a run of kind {o.kind}; contrastive ones embed, and joint ones with --data")
    vectors = torch.cat([run.model.represent(part, kind=name).cpu() for part in _parts(run, entities)])
    return torch.nn.functional.normalize(torch.nn.functional.normalize(vectors, dim=-1).mean(0), dim=0)


@torch.no_grad()
def classify(run: Run, path: str | Path, seed: int = 0) -> Tensor:
    """How likely each digit is for a picture of one: ``[10]``. Dark on light, as on paper, or light on dark.

    For runs of kind digits; raises UsageError for others. The picture is scaled to 8 x 8 pixels, the mean of each.
    """
    if run.options.kind != "digits":
        raise UsageError(f"{run.folder} is a run of kind {run.options.kind}; digits ones classify")
    grey = read_picture(path).mean(-1)
    border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).mean()
    grey = 1 - grey if border > 0.5 else grey
    small = torch.nn.functional.adaptive_avg_pool2d(grey[None], 8)[..., None]
    small = small / small.amax().clamp(min=1e-6)
    seen = sample_digits(small, run.options.entities, torch.Generator().manual_seed(seed))
    return next(run.model(part).softmax(-1)[0].cpu() for part in _parts(run, seen))


@torch.no_grad()
def reconstruct(run: Run, path: str | Path, seed: int = 0) -> tuple[Tensor, dict[str, float]]:
    """A file rebuilt from entities of which a share was hidden and told by the model, and how well it told them.

    For runs of kind masked; raises UsageError for others. The values ``[H, W, c]``, or of a text its bytes, int64
    ``[n]``, with those in place that the model told; and the mean squared error beside that of saying the mean.
    """
    if run.options.kind != "masked":
        raise UsageError(f"{run.folder} is a run of kind {run.options.kind}; masked ones reconstruct")
    generator = torch.Generator().manual_seed(seed)
    field, counts = pieces(run.options.field, path, run.options.size)
    entities = run.task.entities(field, generator)
    hidden = torch.rand(entities.influence.shape, generator=generator) < run.task.share
    parts = zip(_parts(run, entities), hidden.split(ROWS), strict=True)
    told = torch.cat([run.model.reconstruct(e, h.to(e.states.device)).cpu() for e, h in parts])
    error = float(field_reconstruction(told, entities.states, hidden))
    figures = {"error": error, "saying the mean": mean_error([entities])}
    states = torch.where(hidden[..., None], told, entities.states)
    if isinstance(field, TextField):
        place = (entities.positions[..., 0] * field.grid[0]).long()
        return field.ids.scatter(1, place, states.argmax(-1)).flatten(), figures
    values = rebuilt_from(entities._replace(states=states), field).unflatten(0, counts)
    return values.transpose(1, 2).flatten(2, 3).flatten(0, 1), figures


def _parts(run: Run, entities: Entities):
    """So many rows at a time, where the model is."""
    device = next(run.model.parameters()).device
    for part in zip(*(x.split(ROWS) for x in entities), strict=True):
        yield move(Entities(*part), device)
