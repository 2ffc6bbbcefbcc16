"""Trained runs on files of one's own: pieces, vectors, classes, hidden values, in Python and from the command line."""

import pytest
import torch
from helpers import INTERPRETED, sound

from dfn import cli
from dfn.fields.files import read_picture
from dfn.runs import Options, UsageError, train, using
from dfn.runs.digits import sample_digits

pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
TINY = dict(steps=1, dim=16, layers=1, heads=2, k=4, batch=2, threads=1)


def picture(path, height=26, width=37):
    """Smooth, and different everywhere."""
    from matplotlib.image import imsave

    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    imsave(path, torch.stack([y, x, (x + 2 * y) / 3], -1).contiguous().numpy())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    picture(folder / "a.png")
    picture(folder / "other.png", 40, 40)
    sound(folder / "b.wav")
    (folder / "c.txt").write_bytes(b"some text, which is long enough. " * 40)
    for name in ("x", "y"):  # scenes
        (folder / "scenes").mkdir(exist_ok=True)
        picture(folder / "scenes" / f"{name}.png", 30, 30)
        sound(folder / "scenes" / f"{name}.wav")
        (folder / "scenes" / f"{name}.txt").write_bytes(b"a line " + name.encode())
    return folder


def run_of(kind, folder, **given):
    return train(Options.of(kind, **{**TINY, **given}), folder, progress=False, evaluations=0, say=lambda text: None)


@pytest.mark.parametrize(
    "kind, file, cell", [("image", "a.png", (7, 7)), ("sound", "b.wav", (7, 32)), ("text", "c.txt", (28,))]
)
def test_pieces_lie_side_by_side(kind, file, cell, files):
    field, (rows, columns) = using.pieces(kind, files / file, 7)
    assert field.grid == cell and field.batch == rows * columns > 1
    if kind == "text":
        whole = torch.tensor(list((files / file).read_bytes()))
        assert field.ids.flatten().equal(whole[: field.batch * 28])
        return
    whole = using.picture(files / file) if kind == "image" else using.spectrogram(files / file)
    assert (rows, columns) == (whole.shape[0] // cell[0], whole.shape[1] // cell[1])
    for n in range(field.batch):
        y, x = cell[0] * (n // columns), cell[1] * (n % columns)
        assert field.values[n].equal(whole[y : y + cell[0], x : x + cell[1]])
    with pytest.raises(ValueError, match=r"must have at least 9999 x \d+ cells, got"):
        using.pieces(kind, files / file, 9999)


@pytest.mark.parametrize("field, file", [("image", "a.png"), ("sound", "b.wav"), ("text", "c.txt")])
def test_embed(field, file, files, tmp_path, capsys):
    data = files / file
    run = run_of("contrastive", tmp_path, field=field, data=str(data), size=8, entities=9)
    vector = using.embed(run, data)
    assert (
        vector.shape == (16,) and vector.norm() == pytest.approx(1, abs=1e-5) and vector.equal(using.embed(run, data))
    )
    assert cli.main(["embed", str(tmp_path), str(data), str(data), "--out", str(tmp_path / "v.csv")]) == 0
    said, rows = capsys.readouterr().out.splitlines(), (tmp_path / "v.csv").read_text().splitlines()
    assert said[1].split() == [str(data), "1.00", "1.00"] and len(rows) == 2
    read = torch.tensor([float(x) for x in rows[0].removeprefix(f"{data},").split(",")])
    torch.testing.assert_close(read, vector, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="is a run of kind contrastive; digits ones classify"):
        using.classify(run, data)
    with pytest.raises(UsageError, match="is a run of kind contrastive; masked ones reconstruct"):
        using.reconstruct(run, data)


def test_embed_by_a_joint_run(files, tmp_path):
    scenes = files / "scenes"
    run = run_of("joint", tmp_path, data=str(scenes), size=8, length=30, entities=9)
    vectors = [using.embed(run, scenes / f"x.{ending}") for ending in ("txt", "png", "wav")]
    assert all(v.shape == (16,) and v.isfinite().all() for v in vectors)
    assert not vectors[0].equal(vectors[1]) and not vectors[1].equal(vectors[2])


def test_classify(tmp_path, capsys):
    """A large picture of a digit counts as the small one; so does the same as ink on paper."""
    from matplotlib.image import imsave

    run = run_of("digits", tmp_path)
    light, paper = str(tmp_path / "light.png"), str(tmp_path / "paper.png")
    said = set()
    for n in range(5):
        large = run.task.split[1][0][n].repeat_interleave(5, 0).repeat_interleave(5, 1).expand(-1, -1, 3).contiguous()
        imsave(light, large.numpy())
        imsave(paper, (1 - large).numpy())
        small = read_picture(light)[2::5, 2::5, :1][None]
        with torch.no_grad():
            entities = sample_digits(small / small.max(), run.options.entities, torch.Generator().manual_seed(0))
            want = run.model(entities).softmax(-1)[0]
        torch.testing.assert_close(using.classify(run, light), want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(using.classify(run, paper), want, rtol=0, atol=0.05)  # eight bits a pixel
        said.add(tuple(want.tolist()))
    assert len(said) == 5, "pictures of other digits are other pictures"
    assert cli.main(["classify", str(tmp_path), light, paper]) == 0
    one, other = (line.split(": ")[1] for line in capsys.readouterr().out.splitlines())
    assert one.split(",")[0] == other.split(",")[0] == str(int(want.argmax()))


@pytest.mark.parametrize("field, file", [("image", "a.png"), ("sound", "b.wav"), ("text", "c.txt")])
def test_reconstruct(field, file, files, tmp_path, capsys, monkeypatch):
    data, out = files / file, tmp_path / "out"
    run = run_of("masked", tmp_path / "run", field=field, data=str(data), size=8, entities=20)
    values, figures = using.reconstruct(run, data)
    assert set(figures) == {"error", "saying the mean"} and all(x > 0 for x in figures.values())
    if field == "text":
        whole = torch.tensor(list(data.read_bytes()))[: len(values)]
        changed = (values != whole).float().mean()
        assert len(values) == len(whole) // 32 * 32 and 0 < changed < 0.4 * 20 / 32 + 0.1
    else:
        whole = using.picture(data) if field == "image" else using.spectrogram(data)
        sizes = (8, 8) if field == "image" else (8, 32)
        assert values.shape == tuple(n // s * s for n, s in zip(whole.shape, sizes, strict=False)) + whole.shape[2:]
    if field == "image":  # nothing hidden: what is rebuilt is the file, as far as its entities tell
        monkeypatch.setattr(type(run.task), "share", 0.0)
        near = (using.reconstruct(run, data)[0] - whole[: values.shape[0], : values.shape[1]]).square().mean()
        assert near < 0.1 * whole.var(), (near, whole.var())
    assert cli.main(["reconstruct", str(tmp_path / "run"), str(data), "--out", str(out.with_suffix(".png"))]) == 0
    said = capsys.readouterr().out
    assert "error" in said and "saying the mean" in said and out.with_suffix(".png").stat().st_size > 100
