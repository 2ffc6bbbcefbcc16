"""The command as new users meet it: exit codes, options without a use, any encoding, defaults that fit together."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED

import dfn
from dfn import cli, runs
from dfn.models.layers import FIRST_BLOCK
from dfn.runs.options import KINDS, Options, UsageError
from dfn.runs.run import Run

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
TINY = ["--dim", "16", "--layers", "1", "--k", "4", "--batch", "2", "--length", "16", "--threads", "1", "--steps", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    assert (
        cli.main(["train", "text", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), "--quiet", *TINY])
        == 0
    )
    return folder


def failed(capsys, code, *arguments):
    """The one line that is said."""
    try:
        found = cli.main([str(a) for a in arguments])
    except SystemExit as error:  # argparse
        found = error.code
    said = capsys.readouterr().err.strip().splitlines()
    assert found == code and not any("Traceback" in line for line in said), (found, said)
    return said[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "text", "--heads", 3], "dim must be a multiple of heads, got 128 and 3"),
        (["train", "text", "--k", 2000], "k must be at most 1024, got 2000"),
        (["train", "text", "--k", 0], "k must be at least 1, got 0"),
        (["train", "text", "--data", "/does/not/exist"], "no such file or folder: /does/not/exist"),
        (["train", "text", "--seed", 2**64], f"seed must be at most {2**63 - 1}, got {2**64}"),
        (["train", "text", "--seed", -1], "seed must be at least 0, got -1"),
        (["train", "text", "--dim", 10**12, "--heads", 1], f"dim must be at most {2**31 - 1}"),
        (["train", "text", "--batch", 9, "--accumulate", 2], "batch must be a multiple of accumulate, got 9 and 2"),
        (["train", "digits", "--data", "/does/not/exist"], "--data has no meaning for digits"),
        (["train", "text", "--field", "image"], "--field has no meaning for text"),
        (["train", "digits", "--memory-size", 4], "--memory-size has no meaning for digits"),
        (["train", "masked", "--without", "flow"], "--without has no meaning for masked"),
        (["train", "joint", "--length", 9], "--length has no meaning for joint without --data"),
        (["train", "digits", "--entities", 65], "entities must be at most the 64 cells of a field, got 65"),
        (
            ["train", "masked", "--field", "text", "--size", 8],
            "entities must be at most the 32 cells of a field, got 128",
        ),
        (["train", "masked", "--pos-dim", 1], "pos_dim must be at least the 2 axes of a field, got 1"),
        (["train", "digits", "--dropout", 0.1], "--dropout has no meaning for digits"),
        (["train", "text", "--dropout", 1.5], "dropout must be at most 1, got 1.5"),
        (["train", "text", "--attention-dropout", 1], "attention_dropout must be at most 0.99, got 1"),
        (["train", "text", "--confidence-penalty", -0.1], "confidence_penalty must be at least 0, got -0.1"),
        (["train", "text", "--semantic", 4], "semantic must be between 0 and 3, got 4"),
        (["train", "text", "--semantic", 2, "--without", "heads"], "semantic must be between 0 and 1, got 2"),
        (["train", "text", "--block", "first", "--convolution", 3], "convolution must be 0 with --block first, got 3"),
        (["train", "digits", "--convolution", 3], "--convolution has no meaning for digits"),
        (["eval", "memory", "--run", "x"], "--run has no meaning for memory"),
        (["study", "recall", "--pairs", 65], "pairs must be at most 64"),
        (["train", "text", "--init", "/does/not/exist"], "--init: /does/not/exist holds no checkpoint"),
        (["ablate", "--field", "image"], "dfn ablate: unrecognized arguments: --field image"),
        (["train", "text", "--setps", 3], "dfn train: unrecognized arguments: --setps 3; did you mean --steps?"),
        (
            ["study", "recall", "--pears=3"],
            "dfn study recall: unrecognized arguments: --pears=3; did you mean --pairs?",
        ),
    ],
)
def test_bad_usage_is_2(arguments, message, capsys, tmp_path):
    out = [] if arguments[0] == "eval" else ["--out", tmp_path / "out"]
    assert message in failed(capsys, 2, *arguments, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", -1], "must not be negative, got -1"),
        (["--temperature", "nan"], "must not be negative, got nan"),
        (["--seed", 2**63], "must be between 0 and"),
        (["--tokens", 2**40], "must be between 1 and"),
        (["--top-k", 0], "must be between 1 and"),
        (["--prompt", ""], "--prompt must not be empty"),
    ],
)
def test_bad_usage_of_generate_is_2(arguments, message, trained, capsys):
    assert message in failed(capsys, 2, "generate", trained / "run", *arguments)


@pytest.mark.parametrize("arguments", [["train", "text", "--lr", "abc"], ["generate"], ["study"], ["tain"]])
def test_bad_usage_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.match(r"dfn( train| generate| study)?: ", said) and "--help" in said


def test_failures_are_one_line_without_internal_names(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    said = failed(capsys, 1, "train", "text", "--data", tmp_path / "empty.txt", "--out", tmp_path / "out", *TINY)
    assert said == f"dfn: {tmp_path / 'empty.txt'} is empty"
    for error, line in (
        (ValueError("load_corpus: too little"), "too little"),
        (ValueError("DynamicFlowAttention: dim must"), "dim must"),
        (ValueError("knn: k must be"), "knn: k must be"),
        (RuntimeError("first\nException raised from x at /build/y.cpp:3"), "first"),
        (RuntimeError("[enforce fail at alloc.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                      "to allocate 4398046511104 bytes. Error"), "out of memory: 4398046511104 bytes could not be had"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
         "out of memory: 2.00 GiB could not be had"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device", "/x/step-1"), "/x/step-1: No space left on device"),
    ):  # fmt: skip

        def fail(folder, say, error=error):
            raise error

        monkeypatch.setattr(Run, "load", fail)
        assert failed(capsys, 1, "generate", trained / "run") == f"dfn: {line}"


@pytest.mark.parametrize("kind, field", [(k, None) for k in KINDS] + [(k, f) for k in ("masked", "contrastive") for f in
                                                                     ("image", "sound", "text")])  # fmt: skip
def test_every_kind_and_field_runs_with_its_own_defaults(kind, field, tmp_path):
    if kind in ("digits", "masked", "contrastive"):
        pytest.importorskip("sklearn")
    given = {} if field is None else {"field": field}
    options = Options.of(kind, **given, steps=2, batch=2, threads=1, warmup=0)
    try:
        run = runs.train(options, tmp_path, progress=False, say=lambda line: None, evaluations=0)
    except ValueError as error:
        if field == "sound" and "no WAV files on this machine" in str(error):
            pytest.skip(str(error))
        raise
    assert run.history.steps == [1, 2]


def test_what_a_kind_of_ones_own_uses_is_not_asked():
    class Own(KINDS["text"]):
        own = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "own", Own)
        assert Options.of("own", field="sound", length=7).length == 7
    with pytest.raises(UsageError, match="KIND must be one of"):
        Options.of("own")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_bytes_go_in_and_come_out(trained, encoding, monkeypatch):
    """A prompt that is not UTF-8, on a terminal that is not either: the bytes are those of the model."""
    prompt = b"caf\xe9 \xff \xe2\x82\xac"
    model = Run.load(trained / "run").model
    wanted = model.generate(torch.tensor([list(prompt)]), 7, temperature=0.0)[0].tolist()
    for words in (["--prompt", os.fsdecode(prompt)], ["--prompt", "-"]):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
        assert cli.main(["generate", str(trained / "run"), "--tokens", "7", "--temperature", "0", *words]) == 0
        assert out.buffer.getvalue() == bytes(wanted) + b"\n"


def test_names_are_said_whole_on_an_ascii_terminal(trained, monkeypatch, tmp_path):
    data = tmp_path / os.fsdecode(b"\xe9t\xc3\xa9.txt")
    data.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["train", "text", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet", *TINY]) == 0
    out.flush()
    assert rb"\udce9t\xe9.txt" in out.buffer.getvalue()
    monkeypatch.undo()
    assert Run.load(tmp_path / "run").options.data == str(data)


def test_every_figure_is_shown(trained, capsys):
    assert cli.main(["eval", "text", "--run", str(trained / "run")]) == 0
    lines = capsys.readouterr().out
    assert re.search(r"judged on +270 +held-out bytes", lines) and "this model" in lines
    assert cli.main(["eval", "text", "--run", str(trained / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes judged"] == 270


# What is settled before torch is there.


def command(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    return subprocess.Popen(
        [sys.executable, *arguments], env={**env, "PYTHONPATH": str(ROOT), **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_threads_that_wait_sleep_and_it_is_said(trained, tmp_path):
    data = trained / "text.txt"
    if len(os.sched_getaffinity(0)) == 1 or os.environ.get("OMP_NUM_THREADS") == "1":
        pytest.skip("there is one core")
    tiny = [x for x in TINY if x not in ("--threads",)][:-3] + ["--steps", "1"]
    process = command("-m", "dfn", "train", "text", "--data", str(data), "--out", str(tmp_path), "--quiet", *tiny)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    line = next(line for line in out.splitlines() if "take the least time for a step" in line)
    assert "and sleep while they wait" in line and "--threads" in line
    threads = int(line.split()[0])
    assert Run.load(tmp_path).options.threads == threads >= 1


def test_the_wait_policy_is_set_before_torch_is_imported():
    code = (
        "import os, sys, types, dfn; from dfn.__main__ import main\n"
        "sys.modules['dfn.cli'] = types.SimpleNamespace(main=lambda: print(os.environ['OMP_WAIT_POLICY']))\n"
        "main(); print('torch' in sys.modules)"
    )
    for environment, policy in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        out, _ = command("-c", code, **environment).communicate(timeout=60)
        assert out.split() == [policy, "False"]


def test_names_of_the_package_are_there_when_they_are_asked_for():
    assert dfn.DFNBlock.__name__ == "DFNBlock" and dfn.models.DFNLayer is dfn.DFNLayer and "FlowMixer" in dir(dfn)
    with pytest.raises(AttributeError, match="module 'dfn' has no attribute 'DFNTransformer'"):
        dfn.DFNTransformer  # noqa: B018


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is POSIX")
def test_ctrl_c_during_the_import_prints_no_traceback():
    import signal

    for after in (0.3, 0.8):
        process = command("-c", "from dfn.__main__ import main; print('in', flush=True); main()")
        assert process.stdout.readline() == "in\n"
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        assert process.returncode in (1, 2)  # 2: it was through, and said how it is used


def test_runs_of_before_go_on_as_they_were():
    """Checkpoints that do not say which block they have, or whether it has a convolution."""
    before = Options.restored({"options": dict(kind="text", dim=16)}, "a run")
    then = Options.restored({"options": dict(kind="text", dim=16, block="recommended")}, "a run")
    now = Options.of("text", dim=16)
    names = [[name for name, _ in KINDS["text"](o).model().named_parameters()] for o in (before, then, now)]
    assert ["blocks.0.convolution.weight" in found for found in names] == [False, False, True]
    assert ["blocks.0.attention.salience.weight" in found for found in names] == [False, True, True]
    assert KINDS["text"](Options.of("text", block="first")).model().config["block_options"] == FIRST_BLOCK
