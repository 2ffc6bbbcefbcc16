"""Every study from end to end at a tiny size: what it writes, that it goes on where it was stopped, its pictures."""

import argparse
import copy
import json
import runpy

import pytest
import torch
from helpers import INTERPRETED

from dfn import cli
from dfn.runs.options import Options
from dfn.runs.tasks import Text
from dfn.studies import cells, language, length, parts, recall
from dfn.studies.cells import Study, load, spread
from dfn.training.trainer import Trainer

pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
COMMON = ["--batch", 2, "--k", 4, "--threads", 1, "--quiet"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(30):
        words = " ".join(f"word{n * i % 17}" for i in range(60))
        (folder / f"{n}.txt").write_text(words)
    return folder


def study(*arguments):
    return cli.main(["study", *map(str, arguments)])


def without_time(found):
    found = copy.deepcopy(found)
    for cell in found["cells"].values():
        cell.pop("seconds", None)
        for point in cell.get("curve", []):
            point.pop("seconds")
    found.pop("environments")
    return found


def is_whole(folder):
    assert {p.name for p in folder.iterdir()} == {"study.json", "study.md", "study.png"}
    assert (folder / "study.png").read_bytes()[:4] == b"\x89PNG"
    found = load(folder)
    assert found["environments"][0]["torch"] == torch.__version__ and found["environments"][0]["machine"]
    return found


def of_language(text, out):
    return ["language", "--data", text, "--parameters", "0.1M", "--steps", 4, "--length", 16, "--evaluations", 2,
            "--judged", 200, "--rates", 1e-3, 1e-2, "--seeds", 2, "--out", out, *COMMON]  # fmt: skip


def test_language(text, tmp_path, capsys):
    arguments = of_language(text, tmp_path / "a")
    assert study(*arguments) == 0
    found, said = is_whole(tmp_path / "a"), capsys.readouterr().out
    table = (tmp_path / "a" / "study.md").read_text()
    assert table in said and len(found["cells"]) == 6 * 3  # two rates on the first seed, the better on the second
    for kind in ("dfn", "transformer++", "window", "convolved", "transformer", "flownetwork"):
        mine = {key: c for key, c in found["cells"].items() if key.startswith(f"{kind}/")}
        ends = {key: c["value"] for key, c in mine.items() if key.endswith("/0")}
        assert {key.split("/")[1] for key in mine if key.endswith("/1")} == {min(ends, key=ends.get).split("/")[1]}
        for c in mine.values():
            assert abs(c["parameters"] / found["cells"]["dfn/0.001/0"]["parameters"] - 1) <= 0.02
            assert [(p["step"], p["bytes"]) for p in c["curve"]] == [(2, 64), (4, 128)]
            assert c["value"] == c["curve"][-1]["value"] > 0
            assert 0.8 <= c["temperature"] <= 2 and 0.5 * c["value"] < c["calibrated"] < 1.5 * c["value"]
        assert f"| {kind} |" in table
    assert found["data"]["judged_bytes"] == 12 * 16 and found["data"]["judged_windows"] == 12
    assert len(found["data"]["train_sha256"]) == 64 and "judged on 192 bytes, 12 windows spread evenly" in table
    assert set(found["beside"]) == {"gzip", "bzip2", "xz", "bigram"}
    again = [*arguments, "--models", "dfn"]
    assert study(*again) == 0 and load(tmp_path / "a") == found  # nothing is trained twice
    assert study(*arguments, "--warmup", 3) == 2
    assert "holds a study with other options" in capsys.readouterr().err


def test_few_bytes_seen_again(text, tmp_path, capsys):
    few = ["--corpus", 100, "--models", "dfn", "transformer++"]
    assert study(*of_language(text, tmp_path / "a"), *few) == 0
    found = is_whole(tmp_path / "a")
    assert found["data"]["train_bytes"] == 100
    table = (tmp_path / "a" / "study.md").read_text()
    assert "1.28 times the training bytes" in table and "best on the way" in table and "dropout" not in table
    del found["options"]["dropout"]  # as it was written before there was one
    for cell in found["cells"].values():
        del cell["calibrated"]
    (tmp_path / "a" / "study.json").write_text(json.dumps(found))
    assert study(*of_language(text, tmp_path / "a"), *few) == 0
    assert " | - | " in (tmp_path / "a" / "study.md").read_text()
    assert study(*of_language(text, tmp_path / "a"), *few, "--dropout", 0.1) == 2
    assert "holds a study with other options" in capsys.readouterr().err
    assert study(*of_language(text, tmp_path / "b"), *few, "--dropout", 0.1, "--attention-dropout", 0.2) == 0
    assert "times the training bytes; dropout 0.1; attention dropout 0.2" in (tmp_path / "b" / "study.md").read_text()
    assert load(tmp_path / "b")["cells"]["dfn/0.01/0"]["value"] != found["cells"]["dfn/0.01/0"]["value"]
    assert study(*of_language(text, tmp_path / "d"), *few, "--confidence-penalty", 0.5) == 0
    assert "times the training bytes; confidence penalty 0.5" in (tmp_path / "d" / "study.md").read_text()
    for key, cell in load(tmp_path / "d")["cells"].items():
        assert cell["value"] != found["cells"][key]["value"]
    assert study(*of_language(text, tmp_path / "c"), "--dropout", 0.1) == 2
    assert "flownetwork has no dropout" in capsys.readouterr().err


def test_goes_on_within_a_cell(text, tmp_path, monkeypatch, capsys):
    """Stopped in the middle of a cell and gone on with, it ends with the same figures; what was there is reported."""
    monkeypatch.setattr(cells, "EVERY", 1)
    options = ["--models", "dfn", "transformer++", "--seeds", 1]
    assert study(*of_language(text, tmp_path / "whole"), *options) == 0
    step, calls = Trainer.train_step, []

    def stopped(self, batch):
        calls.append(self.step)
        if len(calls) == 7:  # of the second cell, after two of its four steps
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    out = tmp_path / "stopped"
    assert study(*of_language(text, out), *options) == 1
    assert len(load(out)["cells"]) == 1 and (out / "study.png").exists()
    assert any((out / "cells").rglob("step-*.safetensors"))
    calls[:] = [0] * 7
    assert study(*of_language(text, out), *options) == 0
    assert calls[7] == 2  # not from the beginning
    assert without_time(is_whole(out)) == without_time(load(tmp_path / "whole"))


def test_a_cell_that_blows_up_is_not_chosen(text, tmp_path, capsys):
    rates = ["--rates", 1e30, 1e-2, "--warmup", 0, "--models", "dfn", "--seeds", 1]
    assert study(*of_language(text, tmp_path), *rates) == 0
    found = is_whole(tmp_path)
    assert "not finite" in found["cells"]["dfn/1e+30/0"]["failed"]
    assert "| dfn | " in (tmp_path / "study.md").read_text() and "not finite" in (tmp_path / "study.md").read_text()


def test_recall(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "JUDGED", 20)
    arguments = ["recall", "--pairs", 2, 5, "--dims", 16, "--depths", 1, "--steps", 3, "--seeds", 2, "--evaluations", 1,
                 *COMMON]  # fmt: skip
    assert study(*arguments, "--out", tmp_path / "small") == 0
    found = is_whole(tmp_path / "small")
    assert len(found["cells"]) == 2 * 3 * 2
    by_model = {key.split("/")[0]: c["parameters"] for key, c in found["cells"].items()}
    assert all(abs(n / by_model["dfn"] - 1) <= 0.02 for n in by_model.values())
    assert all(0 <= c["value"] <= 1 for c in found["cells"].values())
    assert study(*arguments, "--zoology", "--models", "dfn", "--seeds", 1, "--out", tmp_path / "zoology") == 0
    assert {c["vocabulary"] for c in load(tmp_path / "zoology")["cells"].values()} == {8192}
    assert study("recall", "--pairs", 65, "--out", tmp_path / "no") == 2


def test_length(text, tmp_path):
    arguments = ["length", "--data", text, "--parameters", "0.1M", "--steps", 2, "--length", 16, "--longest", 64,
                 "--rows", 2, "--seeds", 1, "--memory-size", 4, "--out", tmp_path, *COMMON]  # fmt: skip
    assert study(*arguments) == 0
    found = is_whole(tmp_path)
    assert len(found["cells"]) == 4 + 6  # both DFN with a memory, too, find needles
    for key, c in found["cells"].items():
        if key.startswith("text"):
            assert list(c["by_length"]) == ["16", "32", "64"]
            whole = sum(c["by_stretch"][e] * n for e, n in (("16", 16), ("32", 16), ("64", 32))) / 64
            assert abs(whole - c["by_length"]["64"]) < 1e-9
        else:
            assert list(c["by_distance"]) == ["2", "14", "30", "62"]
    assert "judged on 4, 2, 2, 2 of them" in (tmp_path / "study.md").read_text()
    few = ["--tasks", "needle", "--models", "window", "--rates", 6e-3, 1e-3]
    assert study(*arguments, *few) == 0  # another rate is added to what is there
    assert len(is_whole(tmp_path)["cells"]) == 11


def test_semantic_heads():
    """Of the model that the study calls so, and of `dfn train text --semantic`; the others have one of four."""
    asked = argparse.Namespace(k=4, pos_dim=3, convolution=4, parameters="0.1M", memory_size=5, length=16)
    for kind, heads, memory in (("dfn", 1, 0), ("semantic", 2, 0), ("semantic, memory", 2, 5), ("dfn, memory", 1, 5)):
        model = length.model_of(kind, 31, asked)
        assert model.positions.semantic == heads and model.config["memory_size"] == memory
    for given, heads in (({}, 1), ({"semantic": 3}, 3)):
        assert Text(Options.of("text", **given)).model().positions.semantic == heads


def test_parts(text, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "JUDGED", 20)
    shape = ["--data", text, "--steps", 2, "--seeds", 1, "--dim", 16, "--layers", 1, "--length", 16, "--memory-size", 4]
    lines = ["--lines", "full", "flow", "memory", "gelu", "deeper", "--judged", 300]
    assert study("parts", *shape, *lines, "--out", tmp_path / "a", *COMMON) == 0
    found = is_whole(tmp_path / "a")
    assert len(found["cells"]) == 5 * 3 - 1  # recall has no memory to leave out
    texts = [c["value"] for key, c in found["cells"].items() if key.startswith("text")]
    assert len(set(texts)) == len(texts)  # every run is another one
    rows = [line.split("|")[1:-1] for line in parts.table(found).splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == [parts.LINES[line][0] for line in lines[1:6]]
    assert (
        cli.main(["ablate", *map(str, shape), "--tasks", "text", "--out", str(tmp_path / "b"), *map(str, COMMON)]) == 0
    )
    assert {key.split("/")[1] for key in is_whole(tmp_path / "b")["cells"]} == set(parts.LEFT_OUT)
    assert cli.main(["plot", str(tmp_path / "b")]) == 0
    assert study("parts", *shape[:-1], 0, "--out", tmp_path / "c", *COMMON) == 2


def test_every_line_of_parts_changes_the_model():
    config = dict(vocab_size=16, dim=16, layers=2, k=5, memory_size=4)
    models = {}
    for line, (_, change) in parts.LINES.items():
        torch.manual_seed(0)
        models[line] = parts.DFNLanguageModel(**change(config))
        assert models[line](torch.zeros(1, 9, dtype=torch.long))[0].isfinite().all()
    assert "block_options" not in config
    whole = models["full"].config
    assert all(m.config != whole for line, m in models.items() if line != "full")
    assert models["deeper"].config["layers"] == 4


def test_a_stopped_study_of_parts_shows_what_every_line_has():
    found = {"cells": {f"text/{line}/{seed}": {"value": 2.0 + seed, "parameters": 5} for line in parts.LEFT_OUT
                       for seed in (0, 1)}}  # fmt: skip
    found["cells"] |= {"text/full/2": {"value": 9.0, "parameters": 5}, "segments/full/0": {"value": 0.5}}
    lines, seeds = parts.complete(found)
    assert lines == list(parts.LEFT_OUT) and seeds == {"text": {0, 1}}


def test_spread():
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([1.0], 1) == "1.0" and spread([], 1) == "-"


def test_modules_are_commands(monkeypatch):
    """``python -m dfn.studies.NAME`` is ``dfn study NAME`` with the same words."""
    called = []
    monkeypatch.setattr(cells.subprocess, "call", lambda words: called.append(words) or 2)
    monkeypatch.setattr("sys.argv", ["x", "--pairs", "99"])
    for module in (language, length, parts, recall):
        name = module.__name__.rsplit(".", 1)[1]
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module.__name__, run_name="__main__", alter_sys=False)
        assert end.value.code == 2 and called[-1][1:] == ["-m", "dfn", "study", name, "--pairs", "99"]


def test_another_machine_is_noted(tmp_path, monkeypatch):
    first = Study("recall", tmp_path, {"seed": 0}, names="model", say=lambda line: None)
    first.cell("a", lambda folder: dict(value=1.0))
    monkeypatch.setattr(cells, "environment", lambda: dict(machine="another"))
    second = Study("recall", tmp_path, {"seed": 0}, names="model", say=lambda line: None)
    second.cell("b", lambda folder: dict(value=2.0))
    found = json.loads((tmp_path / "study.json").read_text())
    assert [c["environment"] for c in found["cells"].values()] == [0, 1] and len(found["environments"]) == 2
