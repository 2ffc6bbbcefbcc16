"""What of a folder is data, what of it is held out, and what a broken, foreign or misnamed file comes to."""

import os

import numpy
import pytest
import torch
from helpers import sound

from dfn.fields.field import ImageField, WaveField
from dfn.fields.files import checksum, files_in, named_held_out
from dfn.runs.crops import load_crops
from dfn.runs.joint import Triples
from dfn.training.text import HELD_OUT, bigram_bits_per_byte, load_corpus

Image = pytest.importorskip("PIL.Image")


def picture(path, height=24, width=40):
    Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()).save(path)


def test_names_say_what_is_held_out():
    for names, out in (
        ({"train.txt", "val.txt"}, {"val.txt"}),
        ({"train/a.png", "validation/a.png", "test/b.png"}, {"validation/a.png", "test/b.png"}),
        ({"wiki.train.tokens", "wiki.valid.tokens", "wiki.Test.tokens"}, {"wiki.valid.tokens", "wiki.Test.tokens"}),
        ({"train-00000.txt", "test-00000.txt"}, {"test-00000.txt"}),
        ({"book.txt", "testament.txt", "latest/a.txt", "a/val/b.txt"}, set()),
        ({"val.txt", "test.txt"}, set()),  # nothing would be left
    ):
        assert named_held_out(names) == out, names


def test_a_large_file_beside_small_ones_is_trained_on(tmp_path):
    book = "".join(f"line {i}\n" for i in range(3000)).encode()
    for small, size in (("LICENSE", 400), ("README", 2), ("b.txt", 300)):
        (tmp_path / "book.txt").write_bytes(book)
        (tmp_path / small).write_bytes(b"x" * size)
        corpus = load_corpus(tmp_path)
        assert len(corpus.train) >= 0.9 * (len(book) + size) and len(corpus.held_out) >= len(book) // 10
        assert book[-100:] in bytes(corpus.held_out.tolist()) and "the last tenth of each" in corpus.summary()
        (tmp_path / small).unlink()
    (tmp_path / "book.txt").rename(tmp_path / "train.txt")
    (tmp_path / "val.txt").write_bytes(b"y" * 500)
    corpus = load_corpus(tmp_path)
    assert bytes(corpus.held_out.tolist()) == b"y" * 500 and bytes(corpus.train.tolist()) == book
    assert "(val.txt)" in corpus.summary()


def test_at_least_nine_tenths_train_whatever_the_sizes(tmp_path):
    """Also where the large files are those that the checksum would hold out."""
    for i in range(70):
        name = f"{i}.txt"
        chosen = checksum(name) % HELD_OUT == 0
        (tmp_path / name).write_bytes(b"z" * (50_000 if chosen else 1000 + 37 * i))
        corpus = load_corpus(tmp_path)
        assert len(corpus.train) >= 9 * len(corpus.held_out) > 0


def test_what_is_no_text_has_a_sentence_of_its_own(tmp_path):
    one = tmp_path / "a.txt"
    for data, message in (
        (b"", "a.txt is empty"),
        ("text\n".encode("utf-16"), "a.txt is UTF-16; to use it as UTF-8: iconv -f UTF-16"),
        ("text\n".encode("utf-32"), "a.txt is UTF-32; "),
        (b"text\0text", "a.txt is taken for binary: byte 4 is zero"),
        (b"short", "too little text in .*a.txt: 5 bytes to train on, 0 held out"),
    ):
        one.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_corpus(one)
    (tmp_path / "b.txt").write_bytes(b"text\0text")
    one.write_bytes("text\n".encode("utf-16"))
    with pytest.raises(ValueError, match="no text in .*: a.txt is UTF-16"):
        load_corpus(tmp_path)
    (tmp_path / "c.txt").write_bytes(b"text " * 500)
    assert "; 2 left out (a.txt is UTF-16" in load_corpus(tmp_path).summary()


@pytest.mark.parametrize("n, train, held_out", [(1234, "1,111 bytes", "123 bytes"), (50_000, "45 kB", "5,000 bytes"),
                                                (2_000_000, "1.8 MB", "200 kB")])  # fmt: skip
def test_sizes_are_said_in_a_unit_that_fits(n, train, held_out, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * n)
    said = load_corpus(tmp_path).summary()
    assert f"1 file, {train} to train on; the last tenth of each, {held_out}, held out" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no files in .*empty"):
        load_corpus(empty)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
            load_corpus(tmp_path / "pipe")


def test_hidden_files_and_folders_are_left_out_everywhere(tmp_path):
    data = tmp_path / ".hidden above is fine"
    for name in ("a.png", "._a.png", ".git/x.png", "sub/.cache/y.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"no picture")
    picture(data / "a.png")
    assert list(files_in(data)) == ["a.png"] and load_crops("image", data, 8).names == ["a.png"]
    (data / "a.png").unlink()
    with pytest.raises(ValueError, match="no pictures in"):
        load_crops("image", data, 8)


def test_files_of_one_name_are_all_there(tmp_path):
    for folder in "abc":
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "0.PNG")
        sound(tmp_path / folder / "0.wav")
        (tmp_path / folder / "0.txt").write_text(folder)
    assert load_crops("image", tmp_path, 8).names == ["a/0.PNG", "b/0.PNG", "c/0.PNG"]
    assert load_crops("sound", tmp_path, 8).names == ["a/0.wav", "b/0.wav", "c/0.wav"]
    scenes = Triples(tmp_path, 8, 20)
    assert len(scenes.train) == 2 and len(scenes.held_out) == 1


def test_names_that_are_not_utf8(tmp_path):
    try:
        for i in range(10):
            (tmp_path / os.fsdecode(b"\xe9%d.txt" % i)).write_text("text " * 100)
    except OSError:
        pytest.skip("this file system takes no such names")
    picture(tmp_path / os.fsdecode(b"\xff.png"))
    corpus = load_corpus(tmp_path)
    assert len(corpus.train_files) == 10 and "png" not in corpus.summary().split("left out")[0]
    assert load_crops("image", tmp_path, 8).names == [os.fsdecode(b"\xff.png")]


def test_a_broken_file_is_named(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    picture(good.with_suffix(".png"))
    sound(good.with_suffix(".wav"))
    for ending, load in ((".png", ImageField.load), (".wav", WaveField.load)):
        whole = good.with_suffix(ending).read_bytes()
        cut_off = whole[:-1] if ending == ".wav" else b"\x89PNG"
        for data in (b"", b"nonsense " * 9, whole[:30], whole[: len(whole) // 2], cut_off):
            bad.with_suffix(ending).write_bytes(data)
            with pytest.raises(ValueError) as error:
                load(bad.with_suffix(ending))
            assert f"bad{ending}" in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nothing")


MODES = {  # what is written, and what it must come out as
    "L": (numpy.array([[0, 255, 51]], "uint8"), [0, 1, 0.2]),
    "1": (numpy.array([[0, 255, 255]], "uint8"), [0, 1, 1]),
    "I;16": (numpy.array([[0, 65535, 13107]], "uint16"), [0, 1, 0.2]),
    "F": (numpy.array([[0, 1, 0.2]], "float32"), [0, 1, 0.2]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", [".tif", ".png"])
def test_every_depth_is_between_0_and_1(mode, ending, tmp_path):
    array, wanted = MODES[mode]
    if mode == "F" and ending == ".png":
        pytest.skip("PNG has no floats")
    image = Image.fromarray(array)
    (image.convert("1") if mode == "1" else image).save(tmp_path / f"a{ending}")
    values = ImageField.load(tmp_path / f"a{ending}").values
    assert values.shape == (1, 1, 3, 1)
    torch.testing.assert_close(values.flatten(), torch.tensor(wanted, dtype=torch.float32))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_mode_is_read_or_refused(mode, compression, tmp_path):
    source = Image.new("RGB", (5, 3), (51, 51, 51) if mode == "LA" else (255, 0, 51))
    source.convert(mode).save(tmp_path / "a.tif", compression=compression)
    if mode == "YCbCr" and not compression and int(Image.__version__.split(".")[0]) < 13:  # what it writes, not reads
        with pytest.raises(ValueError, match="a.tif is no picture that can be read"):
            ImageField.load(tmp_path / "a.tif")
        return
    values = ImageField.load(tmp_path / "a.tif").values[0]
    wanted = [0.2] if mode == "LA" else [1.0, 0.0, 0.2]
    torch.testing.assert_close(values, torch.tensor(wanted).expand_as(values), rtol=0, atol=0.02)


def test_values_without_a_known_white_are_refused(tmp_path):
    for array, message in (
        (numpy.array([[0, 70000]], "int32"), "32-bit integers, whose white is not known"),
        (numpy.array([[-1, 3]], "float32"), r"floats that must be in \[0, 1\], got -1 to 3"),
        (numpy.array([[0, numpy.nan]], "float32"), r"floats that must be in \[0, 1\], got"),
    ):
        Image.fromarray(array).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=f"a.tif holds {message}"):
            ImageField.load(tmp_path / "a.tif")


def test_the_bigram_table_does_not_grow_with_the_text(monkeypatch):
    text = torch.randint(256, (3_000_000,), dtype=torch.uint8)
    pairs = text[:-1].long() * 256 + text[1:].long()
    counts = torch.bincount(pairs, minlength=65536).view(256, 256).double() + 1
    table = -(counts / counts.sum(1, keepdim=True)).log2()
    wanted = table.flatten()[text[:70000][:-1].long() * 256 + text[:70000][1:].long()].mean()
    seen = []
    real = torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda x, **k: seen.append(len(x)) or real(x, **k))
    assert bigram_bits_per_byte(text, text[:70000]) == pytest.approx(float(wanted), rel=1e-12)
    assert max(seen) <= 2**20
