"""The study of weak spots at a tiny size, and what it rests on: one head that looks back."""

import json
import math

import pytest
import torch
from helpers import INTERPRETED

from dfn.models.layers import DynamicFlowAttention, count_parameters
from dfn.runs.options import Options
from dfn.studies import one_head, weak_spots
from dfn.studies.cells import load

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]


def test_one_head(monkeypatch):
    """It finds what it sees, the faster the faster its geometry learns; of what lies beyond k it learns nothing."""
    settings = dict(scale=("1/8",), distance=(8, 24), k=(16,), lr=(6e-3,), geometry_rate=(1, 10))
    monkeypatch.setattr(one_head, "SETTINGS", settings)
    slow, fast, *beyond = one_head.one_head(150)
    assert fast["loss"] < 0.1 and abs(fast["back"] - 8) < 0.5 and fast["width"] < 1
    assert slow["loss"] > 1.5 and slow["width"] > 2 and slow["back"] > 1
    assert all(abs(h["loss"] - math.log(one_head.SYMBOLS)) < 0.1 for h in beyond)


def test_shared_map_is_the_mixer_of_before():
    attention = DynamicFlowAttention(12, 4, 3, 5)
    s, p = torch.randn(2, 17, 12), torch.randn(2, 4, 17, 3)
    (y, drift), (z, moved) = attention(s, p), weak_spots.shared_map(attention, None)(s, p)
    assert not torch.allclose(y, z) and torch.equal(drift.positions, moved.positions)
    older = DynamicFlowAttention(12, 4, 3, 5, receiver_flow=False, salience=False)
    older.load_state_dict(attention.state_dict())
    assert torch.equal(older(s, p)[0], z)


def test_held_out_copies_were_not_trained_on():
    task = weak_spots.Copies(Options.of("text", length=12, batch=4), {})
    training = torch.Generator().manual_seed(task.options.seed)
    trained = [task.batch(training)[0] for _ in range(8)]
    judged = []

    class Seen(torch.nn.Module):
        def forward(self, ids):
            judged.append(ids)
            return torch.zeros(*ids.shape, weak_spots.SYMBOLS), None

    task.held_out_loss(Seen())
    assert len(judged) == 8 and not any(torch.equal(a, b) for a in judged for b in trained)


def test_copies():
    options = Options.of("text", **weak_spots.COPY, threads=1)
    task = weak_spots.Copies(options, dict(vary=4))
    generator, lengths = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        ids, targets = task.batch(generator)
        half = (ids.shape[1] + 1) // 2
        assert torch.equal(ids[:, half:], ids[:, : half - 1]) and torch.equal(ids[:, 1:], targets[:, :-1])
        assert torch.equal(targets[:, half - 1 :], ids[:, :half])  # what is judged can be known
        lengths.add(half)
    assert lengths == set(range(8, 17))


def test_study(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(one_head, "SETTINGS", {name: values[:1] for name, values in one_head.SETTINGS.items()})
    lines = ["head/alone", "digits/attention", "digits/shared-grid", "copy/unknown-shared", "copy/far-k32"]
    command = ["--steps", "2", "--seeds", "2", "--quiet", "--out", str(tmp_path / "study"),
               "--result", str(tmp_path / "result.json")]  # fmt: skip
    for some in (lines[:3], lines):
        weak_spots.run(weak_spots.build_parser().parse_args([*command, "--lines", *some]))
    found, short = load(tmp_path / "study"), json.loads((tmp_path / "result.json").read_text())
    assert found["cells"].keys() == short["cells"].keys() == {f"{line}/{seed}" for line in lines for seed in (0, 1)}
    assert "curve" not in short["cells"]["copy/far-k32/0"] and short["environments"] == found["environments"]
    assert found["cells"]["digits/shared-grid/0"]["heads"][1]["offset"][-1] == pytest.approx(-1, abs=0.05)
    told = (tmp_path / "study" / "study.md").read_text()
    assert "self-attention |" in told and "17 symbols, k = 32 |" in told and "0 of 2" in told


@pytest.mark.parametrize("task", weak_spots.LINES)
def test_every_line_changes_the_run(task):
    pytest.importorskip("sklearn")
    make, defaults = weak_spots.MAKES[task]
    seen = set()
    for _, change in weak_spots.LINES[task].values():
        given = {name: value for name, value in change.items() if name in Options.__dataclass_fields__}
        options = Options.of("text", **{**defaults, **given, "batch": 2, "threads": 1})
        torch.manual_seed(0)
        mine = make(options, change)
        inputs, _ = mine.batch(torch.Generator().manual_seed(1))
        with torch.no_grad():
            model = mine.model()
            said = model(inputs)
        seen.add((options, count_parameters(model), float((said if torch.is_tensor(said) else said[0]).abs().sum())))
    assert len(seen) == len(weak_spots.LINES[task])
