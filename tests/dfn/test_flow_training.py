import re

import pytest
import torch
from helpers import INTERPRETED
from torch import nn

from dfn.flownetwork import PRESETS, benchmark
from flownetwork import FlowNetwork, create_dummy_data, train_flow_network

pytestmark = pytest.mark.skipif(INTERPRETED, reason="models are tested on compiled kernels")


def small(**changes):
    return FlowNetwork(**{**dict(vocab_size=37, d_model=24, num_layers=3, num_patterns=5, max_seq_len=19), **changes})


@pytest.mark.parametrize("options", [dict(), dict(rank=2, tie_output=True)])
def test_training(options):
    data = create_dummy_data(37, 13, 4, 3)
    assert len(data) == 3 and data[0][0].shape == (4, 13) and data[0][0].dtype == torch.int64
    assert torch.equal(data[0][0][:, 1:], data[0][1][:, :-1])
    model = small(**options)
    history = train_flow_network(model, data, num_epochs=8, progress=False)
    assert set(history) == {"loss", "pattern_entropy", "tokens_per_second"} and len(history["loss"]) == 8
    assert history["loss"][-1] < history["loss"][0] and min(history["tokens_per_second"]) > 0
    with torch.no_grad():
        model.gate.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan in epoch 1, batch 1"):
        train_flow_network(model, data, num_epochs=1, progress=False)


def test_gradients_are_clipped():
    model, data = small(), create_dummy_data(37, 13, 4, 1)
    for clip in (1e-3, 1e3):
        train_flow_network(model, data, num_epochs=1, clip=clip, progress=False)
        norm = nn.utils.get_total_norm(p.grad for p in model.parameters())
        assert norm <= clip * 1.001 if clip < 1 else norm > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    data, curves = create_dummy_data(37, 13, 4, 3), []
    for autocast_dtype in (None, dtype):
        torch.manual_seed(0)
        model = small(rank=4, tie_output=True)
        curves.append(train_flow_network(model, data, 10, autocast_dtype=autocast_dtype, progress=False)["loss"])
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [dict(), dict(rank=2, tie_output=True)])
def test_the_pages_autocast_with_grad_scaler(dtype, options):
    model = small(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    ((ids, targets),) = create_dummy_data(37, 13, 4, 1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            logits, metrics = model(ids)
            loss = nn.functional.cross_entropy(logits.view(-1, 37), targets.view(-1))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and scaler.get_scale() > 1


def test_density_falls_during_training():
    model, seen = small(), []
    model.layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.router.density))
    train_flow_network(model, create_dummy_data(37, 7, 2, 4), num_epochs=2, final_density=0.1, progress=False)
    assert seen == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1, 0.1])
    assert model.layers[0].router.density == pytest.approx(0.1)
    _, metrics = model(torch.randint(37, (2, 13)))
    assert metrics.summary()["active"] == pytest.approx(0.1, abs=0.01)


def test_blocks_fall_and_are_refreshed_during_training():
    model, seen = small(d_model=256, num_patterns=2), []
    model.layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.router.block_share.item()))
    data = create_dummy_data(37, 7, 2, 22)
    history = train_flow_network(model, data, num_epochs=4, final_density=0.25, blocks=True, progress=False)
    assert seen[0] == 1 and seen[-1] == 0.25 and sorted(seen, reverse=True) == seen
    assert len(set(seen[::20])) > 2  # chosen anew every 20 batches
    assert history["loss"][-1] < history["loss"][0]
    twin = small(d_model=256, num_patterns=2, block_density=0.5)
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(37, (2, 13))
    assert torch.equal(twin(ids)[0], model(ids)[0]) and twin(ids)[1].summary() == model(ids)[1].summary()


# ---- the published page ---------------------------------------------------------------------------------------------
PAGE = """
from flownetwork import FlowNetwork, train_flow_network, benchmark_flow_network, create_dummy_data
import torch, torch.nn as nn
import torch.quantization as quant
from torch.cuda.amp import autocast, GradScaler

model = FlowNetwork(vocab_size=10000, d_model=512, num_layers=6)
results = benchmark_flow_network(vocab_size=10000, d_model=512)
dummy_data = create_dummy_data(10000, 128, 8, 10)
train_flow_network(model, dummy_data, num_epochs=5)

edge_model = FlowNetwork(vocab_size=5000, d_model=256, num_layers=3, num_patterns=4)
large_model = FlowNetwork(vocab_size=50000, d_model=768, num_layers=8, num_patterns=16)

quantized_model = quant.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
logits, metrics = quantized_model(dummy_data[0][0])

scaler = GradScaler()
optimizer = torch.optim.AdamW(model.parameters())
with autocast():
    logits, metrics = model(dummy_data[0][0])
    loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), dummy_data[0][1].view(-1))
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
"""
# The same lines with small numbers, for a test of seconds.
SMALLER = {
    "10000": "37", "5000": "31", "50000": "41", "512": "32", "256": "16", "768": "24", "128": "7", "num_epochs=5":
    "num_epochs=1", "num_layers=6": "num_layers=3",
}  # fmt: skip


def run_the_page(lines: str) -> dict:
    names: dict = {}
    exec(lines, names)
    assert names["results"]["flow_network"]["inference tokens/s"] > 0
    assert names["quantized_model"].layers[0].router.int8 is not None and names["loss"].isfinite()
    return names


@pytest.mark.filterwarnings("ignore")
def test_the_pages_lines(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "_peak_elsewhere", lambda *arguments: 12.5)  # a process each: see below
    lines = PAGE
    for large, little in SMALLER.items():
        lines = re.sub(rf"\b{large}\b", little, lines)
    lines = lines.replace("d_model=32)\ndummy", "d_model=32, lengths=(5, 9), progress=False)\ndummy")
    results = run_the_page(lines)["results"]
    ours, naive, other = (results[name] for name in ("flow_network", "naive", "transformer"))
    assert ours["parameters"] == naive["parameters"] and list(results["milliseconds_per_length"]) == [5, 9]
    for column in (ours, naive, other):
        assert min(column["inference tokens/s"], column["training tokens/s"]) > 0
        assert column["peak memory of a step, MB"] == 12.5
    printed = capsys.readouterr().out
    assert "the page's claim" in printed and f"-{results['parameter_reduction']:.2%}" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pages_lines_as_they_stand():
    """Minutes, and 6 GB of memory."""
    names = run_the_page(PAGE)
    assert names["model"].num_parameters() == pytest.approx(62.9e6, rel=1e-3)


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own():
    """A step of compact on 8 x 128 tokens: the issue's bound, far below the page's 3,340 MB."""
    arguments = {**PRESETS["compact"], "max_seq_len": 128}
    assert 100 < benchmark._peak_elsewhere("flow_network", arguments, 8, 128, "bfloat16") < 400


def test_naive_network_is_the_same_network():
    model, ids = small(), torch.randint(37, (2, 13))
    want = model(ids)[0]
    naive = benchmark.NaiveFlowNetwork(model)
    torch.testing.assert_close(naive(ids)[0], want, rtol=1e-4, atol=1e-4)
    assert naive.bytes_per_token() == 4 * (48 * 24 + 3 * 24 * 24 + 24 * 37)
