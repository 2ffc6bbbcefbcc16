"""Packed documents: a model gives each what it would give it alone."""

import itertools

import pytest
import torch
from helpers import INTERPRETED

from dfn.models.language import DFNLanguageModel
from dfn.models.layers import DFNBlock, FlowMixer

pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
SIZES = [0, 5, 1, 0, 23, 3, 0]
PTR = torch.tensor([0, *itertools.accumulate(SIZES)])
N = int(PTR[-1])
DOCUMENTS = [slice(a, e) for a, e in itertools.pairwise(PTR.tolist()) if a < e]


def check_each_alone(model, packed, alone, inputs):
    """Outputs and the gradients of parameters and inputs, packed and one document after the other."""

    def one_by_one(*inputs):
        return torch.cat([alone(*(x[..., document, :] for x in inputs)) for document in DOCUMENTS], 1)

    results = []
    for run in (packed, one_by_one):
        mine = [x.clone().requires_grad_() for x in inputs]
        model.zero_grad()
        out = run(*mine)
        torch.manual_seed(1)
        (out * torch.randn_like(out)).sum().backward()
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.detach(), *(x.grad for x in mine), *trained])
    assert len(results[0]) == len(results[1]) > 3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("flow_norm", [False, True])
def test_block(causal, flow_norm):
    block = DFNBlock(12, 4, 3, 6, causal=causal, flow_norm=flow_norm).double()
    torch.nn.init.normal_(block.attention.flow.weight)
    states, positions = torch.randn(2, N, 12).double(), torch.randn(2, 4, N, 3).double()

    def both(states, positions, **options):  # states, and positions so that their gradients count
        states, positions = block(states, positions, **options)
        return torch.cat([states, positions.transpose(1, 2).flatten(2)], 2)

    check_each_alone(block, lambda s, p: both(s, p, ptr=PTR), both, (states, positions))


@pytest.mark.parametrize("causal", [False, True])
def test_mixer(causal):
    mixer = FlowMixer(12, 4, 6, causal).double()
    check_each_alone(mixer, lambda x: mixer(x, ptr=PTR), mixer, [torch.randn(2, N, 12).double()])
    with pytest.raises(ValueError, match="key_padding_mask must be None with ptr"):
        mixer(torch.randn(1, N, 12).double(), torch.zeros(1, N, dtype=torch.bool), PTR)


def test_language_model():
    model = DFNLanguageModel(19, 12, layers=3, k=5).double()
    ids = torch.randint(19, (2, N))
    packed = model(ids, ptr=PTR)[0]
    alone = torch.cat([model(ids[:, d])[0] for d in DOCUMENTS], 1)
    torch.testing.assert_close(packed, alone)
    assert not torch.allclose(packed, model(ids)[0])  # else nothing was told
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 19  # the middle of a document, and all that follow
    assert torch.equal(packed[:, :12], model(other, ptr=PTR)[0][:, :12])
    remembering = DFNLanguageModel(19, 12, layers=1, k=5, memory_size=4)
    with pytest.raises(ValueError, match="ptr must be None with a memory"):
        remembering(ids, ptr=PTR)
    with pytest.raises(ValueError, match="ptr must go from 0 to the number of rows"):
        model(ids, ptr=PTR[:-2])


def test_compiles():
    model = DFNLanguageModel(19, 8, layers=2, k=3)
    ids = torch.randint(19, (1, N))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, ptr=PTR)[0], model(ids, ptr=PTR)[0])
