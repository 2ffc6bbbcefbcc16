"""The trainer, and the demo from end to end on a tiny budget."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import same_bits
from torch import nn

from dfn import demo
from dfn.models.language import DFNLanguageModel
from dfn.runs import bits
from dfn.training.text import batches
from dfn.training.trainer import NonFiniteLoss, Trainer, parameter_groups

TEXT = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 60), dtype=torch.uint8)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny():
    torch.manual_seed(3)
    return DFNLanguageModel(dim=16, layers=2, k=4)


def stream(seed=0, skip=0):
    it = batches(TEXT, 4, 32, torch.Generator().manual_seed(seed))
    for _ in range(skip):
        next(it)
    return it


def test_it_learns():
    history = Trainer(tiny(), steps=60, lr=1e-2, warmup=5).fit(stream(), progress=False)
    assert history.steps == list(range(1, 61)) and history.tokens[-1] == 60 * 4 * 32
    assert history.losses[0] > 5 and sum(history.losses[-5:]) / 5 < 2.7


def test_resumed_to_the_bit():
    """Six steps are three steps, a checkpoint, and three steps of another trainer."""
    whole, first, second = (Trainer(tiny(), steps=6, warmup=2) for _ in range(3))
    for trainer, batch in zip([whole] * 6, stream(), strict=False):
        trainer.train_step(batch)
    for _, batch in zip(range(3), stream(), strict=False):
        first.train_step(batch)
    second.load_state_dict(first.state_dict())
    assert second.step == 3
    for _, batch in zip(range(3), stream(skip=3), strict=False):
        second.train_step(batch)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert same_bits(a, b)


def test_schedule():
    trainer = Trainer(tiny(), steps=100, lr=1.0, warmup=10, final=0.1)
    rates = []
    for trainer.step in range(101):
        rates.append(trainer.learning_rate())
    assert math.isclose(rates[0], 0.1, rel_tol=1e-6) and max(rates) == max(rates[9:11]) and math.isclose(rates[-1], 0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    timed = Trainer(tiny(), seconds=10.0)
    timed.elapsed = 5.0
    assert timed.progress == 0.5
    with pytest.raises(ValueError, match="steps or seconds"):
        Trainer(tiny())


def test_seconds_end_the_run():
    history = Trainer(tiny(), seconds=0.5).fit(stream(), progress=False)
    assert 0.5 <= history.seconds[-1] < 5 and len(history.losses) >= 1


def test_only_matrices_decay():
    decayed, others = Trainer(tiny(), steps=1).optimizer.param_groups
    assert decayed["weight_decay"] > 0 == others["weight_decay"]
    assert all(p.ndim > 1 for p in decayed["params"]) and any(p.shape == (256, 16) for p in others["params"])


def test_positions_do_not_decay():
    model = tiny()
    _, others = Trainer(model, steps=1).optimizer.param_groups
    kept = {id(p) for p in others["params"]}
    assert id(model.positions.place.weight) in kept and all(id(b.attention.offset) in kept for b in model.blocks)
    assert id(model.blocks[0].attention.flow.weight) not in kept


def test_geometry_takes_steps_of_its_own():
    """Every parameter is in one group; after a step those of the geometry have moved as many times as far."""
    moved = {}
    for rate in (1.0, 5.0):
        trainer = Trainer(tiny(), steps=9, lr=1e-4, warmup=0, geometry_rate=rate)
        inside = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert sorted(inside) == sorted(id(p) for p in trainer.model.parameters())
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train_step(next(stream()))
        moved[rate] = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
    fast = {f"blocks.{i}.attention.{name}" for i in range(2) for name in ("alpha", "log_sigma", "offset")}
    for name, one in moved[1.0].items():
        many = 5 if name in {"positions.log_scale", *fast} else 1
        torch.testing.assert_close(moved[5.0][name], many * one, rtol=1e-2, atol=5e-7, msg=name)
    assert moved[1.0]["positions.log_scale"].abs().max() > 5e-5


def test_groups_for_a_loop_of_your_own():
    model = tiny()
    decayed, others, geometry = parameter_groups(model, 1e-3, weight_decay=0.1, geometry_rate=10)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == geometry["weight_decay"] == 0
    assert [g["lr"] for g in (decayed, others, geometry)] == [1e-3, 1e-3, 1e-2]
    torch.optim.SGD([decayed, others, geometry])
    assert len(parameter_groups(nn.Linear(2, 2), geometry_rate=10)) == 2
    with pytest.raises(ValueError, match="geometry_rate must be positive and finite, got 0"):
        parameter_groups(model, geometry_rate=0)


def test_clipping():
    model = nn.Linear(3, 1)
    trainer = Trainer(model, steps=2, clip=0.25, loss=lambda m, batch: 1e3 * m(batch[0]).sum())
    trainer.train_step((torch.ones(4, 3),))
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert math.isclose(norm.item(), 0.25, rel_tol=1e-4)


@pytest.mark.parametrize("name", ["blocks.1.mlp.out.weight", "blocks.0.attention.flow.weight", "head.weight"])
def test_nan_is_named(name):
    """Also where it makes positions NaN, which the neighbour search refuses."""
    trainer = Trainer(tiny(), steps=9)
    it = stream()
    trainer.train_step(next(it))
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] = float("nan")
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFiniteLoss, match=f"step 1; first seen in {name}") as caught:
        trainer.train_step(next(it))
    assert caught.value.step == 1 and caught.value.layer == name
    assert all(same_bits(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_overflow_is_named():
    """Every parameter is finite; a layer's output is not."""
    trainer = Trainer(tiny(), steps=9)
    with torch.no_grad():
        trainer.model.blocks[1].mlp.out.weight.fill_(3e38)
    with pytest.raises(NonFiniteLoss, match=r"first seen in blocks\.1\.mlp\.out"):
        trainer.train_step(next(stream()))


def test_bad_gradient_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.w.sqrt() * x

    with pytest.raises(NonFiniteLoss, match="the gradient is not finite in step 0; first seen in w"):
        Trainer(Root(), steps=1, loss=lambda m, batch: m(batch[0]).sum()).train_step((torch.ones(2),))


def test_autocast():
    history = Trainer(tiny(), steps=12, lr=1e-2, warmup=2, autocast=torch.bfloat16).fit(stream(), progress=False)
    assert history.losses[-1] < history.losses[0] - 0.5


def test_evaluations():
    calls = []
    trainer = Trainer(tiny(), steps=12, warmup=2)
    history = trainer.fit(
        stream(), evaluate=lambda: calls.append(trainer.model.training) or 1.5, evaluations=4, progress=False
    )
    assert [e[0] for e in history.evaluated] == [3, 6, 9, 12] and history.evaluated[0][2] == 1.5 and not any(calls)


@pytest.mark.parametrize("steps, evaluations", [(8, 4), (7, 3), (5, 8)])
def test_a_run_that_goes_on_evaluates_at_the_same_points(steps, evaluations):
    def points(stop):
        trainer = Trainer(tiny(), steps=steps, warmup=0)
        trainer.step = stop
        return [e[0] for e in trainer.fit(stream(), evaluate=float, evaluations=evaluations, progress=False).evaluated]

    whole = points(0)
    assert len(whole) == min(steps, evaluations) and whole[-1] == steps
    for stop in range(1, steps):
        assert points(stop) == [p for p in whole if p > stop]
    trainer = Trainer(tiny(), steps=100)
    trainer.step = 29  # 29 / 100 * 100 is below 29
    assert trainer._next_point(100) == 0.3


def test_held_out_bits_is_the_mean_loss():
    model = tiny()
    with torch.no_grad():
        logits = model(TEXT[:-1].long()[:200][None])[0][0]
    nats = nn.functional.cross_entropy(logits, TEXT[1:201].long(), reduction="sum").item()
    got = demo.held_out_bits(model, TEXT[:201])
    assert math.isclose(got, (nats / math.log(2) + 8) / 201, rel_tol=1e-4)
    assert demo.held_out_bits(model, TEXT) > 1  # several windows


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", dict(demo.MODEL, dim=32))
    monkeypatch.setattr(demo, "BATCH", 2)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(3):
        (text / f"{i}.txt").write_bytes(bytes(TEXT.tolist()))
    out = tmp_path / "report"
    words = ["--text", str(text), "--out", str(out), "--minutes", "0.05"]
    assert demo.main(words, kernel_table=lambda out: f"| a table of {out.name} |") == 0
    assert {f.name for f in out.iterdir()} == {"report.md", "loss_curve.png", "drift.png"}
    assert "| a table of report |" in (out / "report.md").read_text(encoding="utf-8")
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("loss_curve.png", "drift.png"))
    written, printed = (out / "report.md").read_text(encoding="utf-8"), capsys.readouterr().out
    for word in ("gzip -9", "byte bigram", "this model", "held out"):
        assert word in written and word in printed
    assert "bits per byte above gzip" in written or "bits per byte below gzip" in written


def test_a_demo_that_is_stopped_says_what_there_is(tmp_path, capsys, monkeypatch):
    for begun, said in (
        (False, "demo: stopped\n"),
        (True, f"demo: stopped; {tmp_path / 'report.md'} has what there is\n"),
    ):

        def stop(text, out, *_, begun=begun):
            if begun:
                (out / "report.md").touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "run", stop)
        assert demo.main(["--out", str(tmp_path)], prog="demo") == 1
        assert capsys.readouterr().err.strip("\n") + "\n" == said


def test_the_prompt_of_the_demo_ends_with_a_word():
    class Model:
        def generate(self, ids, n, **_):
            return torch.cat([ids, torch.full((1, n), ord("x"))], 1)

    code, german = b"\n    def square(self):\n        return self.val ** 2\n\n\n", "Straßen und Wege.\n\n".encode()
    for text in (90 * code, 99 * german, 999 * b"\n", 50 * b"- "):
        corpus = SimpleNamespace(held_out=torch.tensor(list(text)))
        prompt, new = bits.continue_prompt(Model(), corpus, 0, 20)
        assert new == 20 * "x" and prompt and prompt[-1].isalnum() == any(map(str.isalnum, prompt))


def test_demo_bad_usage(tmp_path, capsys):
    assert demo.main(["--text", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        demo.main(["--minutes", "-1"])
    assert usage.value.code == 2
