"""Crops of pictures, sounds and texts, and scenes of one's own: what is held out is never trained on."""

import pytest
import torch
from helpers import sound

from dfn.fields.field import ImageField
from dfn.runs.crops import Crops, channels_of, load_crops, sampler_of
from dfn.runs.joint import CHANNELS, Triples, hide, sample_world


def numbered(n, *shape):
    """Pieces whose every cell is another number, so that a crop says where it is from."""
    size = torch.Size(shape).numel()
    return {f"piece {i}": torch.arange(i * size, (i + 1) * size).double().view(*shape, 1) for i in range(n)}


@pytest.mark.parametrize("n", [1, 3, 23])
def test_held_out_cells_are_never_trained_on(n):
    crops, generator = Crops(numbered(n, 13, 29), (5, 7), ImageField, axis=1), torch.Generator().manual_seed(0)
    seen = {held: crops.field(300, generator, held).values for held in (False, True)}
    assert all(values.shape == (300, 5, 7, 1) for values in seen.values())
    train, held_out = (set(values.flatten().tolist()) for values in (seen[False], seen[True]))
    assert not train & held_out and len(train) > len(held_out) > 0
    step = seen[False][:, 1:] - seen[False][:, :-1]
    assert (step == 29).all()  # neighbouring rows of one piece
    again = Crops(numbered(n, 13, 29), (5, 7), ImageField, axis=1)
    assert again.fingerprint() == crops.fingerprint() != Crops(numbered(n, 13, 30), (5, 7), ImageField, 1).fingerprint()
    assert again.field(4, torch.Generator().manual_seed(1)).values.equal(
        crops.field(4, torch.Generator().manual_seed(1)).values
    )


def test_pieces_that_are_too_small_are_left_out():
    pieces = {**numbered(1, 9, 20), "small": torch.zeros(4, 4, 1)}
    assert Crops(pieces, (5, 7), ImageField, axis=1).names == ["piece 0"]
    with pytest.raises(ValueError, match=r"needed is a piece of at least 5 x 14 cells, got small: \[4, 4, 1\]"):
        Crops({"small": torch.zeros(4, 4, 1)}, (5, 7), ImageField, axis=1)


def picture(path, height=24, width=40):
    from matplotlib.image import imsave

    imsave(path, torch.rand(height, width, 3).numpy())


def test_files_of_ones_own(tmp_path):
    picture(tmp_path / "a.png")
    sound(tmp_path / "b.wav")
    (tmp_path / "c.txt").write_bytes(b"some text, which is long enough. " * 40)
    for kind, path, shape in (
        ("image", tmp_path, (2, 8, 8, 3)),
        ("sound", tmp_path, (2, 8, 32, 1)),
        ("text", tmp_path / "c.txt", (2, 32, 256)),
    ):
        field = load_crops(kind, path, 8).field(2)
        assert field.values.shape == shape
        entities = sampler_of(kind)(field, 5)
        assert entities.states.shape == (2, 5, channels_of(kind))
    with pytest.raises(ValueError, match="no such file or folder"):
        load_crops("image", tmp_path / "nothing", 8)
    with pytest.raises(ValueError, match=r"no pictures in .*c.txt; looked for \.png"):
        load_crops("image", tmp_path / "c.txt", 8)


def test_scenes_of_ones_own(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
        sound(tmp_path / f"{i}.wav")
        (tmp_path / f"{i}.txt").write_text(f"scene {i}")
    (tmp_path / "alone.txt").write_text("no picture")
    scenes = Triples(tmp_path, 8, 20)
    assert len(scenes.train) == 2 and len(scenes.held_out) == 1
    fields = scenes.fields(6, torch.Generator().manual_seed(0))
    lines = {bytes(row.tolist()).decode().rstrip() for row in fields["text"].ids}
    held_out = {bytes(row.tolist()).decode().rstrip() for row in scenes.fields(6, held_out=True)["text"].ids}
    assert len(lines) == 2 and len(held_out) == 1 and not lines & held_out
    entities = sample_world(fields, 7)
    assert {kind: e.states.shape for kind, e in entities.items()} == {k: (6, 7, c) for k, c in CHANNELS.items()}
    assert all(x.dtype == torch.bool and x.shape == (6, 7) for x in hide(entities).values())
    for path in tmp_path.glob("[12].png"):
        path.unlink()
    with pytest.raises(ValueError, match="must hold at least two scenes .*, got 1"):
        Triples(tmp_path, 8, 20)
