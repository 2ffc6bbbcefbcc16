"""One program for every length and every eps, export with a dynamic length, and models built on the meta device."""

from functools import partial

import pytest
import torch
from helpers import DEVICE, INTERPRETED, same_bits, unlike_at_the_start
from torch._dynamo.utils import counters

from dfn.flownetwork import FlowNetwork
from dfn.models import (
    DFNBlock,
    DFNClassifier,
    DFNLanguageModel,
    DFNLayer,
    FlowMixer,
    FlowNorm,
    MemoryState,
    PersistentFieldMemory,
)
from dfn_kernels import flow_norm

pytestmark = pytest.mark.skipif(INTERPRETED, reason="models are tested on compiled kernels")
DIM = 24
FEW = (1, 2, 3)
LENGTHS = [3, 5, 7, 11, 13, 17, 2, 19, 23, 29, 1, 31]  # some equal other sizes here, and 1 is special to the compiler


def beyond_earlier(what: str):
    earlier = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    return pytest.mark.xfail(earlier, reason=f"PyTorch 2.11 makes a constant of {what}", strict=False)


def compilations(calls, backend="eager") -> int:
    """How many programs it took to serve the `calls`, (function, *arguments); each gives what it gives uncompiled.

    aot_eager makes constants of more numbers than eager does, as every backend after it.
    """
    torch._dynamo.reset()
    counters["stats"].clear()
    for function, *arguments in calls:
        compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return counters["stats"]["unique_graphs"]


def test_memory_of_any_length():
    memory = PersistentFieldMemory(5, 3, 2, merge_radius=0.5)
    state = memory.write(memory.initial_state(2), torch.randn(2, 9, 2), torch.randn(2, 9, 3))
    write, read = partial(memory.write, state), partial(memory.read, state, sigma=1.0, k=3)
    assert compilations([(write, torch.randn(2, n, 2), torch.randn(2, n, 3)) for n in LENGTHS], "aot_eager") in FEW
    assert compilations([(read, torch.randn(2, n, 2)) for n in LENGTHS]) in FEW


@beyond_earlier("a number that is squared before it meets a tensor")
def test_memory_of_any_decay_and_radius():
    class Writer(torch.nn.Module):
        def __init__(self, step):
            super().__init__()
            self.memory = PersistentFieldMemory(5, 3, 2, decay=1 - step / 40, merge_radius=step / 20)

        def forward(self, positions, states):
            return self.memory.write(self.memory.initial_state(2), positions, states)

    calls = [(Writer(step), torch.randn(2, 9, 2), torch.randn(2, 9, 3)) for step in range(12)]
    assert compilations(calls, "aot_eager") in FEW


def test_memory_follows_long_chains_when_compiled():
    memory = PersistentFieldMemory(4, 1, 1, merge_radius=0.5)
    chain = 0.25 * torch.arange(77.0).view(1, -1, 1)  # exact in binary
    write = torch.compile(lambda x: memory.write(memory.initial_state(1), x, x), backend="eager", fullgraph=True)
    assert write(chain).influence.tolist()[0].count(77.0) == 1
    assert all(map(same_bits, write(chain), memory.write(memory.initial_state(1), chain, chain)))


def of_any_eps(states, energy, eps, mode):
    return flow_norm(states, energy.square(), eps, mode).sin()


def differentiated(function, states, energy, eps):
    inputs = states.clone().requires_grad_(), energy.clone().requires_grad_()
    return torch.autograd.grad(function(*inputs, eps, "causal").sum(), inputs)


@pytest.mark.parametrize("mode", ["mean", "causal", "entity"])
def test_flow_norm_of_any_eps(mode):
    calls = [(of_any_eps, torch.randn(2, n, 4), torch.rand(2, n), 1.1**i - 0.9, mode) for i, n in enumerate(LENGTHS)]
    assert compilations(calls, "aot_eager") in FEW


def test_flow_norms_gradients_with_any_eps():
    torch._dynamo.reset()
    counters["stats"].clear()
    compiled = torch.compile(of_any_eps, backend="aot_eager", dynamic=True, fullgraph=True)
    for i, n in enumerate((7, 5, 9)):
        arguments = torch.randn(2, n, 4), torch.rand(2, n), 0.5 * 1.3**i
        torch.testing.assert_close(differentiated(compiled, *arguments), differentiated(of_any_eps, *arguments))
    assert counters["stats"]["unique_graphs"] == 1


def test_flow_norm_modules_share_a_program():
    calls = [(FlowNorm(0.1 * i + 0.01), torch.randn(2, 5, 4), torch.rand(2, 5)) for i in range(12)]
    assert compilations(calls, "aot_eager") in FEW


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(3)
    model = DFNLanguageModel(31, DIM, 1, memory_size=5)
    return model, model(torch.randint(31, (2, 40)))[1]


def test_language_model_of_any_length(language):
    model, memory = language
    assert compilations([(model, torch.randint(31, (2, n)), memory) for n in LENGTHS]) in FEW


@beyond_earlier("the length, for the least of two strides")
def test_export_with_a_dynamic_length(language):
    model, memory = language
    N = torch.export.Dim("N", min=2, max=4096)
    shapes = ({1: N}, MemoryState(None, None, None))
    program = torch.export.export(model, (torch.randint(31, (2, 9)), memory), dynamic_shapes=shapes).module()
    for n in (2, 5, 31, 64, 300):
        ids = torch.randint(31, (2, n))
        torch.testing.assert_close(program(ids, memory), model(ids, memory))


@beyond_earlier("the length, for the least of two strides")
def test_export_of_the_mixer():
    mixer = FlowMixer(DIM)
    N = torch.export.Dim("N", min=2, max=4096)
    program = torch.export.export(mixer, (torch.randn(2, 9, DIM),), dynamic_shapes=({1: N},)).module()
    for n in (2, 31, 300):
        x = torch.randn(2, n, DIM)
        torch.testing.assert_close(program(x), mixer(x))


MODELS = {
    "layer": lambda: DFNLayer(DIM),
    "block": lambda: DFNBlock(DIM),
    "mixer": lambda: FlowMixer(DIM),
    "language": lambda: unlike_at_the_start(DFNLanguageModel(31, DIM, 2, memory_size=5)),
    "classifier": lambda: DFNClassifier(9, 5, DIM),
    "network": lambda: FlowNetwork(31, DIM, 2, 3, mixer="flow_attention"),
    "low rank": lambda: FlowNetwork(31, DIM, 2, 3, rank=4, tie_output=True),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_meta_device(kind, assign):
    """Built without memory, then filled from a checkpoint: the same model, with everything that it does not hold."""
    real = MODELS[kind]().to(DEVICE)
    with torch.device("meta"):
        built = MODELS[kind]()
    assert all(x.is_meta for x in [*built.parameters(), *built.buffers()])
    if not assign:
        built = built.to_empty(device=DEVICE)
    built.load_state_dict(real.state_dict(), assign=assign)
    ours, theirs = dict(built.named_parameters()), dict(real.named_parameters())
    assert ours.keys() == theirs.keys() and all(same_bits(ours[n].detach(), theirs[n].detach()) for n in ours)
    ours, theirs = dict(built.named_buffers()), dict(real.named_buffers())
    assert ours.keys() == theirs.keys() and all(same_bits(ours[n], theirs[n]) for n in ours)
    if kind in ("language", "network", "low rank"):
        ids = torch.randint(31, (2, 9), device=DEVICE)
        assert same_bits(built(ids)[0], real(ids)[0])
    elif kind == "mixer":
        x = torch.randn(2, 9, DIM, device=DEVICE)
        assert same_bits(built(x), real(x))
