"""One program for every length and every eps, export with a dynamic length, and models built on the meta device."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

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
LENGTHS = [3, 5, 7, 11, 13, 17, 2, 19, 23, 29, 1, 31]  # some equal other sizes here, and 1 is special to the compiler


def compilations(function, calls, backend="eager") -> int:
    """How many programs it took to serve the `calls`; each gives what it gives uncompiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return counter.frame_count


def test_memory_of_any_length():
    memory = PersistentFieldMemory(5, 3, 2, merge_radius=0.5)
    state = memory.write(memory.initial_state(2), torch.randn(2, 9, 2), torch.randn(2, 9, 3))
    calls = [(torch.randn(2, n, 2), torch.randn(2, n, 3)) for n in LENGTHS]
    assert compilations(lambda p, s: memory.write(state, p, s), calls, "aot_eager") <= 3
    assert compilations(lambda p, s: memory.read(state, p, 1.0, 3), calls) <= 3


def test_memory_follows_long_chains_when_compiled():
    memory = PersistentFieldMemory(4, 1, 1, merge_radius=0.5)
    chain = 0.25 * torch.arange(77.0).view(1, -1, 1)  # exact in binary
    write = torch.compile(lambda x: memory.write(memory.initial_state(1), x, x), backend="eager", fullgraph=True)
    assert write(chain).influence.tolist()[0].count(77.0) == 1
    assert all(map(same_bits, write(chain), memory.write(memory.initial_state(1), chain, chain)))


@pytest.mark.parametrize("mode", ["mean", "causal", "entity"])
def test_flow_norm_of_any_eps(mode):
    def loss(states, energy, eps):
        (grad,) = torch.autograd.grad(flow_norm(states, energy.square(), eps, mode).sin().sum(), energy)
        return grad

    def layer(states, energy, eps):
        return flow_norm(states, energy.square(), eps, mode).sin()

    calls = [(torch.randn(2, n, 4), torch.rand(2, n), 1.1**i - 0.9) for i, n in enumerate(LENGTHS)]
    assert compilations(layer, calls, "aot_eager") <= 3


def test_flow_norms_gradients_with_any_eps():
    def layer(states, energy, eps):
        return flow_norm(states, energy.square(), eps, "causal").sin()

    def gradients(function, *arguments):
        states, energy, eps = arguments
        inputs = states.clone().requires_grad_(), energy.clone().requires_grad_()
        return torch.autograd.grad(function(*inputs, eps).sum(), inputs)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    for i, n in enumerate((7, 5, 9)):
        arguments = torch.randn(2, n, 4), torch.rand(2, n), 0.5 * 1.3**i
        torch.testing.assert_close(gradients(compiled, *arguments), gradients(layer, *arguments))
    assert counter.frame_count == 1


def test_flow_norm_modules_share_a_program():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for i in range(12):
        module, x, e = FlowNorm(0.1 * i + 0.01), torch.randn(2, 5, 4), torch.rand(2, 5)
        got = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)(x, e)
        torch.testing.assert_close(got, module(x, e))
    assert counter.frame_count <= 3


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(3)
    model = DFNLanguageModel(31, DIM, 1, memory_size=5)
    return model, model(torch.randint(31, (2, 40)))[1]


def test_language_model_of_any_length(language):
    model, memory = language
    assert compilations(model, [(torch.randint(31, (2, n)), memory) for n in LENGTHS]) <= 3


def test_export_with_a_dynamic_length(language):
    model, memory = language
    N = torch.export.Dim("N", min=2, max=4096)
    shapes = ({1: N}, MemoryState(None, None, None))
    program = torch.export.export(model, (torch.randint(31, (2, 9)), memory), dynamic_shapes=shapes).module()
    for n in (2, 5, 31, 64, 300):
        ids = torch.randint(31, (2, n))
        torch.testing.assert_close(program(ids, memory), model(ids, memory))


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
    "language": lambda: DFNLanguageModel(31, DIM, 2, memory_size=5),
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
