"""What a person sees: every default, figures in words, where the files are, what comes next, text as it comes."""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED
from tqdm import tqdm

from dfn import cli, demo
from dfn.models.language import DFNLanguageModel
from dfn.runs import needed
from dfn.runs.options import KINDS, Options
from dfn.runs.run import Run
from dfn.runs.tables import figures_in_words
from dfn.studies import recall
from dfn.training.trainer import Trainer

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
TINY = ["--dim", "16", "--layers", "1", "--k", "4", "--batch", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a run"
    words = ["train", "text", "--data", text, "--out", str(out), "--steps", "1", "--length", "16", "--quiet"]
    assert cli.main([*words, *TINY]) == 0
    return out


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in dict.fromkeys(action.choices.values()):
                yield from parsers(one)


def test_every_option_of_every_command_says_its_default():
    found = list(parsers(cli.build_parser()))
    assert {p.prog.split()[-1] for p in found} >= {"train", "generate", "eval", "ablate", "plot", "recall", "parts"}
    for parser in found:
        for block in re.split(r"\n  (?=-)", parser.format_help().split("\noptions:")[1])[1:]:
            if not block.startswith(("-h", "--version")):
                assert "default" in " ".join(block.split()), f"{parser.prog}: {block}"


def test_defaults_by_kind_are_those_that_a_run_takes():
    said = {p.prog: " ".join(p.format_help().split()) for p in parsers(cli.build_parser())}["dfn train"]
    for kind in ("text", "digits", "masked", "joint"):
        steps = Options.of(kind).steps
        assert re.search(rf"length of the run \(default: [^)]*\b{steps} [^;)]*\b{kind}\b", said)


def test_a_run_says_what_it_is_where_it_is_and_what_comes_next(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dfn"])
    monkeypatch.setattr(cli.shutil, "which", lambda name: "/bin/" + name)
    for kind, words in (("text", ["--data", text, "--length", "16"]), ("joint", ["--entities", "5"])):
        out = tmp_path / f"a {kind}"
        assert cli.main(["train", kind, "--out", str(out), "--steps", "2", *words, *TINY]) == 0
        said = capsys.readouterr()
        assert f"{out} keeps a checkpoint every 100 steps" in said.out
        begin, end = said.out.split("held out, after 2 steps")
        assert begin.startswith("data: ") and "model: DFN" in begin
        assert "judging on" in said.err and "loss" in said.err
        assert f"in {out}: step-00000002.safetensors (the model), figures.json" in end
        commands = [shlex.split(line) for line in end.split("next:\n")[1].splitlines()]
        assert len(commands) == 2
        for command in commands:
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
                assert command[0] == "dfn" and cli.main(command[1:]) == 0, command


def test_commands_are_printed_as_they_can_be_called(monkeypatch):
    monkeypatch.setattr(cli.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(sys, "argv", ["/somewhere/dfn"])
    assert cli.program() == ["dfn"]
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    assert cli.program() == ["/somewhere/dfn"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/dfn/__main__.py"])
    assert cli.program() == [sys.executable, "-m", "dfn"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_has_words_and_a_unit(kind, text):
    if kind in ("digits", "masked", "contrastive"):
        pytest.importorskip("sklearn")
    options = Options.of(kind, **({"data": text} if kind == "text" else {}), batch=2, dim=16, layers=1, k=4)
    task = KINDS[kind](options)
    figures = task.figures(task.model().eval())
    assert set(figures) <= set(task.words) and all(len(of) == 2 and all(of) for of in task.words.values())
    lines = figures_in_words(figures, task.words).splitlines()
    for (name, value), line in zip(figures.items(), lines, strict=True):
        words, unit = task.words[name]
        assert line.strip().startswith(words) and line.endswith(unit)
        shown = float(line.strip().removeprefix(words).split()[0].replace(",", ""))
        assert shown == pytest.approx(value, abs=5e-4)


def test_a_bar_says_that_it_judges(capsys):
    model, seen = torch.nn.Linear(3, 1), []

    def evaluate():
        seen.extend(bar.desc for bar in tqdm._instances)
        return 1.0

    trainer = Trainer(model, loss=lambda m, b: m(b).square().mean(), steps=2, unit="error")
    trainer.fit([torch.rand(2, 3)], evaluate=evaluate, evaluations=1)
    said = capsys.readouterr().err
    assert seen == ["judging"] and "training 100%" in said
    assert re.search(r"loss [\d.]+ squared error", said) and "tokens/s" in said and "MiB" in said


@pytest.mark.parametrize("kind, words, unit", [("text", ["--length", "16"], "byte"), ("digits", [], "entitie")])
def test_a_bar_counts_what_the_kind_is_made_of(kind, words, unit, text, tmp_path, capsys):
    if kind == "digits":
        pytest.importorskip("sklearn")
    data = ["--data", text] if kind == "text" else []
    assert cli.main(["train", kind, "--out", str(tmp_path), "--steps", "1", *data, *words, *TINY]) == 0
    said = capsys.readouterr().err
    assert f" {unit}s/s" in said and "token" not in said
    assert re.search(r"loss [\d.]+ bits per byte" if kind == "text" else r"loss [\d.]+ nats", said)


def test_a_run_ends_with_a_prompt_from_its_text(tmp_path, capsys):
    for name, written in (("german", "  überall\n  Straßen und Wege\n" * 60), ("numbers", "1 2 3 4 5 6 7 8 9\n" * 200)):
        (tmp_path / f"{name}.txt").write_text(written, encoding="utf-8")
        words = ["--data", str(tmp_path / f"{name}.txt"), "--out", str(tmp_path / name), "--length", "16"]
        assert cli.main(["train", "text", "--steps", "1", "--quiet", *words, *TINY]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if " generate " in line)
        *_, flag, prompt = shlex.split(line)
        assert (flag == "--prompt" and prompt in written.split()) if name == "german" else "--prompt" not in line


def test_a_study_says_what_its_lines_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recall, "JUDGED", 20)
    words = ["--pairs", "2", "--dims", "16", "--depths", "1", "--steps", "1", "--seeds", "1", "--evaluations", "1"]
    words += ["--batch", "2", "--k", "4", "--threads", "1", "--quiet", "--models", "dfn", "--out", str(tmp_path)]
    assert cli.main(["study", "recall", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "each line: what was trained, and its share of queries answered (more is better)" in lines
    words = "dfn, layers 1, dim 16, pairs 2, learning rate 0.003, seed 0"
    assert f"1. {words} .." in lines
    (result,) = (line for line in lines if line.startswith(f"   {words}: "))
    assert 0 <= float(result.rpartition(": ")[2]) <= 1
    assert any(str(tmp_path) in line and "study.json" in line for line in lines)


# ---- generate -------------------------------------------------------------------------------------------------------
class Out(io.BytesIO):
    """What was written when it was flushed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        super().flush()
        if not self.closed:
            self.seen.append(self.getvalue())


def test_text_comes_as_it_is_made_and_characters_whole():
    out, there = Out(), []

    def new():
        for byte in "aé€😀".encode() + b"\xff\xe2\x82" + b"z\xe2\x82":
            there.append(out.seen[-1])
            yield byte

    cli.stream(b"the ", new(), out)
    assert out.getvalue() == b"the " + "aé€😀".encode() + b"\xff\xe2\x82z\xe2\x82\n"
    whole = ["the ", "the a", "the aé", "the aé€", "the aé€😀"]
    assert list(dict.fromkeys(there))[:5] == [text.encode() for text in whole]  # nothing waits, nothing comes in halves
    out = Out()
    cli.stream(b"caf\xc3", iter(b"\xa9"), out)  # the prompt ends within a character
    assert out.seen[0] == "café".encode() and out.getvalue() == "café\n".encode()


def test_stream_gives_what_generate_gives(trained):
    model = Run.load(trained).model
    ids = torch.tensor([list(b"the "), list(b"dog ")])
    draw = lambda: dict(temperature=0.9, top_k=7, generator=torch.Generator().manual_seed(3))  # noqa: E731
    tokens = list(model.stream(ids, 5, **draw()))
    assert len(tokens) == 5 and model.generate(ids, 5, **draw()).equal(torch.cat([ids, torch.stack(tokens, 1)], 1))


def test_ctrl_c_keeps_what_there_is(trained, monkeypatch, capsys):
    whole = DFNLanguageModel.stream

    def interrupted(self, *arguments, **options):
        for count, token in enumerate(whole(self, *arguments, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield token

    words, written = ["generate", str(trained), "--prompt", "the ", "--tokens", "9", "--seed", "5"], []
    for stream in (whole, interrupted):
        monkeypatch.setattr(DFNLanguageModel, "stream", stream)
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", out)
        written.append((cli.main(words), out.buffer.getvalue()))
    monkeypatch.undo()
    (zero, all_of_it), (one, part) = written
    assert (zero, one) == (0, 1) and part == all_of_it[:7] + b"\n" and len(all_of_it) == 14
    assert capsys.readouterr().err.strip().splitlines()[-1] == "dfn: stopped"


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
@pytest.mark.parametrize("ends", ["interrupt", "pipe"])
def test_generate_ends_without_a_traceback(trained, ends):
    process = subprocess.Popen(
        [sys.executable, "-m", "dfn", "generate", str(trained), "--tokens", "1000000", "--prompt", "the "],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    first = process.stdout.read(8)  # comes long before the end
    if ends == "interrupt":
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert rest.endswith(b"\n")
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 1 and first.startswith(b"the ")
    assert "Traceback" not in said and "Exception ignored" not in said, said
    assert ("dfn: stopped" in said) == (ends == "interrupt")


# ---- what is missing ------------------------------------------------------------------------------------------------
def test_what_is_not_installed_is_said_once_for_all(monkeypatch, capsys, tmp_path):
    there = needed.importlib.util.find_spec
    monkeypatch.setattr(
        needed.importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else there(name, *more)
    )
    assert cli.main(["plot", str(tmp_path)]) == 1
    assert demo.main(["--out", str(tmp_path / "report")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in said] == ["needs matplotlib: pip install 'dfn-kernels[models]'"] * 2
