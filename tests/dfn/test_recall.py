"""The recall command's function: what it returns, that it repeats, and that both models learn."""

import pytest
import torch

from dfn.studies.recall import TransformerLanguageModel, recall_accuracy, recall_table, run_recall

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(dim=16, layers=1, vocab_size=8, batch=8, evaluations=2, progress=False)


def test_results_repeat_and_fill_a_table():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    for model in ("dfn", "transformer"):
        results = run_recall(model, 2, (4, 5), steps=6, **TINY)
        (again,) = run_recall(model, 2, (5,), steps=6, **TINY)
        for r in results:
            assert r["length"] == 12 and r["steps"] == 6 and [step for step, _ in r["curve"]] == [3, 6]
            assert 0 <= r["accuracy"] <= 1 and r["loss"] > 0 and r["steps_to_99"] is None
        first, second = ({**r, "seconds": 0} for r in results)
        assert second == {**again, "seconds": 0} and first["loss"] != second["loss"]
        assert recall_table(results).count("not reached") == 2
    assert torch.get_num_threads() == threads and torch.get_rng_state().equal(state)
    with pytest.raises(ValueError, match="model must be one of dfn, transformer, got 'rnn'"):
        run_recall("rnn", 2)


def test_accuracy_counts_what_is_scored():
    ids = torch.arange(6).view(1, 6)
    targets = torch.tensor([[-100, 1, 2, 0, -100, 5]])
    model = lambda i: (torch.nn.functional.one_hot(i, 8).float(), None)  # noqa: E731  answers with what it sees
    assert recall_accuracy(model, ids, targets) == 0.75


def test_transformer_is_causal():
    model, ids = TransformerLanguageModel(11, 16, 2, max_length=20), torch.randint(11, (2, 20))
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    with torch.no_grad():
        a, b = model(ids)[0], model(other)[0]
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [8, 16])
def test_recall(pairs):
    """Default options: what needs one entity to look up another by content, within 1,500 steps of batch 32."""
    results = run_recall("dfn", pairs, (0, 1, 2), progress=False)
    assert all(r["accuracy"] >= 0.99 for r in results), recall_table(results)
