"""The split, the batches, the windows of the evaluation, the comparisons, and associative recall."""

import gzip
import math

import pytest
import torch

from dfn.studies.recall import recall_batch
from dfn.training.text import batches, bigram_bits_per_byte, compressed_bits_per_byte, load_corpus, segments


def test_standard_library():
    corpus, again = load_corpus(), load_corpus()
    assert corpus.train.equal(again.train) and corpus.held_out.equal(again.held_out)
    assert len(corpus.train) > 5e6 and 0.02 < len(corpus.held_out) / len(corpus.train) < 0.12
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert not any({"test", "site-packages"} & set(f.split("/")) for f in corpus.train_files + corpus.held_out_files)
    assert str(len(corpus.train_files)) in corpus.summary()


def test_folder(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"file {i}: " + "abc " * 50)
    (tmp_path / "picture.bin").write_bytes(b"\0\1\2" * 100)
    (tmp_path / ".hidden").write_text("x" * 1000)
    (tmp_path / "empty.txt").write_text("")
    corpus = load_corpus(tmp_path)
    assert len(corpus.train_files) + len(corpus.held_out_files) == 60 and corpus.held_out_files
    (tmp_path / "new.txt").write_text("abc" * 50)
    assert set(corpus.train_files) <= set(load_corpus(tmp_path).train_files) | {"new.txt"}
    assert bytes(corpus.held_out.tolist()) == b"".join((tmp_path / f).read_bytes() for f in corpus.held_out_files)


def test_few_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 251)) * 10)
    one = load_corpus(tmp_path / "a.txt")
    assert len(one.train) == 2250 and len(one.held_out) == 250 and bytes(one.held_out.tolist()) == bytes(range(1, 251))


def test_too_little(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_corpus(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no files in"):
        load_corpus(tmp_path)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="too little text"):
        load_corpus(tmp_path)


def test_batches():
    text = torch.randint(256, (1000,), dtype=torch.uint8)
    draw = [next(batches(text, 5, 37, torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    ids, targets = draw[0]
    assert ids.shape == targets.shape == (5, 37) and ids.dtype == torch.int64 and ids[:, 1:].equal(targets[:, :-1])
    assert ids.equal(draw[1][0]) and not ids.equal(draw[2][0])
    ids, targets = next(batches(text[:38], 3, 37))  # one place only
    assert ids[2].equal(text[:37].long()) and targets[2].equal(text[1:38].long())
    with pytest.raises(ValueError, match="length must be below the 38 bytes"):
        next(batches(text[:38], 3, 38))


@pytest.mark.parametrize(
    "n, length, stride", [(1000, 64, 16), (1000, 64, 64), (65, 64, 32), (64, 63, 5), (3, 2, 1), (101, 37, 11)]
)
def test_segments_score_every_byte_once(n, length, stride):
    text = torch.arange(n)
    seen = []
    for i, (ids, targets, first) in enumerate(segments(text, length, stride)):
        assert len(ids) == len(targets) == length and (targets == ids + 1).all()
        assert i == 0 or first >= length - stride
        seen += targets[first:].tolist()
    assert seen == list(range(1, n))
    with pytest.raises(ValueError, match="stride must be between 1 and length 8, got 9"):
        next(segments(text, 8, 9))


def test_comparisons():
    text = torch.tensor(list(b"abababab" * 400), dtype=torch.uint8)
    raw = bytes(text.tolist())
    assert compressed_bits_per_byte(text)["gzip"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    # after 1,600 pairs, (n + 1) / (n + 256) is the smoothed probability of the pair that always comes
    bits = bigram_bits_per_byte(text, text[:2])
    assert math.isclose(bits, -math.log2(1601 / (1600 + 256)), rel_tol=1e-6)


def test_recall_batch():
    ids, targets = recall_batch(50, 8, generator=torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (50, 48)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8 and max(pairs) < 32 <= min(pairs.values()) and max(pairs.values()) < 64
        for i in range(48):
            assert wanted[i] == (pairs[row[i]] if i >= 16 and i % 2 == 0 else -100)
    with pytest.raises(ValueError, match="1 <= pairs <= keys < vocab_size"):
        recall_batch(1, 40)
