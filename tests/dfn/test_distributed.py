"""Two processes over gloo train as one process does with both their batches: DDP and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from helpers import INTERPRETED, ended_well

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

# Both kinds in one pair of processes: starting them is what takes time.
WORKER = """
import copy, sys, time
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from dfn import DFNLanguageModel
from dfn.flownetwork import FlowNetwork

torch.set_num_threads(1)
rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)

def train(model, ids, rows, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        logits = model(ids[rows, :-1])[0]
        loss = cross_entropy(logits.flatten(0, 1), ids[rows, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach()

torch.manual_seed(0)
models = {
    "DFNLanguageModel": DFNLanguageModel(31, dim=16, layers=2, heads=2, k=4).double(),
    "FlowNetwork": FlowNetwork(31, 16, 2, 3, max_seq_len=32, mixer="flow_attention").double(),
}
ids = torch.randint(31, (4, 21))
mine = slice(2 * rank, 2 * rank + 2)
for name, model in models.items():
    alone, ddp, sharded = (copy.deepcopy(model) for _ in range(3))
    train(alone, ids, slice(None))
    train(DistributedDataParallel(ddp, find_unused_parameters=True), ids, mine)
    layers = sharded.blocks if name == "DFNLanguageModel" else sharded.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(sharded)
    train(sharded, ids, mine)
    moved = 0.0
    before = dict(model.named_parameters())
    for kind, other in (("DDP", ddp), ("FSDP2", sharded)):
        for (key, want), got in zip(alone.named_parameters(), other.parameters(), strict=True):
            message = lambda text: f"{kind}, {key}: {text}"
            torch.testing.assert_close(whole(got), want.detach(), rtol=1e-9, atol=1e-11, msg=message)
            moved += (want - before[key]).abs().sum().item()
    assert moved > 0
    if rank == 0:
        print(name, "agrees")
dist.barrier()  # neither takes the connection down while the other still uses it
dist.destroy_process_group()
time.sleep(0.1)  # as in dfn.runs.processes
"""


def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=environment,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for rank in range(2)
    ]
    said = ended_well(workers)
    assert "DFNLanguageModel agrees\nFlowNetwork agrees" in said[0]
