"""The sequences of the recall and needle tasks, what counts as recalled, and that a DFN learns recall."""

import pytest
import torch

from dfn.studies.length import HERE, NOISE, SYMBOLS, WHICH, needle_batch
from dfn.studies.recall import recall_accuracy, recall_batch, scattered_batch, setting

pytestmark = pytest.mark.usefixtures("one_thread")


def test_accuracy_counts_what_is_scored():
    ids = torch.arange(6).view(1, 6)
    targets = torch.tensor([[-100, 1, 2, 0, -100, 5]])
    model = lambda i: (torch.nn.functional.one_hot(i, 8).float(), None)  # noqa: E731  answers with what it sees
    assert recall_accuracy(model, ids, targets) == 0.75
    assert recall_accuracy(model, ids.expand(5, -1), targets.expand(5, -1), vocab_size=2**23) == 0.75  # row by row


def test_fewer_queries():
    ids, targets = recall_batch(20, 64, queries=64, keys=64, vocab_size=128)
    assert ids.shape == (20, 256) and int((targets >= 0).sum()) == 20 * 64


@pytest.mark.parametrize("pairs", [4, 16, 64])
def test_scattered(pairs):
    vocab_size, length = setting(pairs, True)
    ids, targets = scattered_batch(30, pairs, length)
    assert ids.shape == targets.shape == (30, length) and length <= 256 and 0 <= ids.min() <= ids.max() < vocab_size
    gaps = []
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        said = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(said) == pairs and all(0 < key < vocab_size // 2 <= value for key, value in said.items())
        asked = [place for place, value in enumerate(wanted) if value >= 0]
        assert len(asked) == pairs and all(said[row[place]] == wanted[place] for place in asked)
        assert {row[place] for place in asked} == set(said) and all(place % 2 == 0 for place in asked)
        assert min(asked) >= 2 * pairs
        gaps += [(place - 2 * pairs) // 2 for place in asked]
    free = (length - 2 * pairs) // 2
    if pairs < free:  # near ones are likelier
        near = sum(g < free / 2 for g in gaps)
        assert near > 0.55 * len(gaps)
    with pytest.raises(ValueError, match="length must be at least 40"):
        scattered_batch(1, 10, 39)


@pytest.mark.parametrize("span", [1, 5])
def test_needle(span):
    for distance in (None, span, 23):
        ids, targets = needle_batch(50, 31, span, distance=distance)
        at = (ids == HERE).nonzero()
        assert at[:, 0].tolist() == list(range(50)) and ((ids == WHICH).nonzero()[:, 1] == 31 - span).all()
        first = at[:, 1:] + 1
        symbols = ids.gather(1, first + torch.arange(span))
        assert symbols.min() >= 2 + NOISE and symbols.max() < 2 + NOISE + SYMBOLS
        assert torch.equal(targets[:, -span:], symbols) and (targets[:, :-span] == -100).all()
        assert torch.equal(ids[:, 32 - span :], symbols[:, :-1])
        distances = 31 - span - first[:, 0]
        assert (
            (distances == distance).all() if distance else distances.min() >= span and len(set(distances.tolist())) > 5
        )
    with pytest.raises(ValueError, match=f"distance must be between span = {span} and"):
        needle_batch(1, 31, span, distance=31)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [8, 16])
def test_recall(pairs, tmp_path):
    """Default options: what needs one entity to look up another by content, within 1,500 steps of batch 32."""
    from dfn import cli
    from dfn.studies.cells import load

    arguments = ["--models", "dfn", "--pairs", pairs, "--dims", 64, "--depths", 2, "--threads", 1, "--quiet"]
    assert cli.main(["study", "recall", "--out", str(tmp_path), *map(str, arguments)]) == 0
    found = load(tmp_path)["cells"]
    assert len(found) == 3 and all(c["value"] >= 0.99 for c in found.values()), found
