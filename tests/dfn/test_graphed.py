"""The training step in one CUDA graph: what of it needs no GPU. A stand-in records the step and runs it in a replay."""

import copy

import pytest
import torch
from helpers import DEVICE, INTERPRETED, same_bits
from torch import nn

from dfn import DFNLanguageModel
from dfn.training import NonFiniteLoss, Trainer, graphed

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels"),
]


class Stand:
    """In place of a CUDA graph: nothing runs in the capture, everything in a replay."""

    made = replayed = 0

    def __init__(self, run):
        self.run = run
        Stand.made += 1

    def replay(self):
        Stand.replayed += 1
        return self.run()


@pytest.fixture
def graphs(monkeypatch):
    Stand.made = Stand.replayed = 0
    monkeypatch.setattr(graphed, "Recorder", Stand)
    monkeypatch.setattr(Trainer, "_may_be_graphed", lambda self, cuda_graph: True)
    return Stand


def batches(count: int, rows: int = 4, length: int = 16) -> list:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(31, (rows, length + 1), generator=draw) for _ in range(count)]
    return [(x[:, :-1], x[:, 1:]) for x in ids]


def small() -> DFNLanguageModel:
    torch.manual_seed(0)
    return DFNLanguageModel(31, 16, 1, k=4)


def train(trainer: Trainer, data: list) -> list[float]:
    return [trainer.train_step(batch) for batch in data]


def test_losses_and_weights_are_those_without_a_graph(graphs):
    """Three steps warm up, one capture, and every later step is a replay on new data with its own step length."""
    data = batches(9)
    kept = copy.deepcopy(data)
    graph, eager = (Trainer(small(), steps=9, warmup=3, accumulate=2) for _ in range(2))
    eager.warm = -100  # never done with warming up, so that its step length is a tensor, too
    assert train(graph, data) == train(eager, data)
    assert (graphs.made, graphs.replayed) == (1, 6)
    assert all(map(same_bits, graph.model.parameters(), eager.model.parameters()))
    assert all(a.equal(b) for x, y in zip(data, kept, strict=True) for a, b in zip(x, y, strict=True)), (
        "a batch changed"
    )


def test_the_step_length_moves_on(graphs):
    """A graph holds addresses: a number would stay what it was in the capture."""
    seen, trainer = [], Trainer(small(), steps=9, warmup=3)
    for batch in batches(9):
        trainer.train_step(batch)
        seen.append(float(trainer.optimizer.param_groups[0]["lr"]))
    trainer.step = 0
    for step, length in enumerate(seen):
        trainer.step = step
        assert length == pytest.approx(trainer.learning_rate(), rel=1e-6)


def test_resume_is_exact(graphs):
    data = batches(10)
    whole = Trainer(small(), steps=10, warmup=2)
    train(whole, data)
    first, second = Trainer(small(), steps=10, warmup=2), Trainer(small(), steps=10, warmup=2)
    train(first, data[:5])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, data[5:])
    assert all(map(same_bits, second.model.parameters(), whole.model.parameters()))


def test_another_shape_goes_without(graphs):
    said = []
    trainer = Trainer(small(), steps=9, say=said.append)
    train(trainer, batches(5))
    before = graphs.replayed
    train(trainer, batches(2, rows=3))
    assert graphs.replayed == before and len(said) == 1 and "another shape" in said[0]
    train(trainer, batches(1))
    assert graphs.replayed == before + 1


def test_a_step_that_cannot_be_captured_goes_on_without(graphs, monkeypatch):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphed, "Recorder", refuse)
    said = []
    trainer = Trainer(small(), steps=9, say=said.append)
    assert len(train(trainer, batches(6))) == 6
    assert said == ["no CUDA graph: the step cannot be captured: operation not permitted when stream is capturing"]
    with pytest.raises(ValueError, match="cuda_graph=True is not possible: the step cannot be captured: operation"):
        train(Trainer(small(), steps=9, cuda_graph=True), batches(6))


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_not_finite_leaves_weights_and_moments_alone(graph, monkeypatch):
    if graph:
        monkeypatch.setattr(graphed, "Recorder", Stand)
        monkeypatch.setattr(Trainer, "_may_be_graphed", lambda self, cuda_graph: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    trainer = Trainer(model, loss=lambda m, x: m(x).square().mean(), steps=20)
    data = torch.randn(6, 3, 5)
    train(trainer, list(data))
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(NonFiniteLoss, match="the loss .*step 6"):
        trainer.train_step(data[0].clone().fill_(float("nan")))
    after = trainer.state_dict()
    assert all(same_bits(before["model"][name], x) for name, x in after["model"].items())
    for i, moments in after["optimizer"]["state"].items():
        assert all(same_bits(before["optimizer"]["state"][i][name], x) for name, x in moments.items())
    with pytest.raises(NonFiniteLoss, match="the gradient .*(0|2).weight"):
        trainer.run.loss = lambda m, x: (0 * m(x)).abs().sum().sqrt()  # 0, and its slope is infinite
        trainer.train_step(data[0])
    assert all(same_bits(before["model"][name], x) for name, x in trainer.model.state_dict().items())


def test_when_there_is_none():
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="cuda_graph must be True, False or 'auto', got 3"):
        Trainer(model, steps=1, cuda_graph=3)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="cuda_graph=True is not possible: the model is on cpu"):
            Trainer(model, steps=1, cuda_graph=True)
    assert graphed.hooked(model) is None
    with model.register_forward_hook(lambda *args: None):
        assert graphed.hooked(nn.Sequential(model)) == "0"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_the_graph_gives_the_bits_of_eager_steps():
    """The twin never ends to warm up, so that its step length is a tensor, too."""
    data = batches(12)
    graph, eager = (Trainer(small().to(DEVICE), steps=12, cuda_graph=True) for _ in range(2))
    eager.warm = -100  # never done with warming up
    assert train(graph, data) == train(eager, data) and graph.graph is not None and eager.graph is None
    assert all(map(same_bits, graph.model.parameters(), eager.model.parameters()))
