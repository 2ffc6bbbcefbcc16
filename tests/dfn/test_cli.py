"""The command: flags and TOML, exit codes, one clear line for what is wrong; every subcommand on a tiny budget."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import INTERPRETED

from dfn import cli, runs
from dfn.runs.options import Options
from dfn.training import checkpoints

pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
TINY = ["--dim", "16", "--layers", "1", "--k", "4", "--batch", "2", "--length", "16", "--threads", "1"]


def dfn(*arguments):
    return cli.main([str(a) for a in arguments])


def output(*arguments, encoding="ascii"):
    """The bytes that come out, on a terminal of this encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(out):
        assert dfn(*arguments) == 0
    out.flush()
    return out.buffer.getvalue()


def failed(capsys, code, *arguments):
    """The one line that is said."""
    try:
        found = dfn(*arguments)
    except SystemExit as error:  # argparse
        found = error.code
    said = capsys.readouterr().err.strip().splitlines()
    assert found == code and said and not any("Traceback" in line for line in said), (found, said)
    return said[-1]


def test_a_run_from_training_to_pictures(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert dfn("train", "text", "--data", text, "--out", out, "--steps", 6, "--checkpoint-every", 2, *TINY) == 0
    said = capsys.readouterr()
    for word in ("DFNLanguageModel", "float32", "model", "gzip", "bigram"):
        assert word in said.out
    for word in ("step 6 of 6", "bits per byte", "bytes/s", "MiB"):  # the bar
        assert word in said.err
    assert [p.name for p in checkpoints.found(out)] == ["step-00000004.safetensors", "step-00000006.safetensors"]

    written = output("generate", out, "--prompt", "the ", "--tokens", 9, "--temperature", 0)
    assert written.startswith(b"the ") and written.endswith(b"\n") and len(written) == 14
    assert dfn("eval", "text", "--run", out, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((out / "figures.json").read_text())["figures"] and figures["model"] > 0
    assert dfn("plot", out) == 0
    assert {p.name for p in out.glob("*.png")} == {"loss_curve.png", "drift.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in out.glob("*.png"))

    last = checkpoints.found(out)[-1]
    last.write_bytes(last.read_bytes()[:500])
    output("generate", out, "--tokens", 1)
    said = capsys.readouterr().err
    assert "step-00000006.safetensors is damaged" in said and "last good checkpoint is" in said


def test_toml_and_flags(text, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(f'kind = "text"\ndata = "{text}"\nsteps = 3\nlr = 1e-3\ncheckpoint-every = 2\nquiet = true\n')
    out = tmp_path / "run"
    assert dfn("train", "--config", config, "--out", out, "--steps", 2, *TINY) == 0
    options = runs.Run.load(out).options
    assert options == Options.of(
        "text", data=text, steps=2, lr=1e-3, dim=16, layers=1, k=4, batch=2, length=16, threads=1
    )
    for line, message in (
        ("stps = 3", "unknown key 'stps'; known are kind, out, resume, "),
        ("steps = true", "steps cannot be True"),
        ("quiet = 1", "quiet cannot be 1"),
        ("steps = [1]", r"steps cannot be [1]"),
        ("steps = ", "is not TOML"),
    ):
        config.write_text(line + "\n")
        assert message in failed(capsys, 2, "train", "text", "--config", config), line
    config.write_text('steps = "many"\n')
    assert "argument --steps: invalid int value: 'many'" in failed(capsys, 2, "train", "text", "--config", config)
    assert "cannot be read" in failed(capsys, 2, "train", "text", "--config", tmp_path / "nothing.toml")


def test_bad_usage_is_2_and_failure_is_1(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert "COMMAND" in failed(capsys, 2)
    assert "invalid choice: 'tain'" in failed(capsys, 2, "tain")
    assert "KIND must be one of text, contrastive, masked, digits, joint, got txt" in failed(capsys, 2, "train", "txt")
    assert "KIND must be one of" in failed(capsys, 2, "train")
    assert "steps must be at least 1, got 0" in failed(capsys, 2, "train", "text", "--steps", 0)
    assert "invalid choice: 'film'" in failed(capsys, 2, "train", "masked", "--field", "film")
    assert "--steps has no meaning here" in failed(capsys, 2, "eval", "photographs", "--steps", 3)
    assert "no such file or folder" in failed(capsys, 2, "train", "text", "--data", tmp_path / "no", "--out", out)
    assert "no WAV files in" in failed(capsys, 1, "train", "masked", "--field", "sound", "--data", text, "--out", out)
    assert "holds no checkpoint" in failed(capsys, 1, "generate", tmp_path)
    assert dfn("train", "joint", "--out", out, "--steps", 1, "--entities", 5, "--quiet", *TINY[:-4], *TINY[-2:]) == 0
    assert "holds a run; --resume goes on with it" in failed(capsys, 2, "train", "joint", "--out", out)
    assert "only text generates" in failed(capsys, 2, "generate", out)
    assert "is a run with kind joint" in failed(capsys, 2, "eval", "text", "--run", out)
    for path in checkpoints.found(out):
        path.write_bytes(b"")
    assert "none of the 1 checkpoints" in failed(capsys, 1, "train", "joint", "--out", out, "--resume")


def test_nan_is_a_failure(text, tmp_path, capsys):
    said = failed(
        capsys, 1, "train", "text", "--data", text, "--out", tmp_path, "--steps", 50, "--lr", 1e30, "--warmup", 0,
        "--checkpoint-every", 1, "--quiet", *TINY,
    )  # fmt: skip
    assert "is not finite in step" in said and "first seen in" in said and "last good checkpoint is" in said


def test_commands_in_the_docs_are_understood(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "training.md").read_text() + (docs / "evidence.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("dfn") + 1 :]
        cli.build_parser().parse_args(words)  # exits where it does not understand
    (tmp_path / "run.toml").write_text(*re.findall(r"```toml\n(.*?)```", text, re.DOTALL))
    parser, words = cli.build_parser(), ["train", "--config", str(tmp_path / "run.toml")]
    found = parser.parse_args(cli.with_config(parser, words))
    assert (found.kind, found.steps, found.memory_size) == ("text", 200, 256)


@pytest.mark.slow
def test_digits_held_out(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert dfn("eval", "digits", "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] >= 0.95
