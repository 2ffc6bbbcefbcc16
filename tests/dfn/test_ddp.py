"""`torchrun` with two processes over gloo trains as one process does, resumes, and only the first process writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from helpers import INTERPRETED, ended_well, same_bits

from dfn import cli
from dfn.training import checkpoints

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

# The command twice in one pair of processes: starting them is what takes time. In between the last checkpoint goes.
# All in float64, so that what is left between one process and two is the rounding of sums in another order.
WORKER = """
import os, sys, torch
from pathlib import Path
from dfn import cli, runs
from dfn.training import checkpoints

torch.set_default_dtype(torch.float64)
folder, arguments, first = Path(sys.argv[1]), sys.argv[2:], os.environ.get("RANK", "0") == "0"
real_train, real_write = runs.train, checkpoints.write_whole

def train(*args, **options):
    run = real_train(*args, **options)
    torch.save(run.model.state_dict(), folder / f"weights.{number}.{os.environ.get('RANK', 0)}")
    return run

def write(path, raw):
    assert first, "only the first process writes"
    real_write(path, raw)

runs.train, checkpoints.write_whole = train, write
with runs.processes():
    for number in (1, 2):
        code = cli.main(arguments)
        assert code == 0, code
        if first and number == 1:
            checkpoints.found(folder / "run")[-1].unlink()
"""


# nccl wants a GPU for each process; where there are not two, both processes work on the CPU, over gloo.
HIDDEN = {} if torch.cuda.device_count() > 1 else {"CUDA_VISIBLE_DEVICES": ""}


def flags(folder, data):
    options = {"data": data, "out": folder, "steps": 8, "dim": 16, "layers": 1, "k": 4, "batch": 4, "length": 16}
    options |= {"warmup": 2, "threads": 1, "memory-size": 8, "checkpoint-every": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["train", "text", "--quiet", "--resume", *words]


def two_processes(folder, data):
    """As `torchrun` starts them, without its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                   "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **HIDDEN}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(folder), *flags(folder / "run", data)], cwd=ROOT,
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = ended_well(workers)
    assert "goes on from" in said[0] and not said[1], said
    return {path.name: torch.load(path) for path in folder.glob("weights.*")}


def test_two_processes_train_as_one(tmp_path):
    data = tmp_path / "text.txt"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    torch.set_default_dtype(torch.float64)
    try:
        assert cli.main(flags(tmp_path / "run1", data)) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    one = checkpoints.latest(tmp_path / "run1")
    pair = two_processes(tmp_path, data)
    two = checkpoints.latest(tmp_path / "run")

    assert set(pair) == {"weights.1.0", "weights.1.1", "weights.2.0", "weights.2.1"}
    for name, want in pair["weights.1.0"].items():  # in both processes, and after resuming from step 5
        assert all(same_bits(other[name], want) for other in pair.values()), name

    # A float32 mean of 64 numbers is off by at most 64 roundings.
    losses = [c.tensors["history.losses"] for c in (one, two)]
    assert len(losses[0]) == 8 and losses[0][7] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=64 * 2**-24, atol=0)
    for name, want in one.part("model").items():
        torch.testing.assert_close(pair["weights.1.0"][name], want, rtol=1e-4, atol=1e-6)
    assert one.tensors["history.tokens"].equal(two.tensors["history.tokens"])
    assert one.tensors["rows.states"].shape[0] == two.tensors["rows.states"].shape[0] == 4


def test_the_batch_must_be_divisible(tmp_path, capsys, monkeypatch):
    from dfn.training.trainer import Trainer

    trainer = Trainer(torch.nn.Linear(2, 1), steps=1, loss=lambda model, x: model(x).sum())
    trainer.processes = 3
    with pytest.raises(ValueError, match=r"the batch must be a multiple of 3 \(processes x accumulate\), got 4"):
        trainer.train_step(torch.ones(4, 2))


@pytest.mark.slow
def test_torchrun_runs_the_command(tmp_path):
    data = tmp_path / "text.txt"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **HIDDEN}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dfn"]
    flags = ["train", "text", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "3", "--dim", "16"]
    done = subprocess.run([*command, *flags], env=environment, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gzip") == 1 and "find_unused" not in done.stderr
    assert cli.main(["train", "text", "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 0
