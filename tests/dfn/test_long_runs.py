"""What a run of days meets: Ctrl-C, a second run in its folder, a full disk, more steps, a loader that ends."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, same_bits
from torch import nn

from dfn import runs
from dfn.runs import bits
from dfn.runs.options import Options, UsageError
from dfn.runs.stopping import Stopped
from dfn.runs.tasks import KINDS
from dfn.runs.threads import fast_threads
from dfn.training import checkpoints
from dfn.training.checkpoints import Busy, CheckpointError, locked, write_whole
from dfn.training.trainer import NonFiniteLoss, Trainer

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
TINY = dict(dim=16, layers=1, k=4, batch=4, warmup=2, threads=1, length=16)


def options(text, **more):
    return Options.of("text", **{**TINY, "data": text, **more})


def quiet(options, folder, **more):
    return runs.train(options, folder, **{"progress": False, "say": lambda line: None, "evaluations": 0, **more})


@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so would what it tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_keeps_the_step_that_is_under_way(text, tmp_path, monkeypatch):
    """The run that goes on ends with the same bits as one that was never stopped."""
    whole = quiet(options(text, steps=5), tmp_path / "whole")
    real = KINDS["text"].batch

    def batch(self, generator, held_out=False):
        batch.calls += 1
        if batch.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, generator, held_out)

    batch.calls = 0
    monkeypatch.setattr(KINDS["text"], "batch", batch)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Stopped, match=r"stopped after step 3, which .*step-00000003.safetensors holds; --resume goes on"
    ):
        quiet(options(text, steps=5), tmp_path / "halves")
    assert signal.getsignal(signal.SIGINT) is before
    resumed = quiet(options(text, steps=5), tmp_path / "halves", resume=True)
    assert resumed.history.steps == [1, 2, 3, 4, 5]
    assert all(same_bits(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_second_run_in_a_folder_is_refused(text, tmp_path):
    """While the first lives, however it ends; and nothing but its own files is left in the folder."""
    holder = "import sys, time; from pathlib import Path; from dfn.training.checkpoints import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('has it', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == b"has it\n"
        with pytest.raises(Busy, match=f"another run writes in {tmp_path}; another --out begins a new one"):
            quiet(options(text, steps=1), tmp_path)
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []
    quiet(options(text, steps=1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_folder_that_cannot_be_written_is_noticed_before_training(text, tmp_path, monkeypatch):
    monkeypatch.setattr(KINDS["text"], "model", lambda self: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file; a run needs a folder"):
        quiet(options(text), tmp_path / "file")
    if Path("/proc/self").is_dir():
        with pytest.raises(OSError):
            quiet(options(text), Path("/proc/self"))


def test_a_full_disk_names_the_file_and_leaves_no_part(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "step-00000001.safetensors"
    write_whole(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as error:
            write_whole(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"old"


def test_figures_that_cannot_be_kept_are_still_shown(text, tmp_path):
    quiet(options(text, steps=1), tmp_path)
    (tmp_path / "figures.json").mkdir()
    (tmp_path / "figures.json" / "x").write_text("")
    said = []
    figures = runs.Run.load(tmp_path).judge(say=said.append)
    assert figures["model"] > 0 and figures["bytes judged"] == figures["bytes held out"] == 270
    assert len(said) == 1 and "figures.json cannot be written, so the figures are not kept" in said[0]
    assert not list(tmp_path.glob(".part*"))


def test_more_steps_after_the_end(text, tmp_path):
    quiet(options(text, steps=3), tmp_path)
    said = []
    run = quiet(options(text, steps=7), tmp_path, resume=True, given={"steps": 7}, say=said.append)
    assert run.history.steps == list(range(1, 8)) and run.options.steps == 7
    assert any(line.startswith("7 steps instead of 3: step length ") for line in said), said
    assert checkpoints.latest(tmp_path).facts["options"]["steps"] == 7
    with pytest.raises(UsageError, match="steps must be at least the 7 that are done in .*, got 5"):
        quiet(options(text, steps=5), tmp_path, resume=True, given={"steps": 5})
    said.clear()
    quiet(options(text, steps=7), tmp_path, resume=True, say=said.append)
    assert "all 7 steps are done; --steps M with a larger M goes on" in said


def test_a_new_run_begins_with_the_weights_of_another(text, tmp_path):
    first = quiet(options(text, steps=2), tmp_path / "first")
    o = runs.options_like(tmp_path / "first", "text", dict(data=text, steps=1, lr=0.0, batch=4, length=16, threads=1))
    assert (o.dim, o.layers, o.k, o.lr) == (16, 1, 4, 0.0)
    second = quiet(o, tmp_path / "second", init=tmp_path / "first")
    assert all(same_bits(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert second.history.steps == [1]
    for other in (dict(convolution=2), dict(block="first"), dict(heads=4, semantic=2)):
        folder = tmp_path / str(other)
        quiet(options(text, steps=1, **other), folder)
        o = runs.options_like(folder, "text", dict(data=text, steps=1, batch=4, length=16, threads=1))
        quiet(o, tmp_path / "again" / str(other), init=folder)
    wider = options(text, dim=32)
    with pytest.raises(UsageError, match=r"are of another model: embed.weight is \[256, 16\] and \[256, 32\] here"):
        quiet(wider, tmp_path / "third", init=tmp_path / "first")
    with pytest.raises(UsageError, match="nowhere holds no checkpoint"):
        runs.options_like(tmp_path / "nowhere", "text", {})


def test_relative_data_is_found_from_another_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(text).parent)
    quiet(options("text.txt", steps=1), tmp_path)
    monkeypatch.chdir(tmp_path)
    run = runs.Run.load(tmp_path)
    assert run.options.data == text and run.judge()["model"] > 0


def test_what_another_version_wrote_is_one_line(text, tmp_path):
    quiet(options(text, steps=1), tmp_path / "run")
    checkpoint = checkpoints.load(*checkpoints.found(tmp_path / "run"))

    def changed(name, **facts):
        folder = tmp_path / name
        folder.mkdir()
        checkpoints.save(folder, 1, checkpoint.tensors, {**checkpoint.facts, **facts})
        with pytest.raises(CheckpointError) as error:
            runs.Run.load(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    kept = checkpoint.facts["options"]
    assert "is of version 99; this package reads version 1" in changed("version", version=99)
    assert "has an option that is not known here: wings" in changed("option", options={**kept, "wings": 2})
    assert "is of a kind that is not known here: film" in changed("kind", options={**kept, "kind": "film"})
    assert "embed.weight is [256, 16] and [256, 8] here" in changed("sizes", options={**kept, "dim": 8})


def test_divergence_in_an_evaluation_names_the_step_and_the_checkpoint(text, tmp_path, monkeypatch):
    def spoilt(self, model, batches=2):
        if spoilt.calls == 1:
            with torch.no_grad():
                model.get_parameter("blocks.0.mlp.up.weight")[3] = torch.nan
        spoilt.calls += 1
        return real(self, model, batches)

    spoilt.calls, real = 0, KINDS["text"].held_out_loss
    monkeypatch.setattr(KINDS["text"], "held_out_loss", spoilt)
    said = r"the evaluation is not finite in step 4; first seen in blocks.0.mlp.up.weight; .* is .*step-00000002"
    with pytest.raises(NonFiniteLoss, match=said):
        quiet(options(text, steps=4), tmp_path, every=2, evaluations=2)


def test_batches_that_end_are_gone_through_again_or_say_why_not():
    model = nn.Linear(3, 1)
    data = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)

    def trainer(steps=10):
        return Trainer(model, loss=lambda m, x: m(x).square().mean(), steps=steps)

    assert trainer().fit(data, progress=False).steps == list(range(1, 11))
    assert trainer(4).fit(iter(data), progress=False).steps == [1, 2, 3, 4]
    one = trainer()
    with pytest.raises(
        ValueError, match="batches ended after step 4 of 10 steps, and an iterator cannot be gone through"
    ):
        one.fit(iter(data), progress=False)
    assert one.history.steps == [1, 2, 3, 4] and len(one.history.losses) == 4
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
            trainer().fit(nothing, progress=False)


def test_judging_a_long_text_is_capped():
    """The compressors and the model are judged on the same bytes, from the first to the last."""
    text = torch.arange(2_000_003) // 8192
    seen = bits.judged(text)
    assert len(seen) == 2**19 and seen[0] == 0 and seen[-1] == text[-1] and len(seen.unique()) > 60
    assert bits.judged(text[: 2**19]).equal(text[: 2**19])


def test_threads_are_chosen_by_the_time_of_a_step(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_to, seconds = [4], {1: 0.03, 2: 0.001, 4: 0.05}
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert fast_threads(lambda: lambda: time.sleep(seconds[set_to[-1]])) == 2 and set_to[-1] == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert fast_threads(lambda: pytest.fail("what is set is not tried")) == 4


def test_a_lock_is_given_back(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass
