"""Packed documents: a model gives each what it would give it alone."""

import itertools

import pytest
import torch
from helpers import INTERPRETED, unlike_at_the_start

from dfn.cli import main
from dfn.models.language import DFNLanguageModel
from dfn.models.layers import DFNBlock, EntityPositions, FlowMixer
from dfn.runs import Options, Run, UsageError
from dfn.training.text import packed_batches
from dfn.training.trainer import language_model_loss

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
        mixer(torch.randn(1, N, 12).double(), torch.zeros(1, N, dtype=torch.bool), ptr=PTR)


def test_time_begins_with_each():
    """Within a document only differences of time are felt: nothing else here would notice."""
    place = EntityPositions(6, 4, 3)
    states = torch.randn(2, N, 6)
    alone = torch.cat([place(states[:, d], start=3) for d in DOCUMENTS], 2)
    torch.testing.assert_close(place(states, 3, PTR), alone)
    assert not torch.allclose(place(states, 3), alone)


def test_language_model():
    model = unlike_at_the_start(DFNLanguageModel(19, 12, layers=3, k=5).double())
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
    model = unlike_at_the_start(DFNLanguageModel(19, 8, layers=2, k=3))
    ids = torch.randint(19, (1, N))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, ptr=PTR)[0], model(ids, ptr=PTR)[0])


def test_packed_batches():
    sizes = [5, 1, 30, 2, 2, 1, 400]
    ptr = torch.tensor([0, *itertools.accumulate(sizes)])
    data = torch.repeat_interleave(torch.arange(7), torch.tensor(sizes)).to(torch.uint8)  # bytes that name their file
    seen = set()
    for ids, targets, rows in itertools.islice(packed_batches(data, ptr, 16, 9, torch.Generator().manual_seed(2)), 40):
        assert ids.shape == targets.shape == (16, 9) and rows.shape == (16, 6)  # 5 files begin within 9 bytes at most
        assert rows[:, 0].eq(0).all() and rows[:, -1].eq(9).all() and (rows.diff() >= 0).all()
        for row, target, offsets in zip(ids, targets, rows, strict=True):
            for a, e in itertools.pairwise(offsets.tolist()):
                assert len(row[a:e].unique()) <= 1 and (a == e or e == 9 or row[e] != row[a])
            counted = target != -100
            assert torch.equal(target[counted], row[counted])  # never a byte of another file
            assert torch.equal((~counted[:-1]).nonzero()[:, 0], (row[1:] != row[:-1]).nonzero()[:, 0])
            seen.add(len(row.unique()))
    assert {1, 2, 5} <= seen
    whole = next(packed_batches(data, torch.tensor([0, 441]), 3, 9))
    assert whole[2].tolist() == [[0, 9]] * 3 and (whole[1] != -100).all()


def test_loss_of_packed_rows():
    model = DFNLanguageModel(256, 8, layers=2, k=3).double()
    data, ptr = torch.randint(256, (300,), dtype=torch.uint8), torch.tensor([0, 7, 20, 41, 300])
    ids, targets, rows = next(packed_batches(data, ptr, 40, 30))
    loss = language_model_loss(model, (ids, targets, rows))
    losses = []
    for row, target, offsets in zip(ids, targets, rows, strict=True):
        for a, e in itertools.pairwise(offsets.tolist()):
            if a < e:
                logits = model(row[None, a:e])[0][0]
                losses.append(torch.nn.functional.cross_entropy(logits, target[a:e], reduction="none"))
    counted = torch.cat(losses)[targets.flatten() != -100]
    torch.testing.assert_close(loss, counted.mean())
    assert (rows.diff() > 0).sum(1).max() > 1


def test_command_packs(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i}: " + "abc " * (i % 7 + 30))
    flags = ["--data", str(tmp_path / "texts"), "--steps", "3", "--batch", "4", "--length", "40", "--dim", "8"]
    assert main(["train", "text", "--pack", "--quiet", "--out", str(tmp_path / "run"), *flags]) == 0
    assert Run.load(tmp_path / "run").options.pack
    (tmp_path / "run.toml").write_text("kind = 'text'\npack = true\n")
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--quiet", "--out", str(tmp_path / "b"), *flags]) == 0
    assert Run.load(tmp_path / "b").options.pack
    with pytest.raises(UsageError, match="pack has no meaning with a memory"):
        Options.of("text", pack=True, memory_size=8)
