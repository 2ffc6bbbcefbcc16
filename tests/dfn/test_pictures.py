"""Every picture of a run, a study or a field, drawn from small or made-up data, is legible (tests/legible.py)."""

import statistics
from dataclasses import replace

import made_up
import pytest
import torch
from helpers import INTERPRETED

pytest.importorskip("matplotlib")
from legible import faults

from dfn import style
from dfn.flownetwork import FlowNetwork
from dfn.models.language import DFNLanguageModel
from dfn.pictures import animation
from dfn.pictures import runs as pictures_of_runs
from dfn.pictures.drift import drift, neighbours, trace
from dfn.pictures.fields import entities_picture
from dfn.pictures.studies import draw_study
from dfn.pictures.training import loss_curve
from dfn.runs.options import Options
from dfn.runs.run import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
STUDIES = (made_up.language_study, made_up.recall_study, made_up.length_study, made_up.parts_study)


def size_of(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(
    "history, figures, unit",
    [
        (made_up.history(600, 2.3), {"model": 2.31, "gzip": 2.46, "bigram": 3.4}, "bits"),
        (made_up.history(600, 2.42), {"model": 2.43, "gzip": 2.44, "bigram": 2.45}, "bits"),  # all ends in one place
        (made_up.history(60, 3.6), {"gzip": 2.46, "bigram": 3.4}, "bits"),  # above both
        (made_up.history(7, 7.0, evaluations=0), {"gzip": 2.46, "bigram": 3.4}, "bits"),
        (made_up.history(60, 0.5, 2.0, scale=1), {}, "nats"),
        (made_up.history(1, 2.0, evaluations=1), {}, "error"),
    ],
)
def test_loss_curve(tmp_path, legible, history, figures, unit):
    loss_curve(history, figures, tmp_path / "loss.png", unit=unit)
    assert size_of(tmp_path / "loss.png") == (9 * style.DPI, 5 * style.DPI)
    assert (tmp_path / "loss.png").stat().st_size < 100_000


@pytest.mark.parametrize("make", STUDIES)
def test_studies(tmp_path, legible, make):
    draw_study(make(3), tmp_path / "study.png")
    wide, _ = size_of(tmp_path / "study.png")
    assert 600 < wide < 1800 and (tmp_path / "study.png").stat().st_size < 150_000


@pytest.mark.parametrize("make", STUDIES)
def test_studies_that_were_stopped(tmp_path, legible, make):
    """With nothing yet, and with the first cell alone."""
    found = make(1)
    draw_study({**found, "cells": dict(list(found["cells"].items())[:1])}, tmp_path / "study.png")
    draw_study({**found, "cells": {}}, tmp_path / "study.png")


@pytest.mark.parametrize("layers", [1, 4])
def test_drift(tmp_path, legible, layers):
    text = torch.tensor(
        list(b"def f(x):\n    return 3.5 * x[0] + $HOME\n\tif y: pass # a comment, and a long line\n" * 4)
    )
    model = DFNLanguageModel(dim=16, layers=layers, k=4)
    drift(model, text, tmp_path / "drift.png")
    assert size_of(tmp_path / "drift.png")[0] == 11 * style.DPI
    drift(DFNLanguageModel(dim=16, layers=layers, heads=1, pos_dim=1, k=4), text, tmp_path / "drift.png")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"receiver_flow": False, "salience": False}])
def test_what_is_drawn_is_what_is_read(options):
    """The places, looks and influence of the picture give what the attention reads."""
    model = DFNLanguageModel(dim=16, layers=2, k=4, block_options=options).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, (first, last) = torch.randint(256, (1, 23)), model.blocks
    stage, attention = trace(model, ids)[-1], last.attention
    states = model.embed(ids)
    states, positions = first(states, model.positions(states))
    read = attention(last.said(states), positions)[0][0, -1].view(attention.heads, -1)
    values = attention.split(attention.value(last.said(states)))[0]
    for h in range(attention.heads):
        near, share = neighbours(attention, stage, h, 22)
        torch.testing.assert_close((share[:, None] * values[h][near]).sum(0), read[h])


@pytest.mark.slow
def test_entities(tmp_path, legible):
    pytest.importorskip("sklearn")
    figures = entities_picture(tmp_path / "entities.png", share=40)
    assert (tmp_path / "entities.png").stat().st_size > 100_000
    assert figures["adaptive"] > figures["uniform"]


def test_patterns(tmp_path, legible):
    metrics = FlowNetwork(23, 16, 3, 19)(torch.randint(23, (2, 7)))[1]
    metrics.plot(tmp_path / "patterns.png")


@pytest.mark.parametrize("kind, draw", [("digits", "digits"), ("masked", "reconstruction")])
def test_pictures_of_runs(tmp_path, legible, kind, draw):
    pytest.importorskip("sklearn")
    pytest.importorskip("safetensors")
    options = Options.of(kind, steps=2, batch=4, dim=16, layers=1, k=4, threads=1)
    run = train(options, tmp_path / "run", evaluations=0, progress=False)
    getattr(pictures_of_runs, draw)(run, tmp_path / "run.png")


def test_a_plot_shows_what_the_run_was_judged_to_be(text, tmp_path, monkeypatch):
    """The figure at the end of the curve is the one that the end of the run printed, not that of its last sample."""
    pytest.importorskip("safetensors")
    drawn = []
    monkeypatch.setattr(pictures_of_runs, "loss_curve", lambda history, figures, *_, **__: drawn.append(figures))
    monkeypatch.setattr(pictures_of_runs, "drift", lambda *_: None)
    options = Options.of("text", data=text, steps=2, batch=2, length=16, dim=16, layers=1, k=4, threads=1)
    figures = train(options, tmp_path, evaluations=1, progress=False, say=lambda said: None).judge()
    pictures_of_runs.draw(tmp_path)
    train(replace(options, steps=3), tmp_path, resume=True, given={"steps": 3}, progress=False, say=lambda said: None)
    pictures_of_runs.draw(tmp_path)  # was not judged after these steps
    assert drawn[0] == {name: figures[name] for name in ("model", "gzip", "bigram")}
    assert drawn[1] == {name: figures[name] for name in ("gzip", "bigram")}


def test_settings_of_the_caller_stay(tmp_path, monkeypatch):
    """Nobody's fonts, backend or open figures change, and theirs do not change our pictures."""
    import matplotlib

    with style.picture(tmp_path / "a.png", 4, 3, "title") as fig:
        fig.add_subplot().plot([1, 2])
    with matplotlib.rc_context({"font.size": 31, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        with style.picture(tmp_path / "b.png", 4, 3, "title") as fig:
            fig.add_subplot().plot([1, 2])
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_names_lie_apart():
    draw = torch.Generator().manual_seed(0)
    for n in (1, 2, 9):
        places = (100 * torch.rand(n, generator=draw)).sort().values.tolist()
        found = style.spread(places, 10, 0, 100)
        assert all(b - a >= 10 - 1e-9 for a, b in zip(found, found[1:], strict=False))
        assert min(found) >= 0 and max(found) <= 100 + 1e-9
        if n == 2 and places[1] - places[0] < 10:
            assert statistics.fmean(found) == pytest.approx(statistics.fmean(places))
    assert style.spread([3.0, 50.0], 10, 0, 100) == [3.0, 50.0]  # nobody moves without need


def test_colours_differ_for_the_colour_blind():
    """Okabe and Ito's are told apart without red or green cones too (Vienot's matrices); names in them are dark."""
    from legible import CONTRAST, contrast
    from matplotlib.colors import to_rgb

    colors = [style.OURS, *style.OTHERS]
    rgb = torch.tensor([to_rgb(c) for c in colors])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    protan = torch.tensor([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    deutan = torch.tensor([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    for eye in (torch.eye(3), protan, deutan):
        seen = (linear @ eye.T).clamp(0, 1) ** (1 / 2.4)
        near = torch.cdist(seen, seen) + 9 * torch.eye(len(colors))
        assert near.min() > 0.1, (colors, near)
    assert all(contrast(style.shade(color)) > CONTRAST for color in colors)


def test_animation(tmp_path):
    """What it shows are the model's own places and answers, and every frame is legible as it stands."""
    from PIL import Image

    recorded = animation.record(steps=2, every=1, seed=1)
    assert [a.step for a in recorded.looks] == [0, 1, 2] and len(set(recorded.keys)) == animation.PAIRS
    assert all(a.pairs.isfinite().all() and a.asked.shape == (8, 2) and 0 <= a.share <= 1 for a in recorded.looks)
    again = animation.record(steps=2, every=1, seed=1)
    assert again.keys == recorded.keys and again.looks[2].asked.equal(recorded.looks[2].asked)
    times = animation.times(recorded.looks, 9)
    assert times[0] == 0 and times[-1] == pytest.approx(2) and sorted(times) == times
    for time in (0.0, 0.7, 2.0):
        with animation.drawn() as (fig, axes):
            animation.draw_frame(axes, recorded, time)
            fig.draw_without_rendering()
            assert not faults(fig, half=False)
    animation.animate(recorded, tmp_path / "drift.gif", frames=5, hold=3)
    with Image.open(tmp_path / "drift.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (800, 460) and gif.info["loop"] == 0
        assert gif.info["duration"] == animation.MILLISECONDS
        gif.seek(4)
        assert gif.info["duration"] == 3 * animation.MILLISECONDS


# ---- the helper finds what it is there for ---------------------------------------------------------------------------
def broken(change) -> str:
    with style.figure(6, 4, "title") as fig:
        ax = fig.add_subplot()
        ax.plot([0, 1, 2], [0, 1, 0], label="a curve")
        ax.set(xlabel="steps", ylabel="bits")
        fig.draw_without_rendering()
        assert not faults(fig)
        change(fig, ax)
        fig.draw_without_rendering()
        return "\n".join(faults(fig))


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda fig, ax: fig.text(0.9, 0.5, "a long text beyond the edge"), "is cut off"),
        (lambda fig, ax: ax.text(1, 0.2, "tiny", size=6), "is small"),
        (lambda fig, ax: ax.text(1, 0.2, "yellow", color="#F0E442"), "is faint"),
        (lambda fig, ax: [ax.text(1, 0.2, "one"), ax.text(1, 0.2, "two")], "overprint each other"),
        (lambda fig, ax: ax.text(0.5, 0.5, "on the curve", ha="center", va="center"), "is struck through"),
        (lambda fig, ax: ax.legend(loc="upper center"), "covers a curve"),
        (lambda fig, ax: ax.set_xlabel(""), "has no name"),
    ],
)
def test_faults_are_found(change, fault):
    assert fault in broken(change)
