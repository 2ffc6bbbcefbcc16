"""Runs: every kind trains, resumes to the bit, also after SIGKILL, and says clearly what is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, same_bits

from dfn import cli, runs
from dfn.runs.options import Options, UsageError
from dfn.runs.tasks import KINDS, Joint
from dfn.training import checkpoints
from dfn.training.batches import generator_for
from dfn.training.checkpoints import CheckpointError
from dfn.training.trainer import NonFiniteLoss

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]
TINY = dict(dim=16, layers=1, k=4, batch=4, warmup=2, threads=1)
SMALL = {
    "text": dict(length=16),
    "memory": dict(length=16, memory_size=8),
    "contrastive": dict(entities=9, size=8),
    "masked": dict(entities=9, size=8, field="sound"),
    "digits": dict(entities=9),
    "joint": dict(entities=9),
}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    import wave

    folder = tmp_path_factory.mktemp("sounds")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((3000 * torch.randn(3000)).short().numpy().tobytes())
    return str(folder)


def options(name, text, sounds, **more):
    if name in ("contrastive", "digits"):
        pytest.importorskip("sklearn")
    kind = "text" if name == "memory" else name
    own = {"text": text, "masked": sounds}.get(kind)
    data = {} if own is None else {"data": own}
    return Options.of(kind, **{**TINY, **SMALL[name], **data, **more})


def quiet(options, folder, **more):
    return runs.train(options, folder, **{"progress": False, "say": lambda line: None, "evaluations": 0, **more})


def weights(folder):
    """The final weights in the last checkpoint."""
    checkpoint = checkpoints.latest(Path(folder))
    return checkpoint.facts["step"], checkpoint.part("model")


def assert_same_weights(left, right):
    (step, a), (other, b) = left, right
    assert step == other and set(a) == set(b) and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_resumes_to_the_bit(name, text, sounds, tmp_path):
    """Five steps, or three, a stop, and two more in a new task, model and trainer; then figures from the folder."""
    o = options(name, text, sounds, steps=5)
    quiet(o, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):

        def stop(history, save=checkpoints.save):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            calls = []
            real = KINDS[o.kind].batch

            def batch(self, generator, held_out=False):
                calls.append(1)
                if len(calls) == 5:
                    stop(None)
                return real(self, generator, held_out)

            patch.setattr(KINDS[o.kind], "batch", batch)
            quiet(o, tmp_path / "halves", every=3)
    assert weights(tmp_path / "halves")[0] == 3
    torch.manual_seed(99)  # what the process drew before must not matter
    run = quiet(o, tmp_path / "halves", resume=True)
    assert run.history.steps == [1, 2, 3, 4, 5]
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    loaded = runs.Run.load(tmp_path / "halves")
    figures = loaded.judge()
    assert figures and all(torch.isfinite(torch.tensor(x)) for x in figures.values())
    assert (tmp_path / "halves" / "figures.json").exists()


def test_the_place_in_the_data_and_the_memory_are_kept(text, tmp_path):
    """Consecutive pieces go on where they were; forgetting either changes the weights."""
    o = options("memory", text, None, steps=6)
    whole = quiet(o, tmp_path / "whole", every=3)
    path = tmp_path / "whole" / "step-00000003.safetensors"
    for part in ("rows.positions", "state.place"):
        checkpoint = checkpoints.load(path)
        checkpoint.tensors[part] += 40
        folder = tmp_path / part
        folder.mkdir()
        checkpoints.save(folder, 3, checkpoint.tensors, checkpoint.facts)
        other = quiet(o, folder, resume=True)
        pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
        assert not all(same_bits(a, b) for a, b in pairs), part


def test_resuming_says_what_disagrees(text, tmp_path):
    o = options("text", text, None, steps=4)
    quiet(o, tmp_path / "run", every=2)
    with pytest.raises(UsageError, match="holds a run; --resume goes on with it"):
        quiet(o, tmp_path / "run")
    other = options("text", text, None, lr=1e-4)
    with pytest.raises(UsageError, match=r"lr is 0.006 in .*, got 0.0001"):
        quiet(other, tmp_path / "run", resume=True, given={"lr": 1e-4})
    assert quiet(other, tmp_path / "run", resume=True).options.lr == 6e-3
    other = tmp_path / "other.txt"
    other.write_bytes(b"something else " * 100)
    checkpoint = checkpoints.load(tmp_path / "run" / "step-00000002.safetensors")
    checkpoint.facts["options"]["data"] = str(other)
    (tmp_path / "moved").mkdir()
    checkpoints.save(tmp_path / "moved", 2, checkpoint.tensors, checkpoint.facts)
    with pytest.raises(UsageError, match="the data is not what the run in .* began with"):
        quiet(o, tmp_path / "moved", resume=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        runs.Run.load(tmp_path / "nothing")


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(text, tmp_path):
    o = options("text", text, None, steps=6)
    quiet(o, tmp_path / "whole")
    quiet(o, tmp_path / "run", every=2)
    last = tmp_path / "run" / "step-00000006.safetensors"
    last.write_bytes(last.read_bytes()[:-9])
    said = []
    run = quiet(o, tmp_path / "run", resume=True, say=said.append)
    assert "step-00000006.safetensors is damaged" in said[0] and "step-00000004" in said[1]
    assert run.history.steps == [1, 2, 3, 4, 5, 6]
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_nan_names_step_layer_and_checkpoint(text, tmp_path, monkeypatch):
    o = options("text", text, None, steps=6)
    real = KINDS["text"].loss

    def loss(self, model, batch):
        if loss.calls == 3:
            with torch.no_grad():
                model.get_parameter("blocks.0.mlp.up.weight")[3] = torch.inf
        loss.calls += 1
        return real(self, model, batch)

    loss.calls = 0
    monkeypatch.setattr(KINDS["text"], "loss", loss)
    with pytest.raises(NonFiniteLoss, match=r"in step 3; first seen in blocks\.0\.mlp\.up\.weight; .*step-00000002"):
        quiet(o, tmp_path / "run", every=2)
    loss.calls = 3
    with pytest.raises(NonFiniteLoss, match="in step 0; .*; there is no checkpoint yet"):
        quiet(o, tmp_path / "other")


def test_the_best_weights_are_kept(text, tmp_path, monkeypatch):
    """Judged 5, 2, 3, 4: the run ends with the weights of the second evaluation, also when it is gone on with."""
    values = iter([5.0, 2.0, 3.0, 4.0, 6.0])  # the last for the run that begins with them
    seen = []

    def judged(self, model, batches=2):
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        return next(values)

    monkeypatch.setattr(KINDS["text"], "held_out_loss", judged)
    wanted = Options.of("text", data=text, length=16, steps=8, keep="best", lr=1e-2, **TINY)
    run = runs.train(wanted, tmp_path, evaluations=4, progress=False, say=lambda line: None)
    ended = {name: x.clone() for name, x in run.model.state_dict().items()}
    assert all(same_bits(ended[name], x) for name, x in seen[1].items())
    assert not all(same_bits(ended[name], x) for name, x in seen[3].items())
    loaded = runs.Run.load(tmp_path).model.state_dict()
    assert all(same_bits(loaded[name], x) for name, x in ended.items())
    monkeypatch.setattr(KINDS["text"], "figures", lambda *_: {})
    run.judge()
    assert json.loads((tmp_path / "figures.json").read_text())["step"] == 4
    one = Options.of("text", data=text, length=16, steps=1, **{**TINY, "lr": 0.0, "weight_decay": 0.0})
    begun = runs.train(one, tmp_path / "begun", init=tmp_path, evaluations=0, progress=False, say=lambda line: None)
    assert all(same_bits(begun.model.state_dict()[name], x) for name, x in ended.items())
    last = checkpoints.load(checkpoints.found(tmp_path)[-1]).part("model")  # what --resume goes on from
    assert all(same_bits(last[name], x) for name, x in seen[3].items())


def test_an_optimizer_of_an_older_version_is_refused(text, tmp_path):
    """Its moments are numbered as its parameters were, and positions come later now."""
    wanted = Options.of("text", data=text, length=16, steps=4, **TINY)
    runs.train(wanted, tmp_path, evaluations=0, progress=False, say=lambda line: None)
    last = checkpoints.load(checkpoints.found(tmp_path)[-1])
    numbers = sorted({int(key.split(".")[1]) for key in last.tensors if key.startswith("optimizer.")})
    turned = {f"optimizer.{n}": f"optimizer.{(n + 1) % len(numbers)}" for n in numbers}
    moved = {turned.get(key.rsplit(".", 1)[0], key.rsplit(".", 1)[0]) + "." + key.rsplit(".", 1)[1]: x
             for key, x in last.tensors.items()}  # fmt: skip
    checkpoints.save(tmp_path, 4, moved, last.facts)
    with pytest.raises(CheckpointError, match="is of an older version; --init begins a new run with its weights"):
        runs.train(wanted, tmp_path, resume=True, evaluations=0, progress=False, say=lambda line: None)
    runs.Run.load(tmp_path)  # the weights are there


def test_accumulation_is_the_same_gradient(text, tmp_path):
    """In float64 the parts add up to the whole."""
    from dfn.training.trainer import Trainer

    models = []
    for accumulate in (1, 2):
        task = KINDS["text"](options("text", text, None))
        torch.manual_seed(0)
        trainer = Trainer(task.model().double(), loss=task.loss, steps=3, accumulate=accumulate)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            trainer.train_step(task.batch(generator))
        models.append(trainer.model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="the batch must be a multiple of 3"):
        Trainer(models[0], steps=1, accumulate=3).train_step(task.batch(generator))


def test_nobody_is_judged_on_what_it_was_trained_on():
    """Whatever the seed: a run of seed 1, 2^32 or 2^32 + 1 draws nothing that it is judged on."""
    task = Joint(Options.of("joint", batch=2, entities=8))
    judged = task.batch(generator_for("held out", 1))[0]["image"].states
    for seed in (0, 1, 2**32, 2**32 + 1):
        trained = torch.Generator().manual_seed(seed)
        assert not any(torch.equal(task.batch(trained)[0]["image"].states, judged) for _ in range(3))
    drawn = [torch.rand(3, generator=generator_for(*x)).tolist() for x in (("a", 0), ("a", 2**32), ("b", 0), ("a", 0))]
    assert drawn[0] == drawn[3] and drawn[0] != drawn[1] != drawn[2]


def test_options_say_what_they_may_be():
    for given, message in (
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(lr=float("nan")), "lr must be at least 0, got nan"),
        (dict(dtype="float8"), "dtype must be one of float32, bfloat16, got float8"),
        (dict(memory_size=4, accumulate=2), "accumulate must be 1 with a memory, got 2"),
    ):
        with pytest.raises(UsageError, match=message):
            Options.of("text", **given)
    for kind in ("contrastive", "joint"):
        with pytest.raises(UsageError, match=f"accumulate must be 1 for {kind}, which .*, got 2"):
            Options.of(kind, accumulate=2)
    with pytest.raises(UsageError, match="KIND must be one of text, .*, got txt"):
        Options.of("txt")


# SIGKILL at random moments


def command(folder, text, *more):
    flags = {**TINY, **SMALL["text"], "data": text, "out": folder, "seed": 5}
    flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["train", "text", "--quiet", "--resume", *flags, *more]


def kill_at_random(folder, text, chance, longest, *more):
    """Starts or resumes the run and kills it a random time after its first checkpoint; says if it was still running."""
    before = {p.name for p in checkpoints.found(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "dfn", *command(folder, text, *more)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and before == {p.name for p in checkpoints.found(folder)}:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, longest))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def killed_and_resumed(tmp_path, text, kills, chance, steps, capsys):
    """A checkpoint after every step, so that many a kill falls into the writing of one; some files are cut off, too."""
    more = ("--steps", str(steps), "--checkpoint-every", "1")
    torch.use_deterministic_algorithms(False)  # as in the processes that are killed
    assert cli.main(command(tmp_path / "whole", text, *more)) == 0
    assert "holds no checkpoint: the run begins" in capsys.readouterr().out
    folder, hit = tmp_path / "killed", 0
    for number in range(kills):
        hit += kill_at_random(folder, text, chance, 0.5, *more)
        found = checkpoints.found(folder)
        if number % 2 and len(found) == 2:  # as a file system may leave it that lost power
            found[-1].write_bytes(found[-1].read_bytes()[: chance.randrange(found[-1].stat().st_size)])
    assert cli.main(command(folder, text, *more)) == 0
    assert "goes on from" in capsys.readouterr().out
    assert hit, "every run was over before it was killed"
    assert_same_weights(weights(tmp_path / "whole"), weights(folder))
    assert weights(folder)[0] == steps


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path, text, capsys):
    killed_and_resumed(tmp_path, text, 2, random.Random(0), 80, capsys)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_many_times_ends_with_the_same_bits(tmp_path, text, capsys):
    killed_and_resumed(tmp_path, text, 12, random.Random(), 1000, capsys)
