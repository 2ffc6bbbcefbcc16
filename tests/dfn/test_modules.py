"""What PyTorch users do to modules: copy, pickle, functional_call, autocast."""

import copy
import pickle

import pytest
import torch
from helpers import INTERPRETED, same_bits
from torch import Tensor, nn

import dfn
import dfn_kernels as dk
from dfn.flownetwork import FlowLayer, FlowNetwork

natively = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")


def models() -> dict[str, tuple[nn.Module, tuple]]:
    states, positions = torch.randn(2, 19, 12), torch.randn(2, 19, 3)
    ids = torch.randint(31, (2, 19))
    return {
        "DFNLayer": (dfn.DFNLayer(12, 4, pos_dim=3), (states, positions)),
        "DFNBlock": (dfn.DFNBlock(12, 3, k=4, causal=True), (states, torch.randn(2, 3, 19, 3))),
        "FlowMixer": (dfn.FlowMixer(12, 2, 4), (states,)),
        "DFNLanguageModel": (dfn.DFNLanguageModel(31, 12, 2, 2, k=4), (ids,)),
        "FlowLayer": (FlowLayer(12, 7, 3), (states,)),
        "FlowNetwork": (FlowNetwork(31, 12, 2, 3, max_seq_len=32, mixer="flow_attention"), (ids,)),
    }


MODELS = list(models())


def result(model: nn.Module, inputs: tuple) -> Tensor:
    out = model(*inputs)
    return out[0] if isinstance(out, tuple) else out


@natively
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name):
    model, inputs = models()[name]
    want = result(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(result(other, inputs), want)
        assert repr(other) == repr(model)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        assert same_bits(result(model, inputs), want)  # nothing is shared


def test_results_pickle():
    found = dk.knn(torch.rand(9, 2), 3)
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is dk.Neighbors and torch.equal(again.indices, found.indices)
    drift = dk.flow_drift(torch.rand(9, 4), torch.rand(9, 2), torch.rand(2, 4))
    assert type(copy.deepcopy(drift)) is dk.Drift


@natively
@pytest.mark.parametrize("name", MODELS)
def test_functional_call(name):
    model, inputs = models()[name]
    other = {n: p * 0.5 for n, p in model.named_parameters()}
    called = result(lambda *x: torch.func.functional_call(model, other, x), inputs)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict({**model.state_dict(), **{n: p.detach() for n, p in other.items()}})
    assert same_bits(called, result(loaded, inputs))
    assert not same_bits(called, result(model, inputs))
    called.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@natively
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    model, inputs = models()[name]
    want = result(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = result(model, inputs)
    assert got.isfinite().all() and not same_bits(got.float(), want)
    assert (got.float() - want).norm() < 0.3 * want.norm()
    got.float().square().mean().backward()
    for key, p in model.named_parameters():
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.isfinite().all()), key


class First(nn.Module):
    """Of what a model gives the first; and its memory, if it has one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(*inputs)
        if not isinstance(out, tuple):
            return (out,)
        return (out[0], *(out[1] if isinstance(out[1], dfn.MemoryState) else ()))


@natively
@pytest.mark.parametrize("name", [*MODELS, "memory"])
def test_export_with_any_batch_and_length(name):
    if name == "memory":
        model, inputs = dfn.DFNLanguageModel(31, 12, 2, 2, k=4, memory_size=5), (torch.randint(31, (2, 19)),)
    else:
        model, inputs = models()[name]
    model = First(model).eval()
    batch, length = torch.export.Dim("B", min=2, max=64), torch.export.Dim("N", min=8, max=32)
    sizes = tuple({0: batch, x.ndim - 2 if x.ndim > 2 else 1: length} for x in inputs)
    more = tuple(torch.cat([torch.cat([x, x[:1]]).flip(0)] * 2, x.ndim - 2 if x.ndim > 2 else 1) for x in inputs)
    more = tuple(x.narrow(x.ndim - 2 if x.ndim > 2 else 1, 0, 23) for x in more)
    program = torch.export.export(model, inputs, dynamic_shapes=(sizes,))
    with torch.no_grad():
        for got, want in zip(program.module()(*more), model(*more), strict=True):
            assert got.shape[0] == 3 and same_bits(got, want)
