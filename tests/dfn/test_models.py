"""DFNLanguageModel: causality to the bit, generation, gradients, bad input, and that it learns."""

import copy

import pytest
import torch
from helpers import check_compiled_module, same_bits, unlike_at_the_start

from dfn.models import decoding
from dfn.models.decoding import Decoder, Scan, Stream
from dfn.models.language import ABLATIONS, DFNLanguageModel, ablated, sample
from dfn.models.memory import PersistentFieldMemory
from dfn.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options):
    return unlike_at_the_start(DFNLanguageModel(**{**dict(vocab_size=31, dim=24, layers=2, k=5), **options}))


def test_causal_to_the_bit():
    """Later ids change no bit of earlier logits, also with many equal ids, whose positions coincide."""
    for vocabulary in (31, 3):
        model = small(vocab_size=vocabulary)
        ids = torch.randint(vocabulary, (2, 53))
        with torch.no_grad():
            before = model(ids)[0]
            for start in (52, 30, 1):
                other = ids.clone()
                other[:, start:] = (other[:, start:] + 1) % vocabulary
                after = model(other)[0]
                assert same_bits(after[:, :start], before[:, :start])
                assert not after[:, start:].equal(before[:, start:])


def test_causal_to_the_bit_after_training():
    """Once more with positions and offsets that have moved."""
    model = small()
    trainer = Trainer(model, steps=5, lr=3e-2, warmup=0)
    ids = torch.randint(31, (4, 40))
    for _ in range(5):
        trainer.train_step((ids[:, :-1], ids[:, 1:]))
    with torch.no_grad():
        before = model(ids)[0]
        ids[:, 20:] = torch.randint(31, (4, 20))
        assert same_bits(model(ids)[0][:, :20], before[:, :20])


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_greedy_generation_is_the_argmax_of_full_passes(length):
    model = small()
    ids = torch.randint(31, (3, length))
    out = model.generate(ids, 9, temperature=0)
    assert out.shape == (3, length + 9) and out.dtype == torch.int64 and out[:, :length].equal(ids)
    with torch.no_grad():
        logits = model(out)[0]
    assert logits[:, length - 1 : -1].argmax(-1).equal(out[:, length:])


KINDS = [dict(vocab_size=3), dict(memory_size=9), dict(heads=1), dict(k=60), dict(block_options={"flow_norm": False})]


@pytest.mark.parametrize("search", [Stream, Scan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_decoder_is_the_full_pass(search, options, dtype, monkeypatch):
    """Also long after the prompt, far from where training has seen anything, and where many positions coincide."""
    monkeypatch.setattr(decoding, "ROWS", 16)
    model = small(**options).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
        ids, memory = torch.randint(model.config["vocab_size"], (2, 120)), None
        if model.memory is not None:
            memory = model(torch.randint(31, (2, 40)))[1]
            memory = memory._replace(influence=torch.rand_like(memory.influence))
            assert not torch.allclose(model(ids, memory)[0], model(ids)[0], atol=1e-2)
        logits, decoder = model(ids, memory)[0], Decoder(model, memory=memory, search=search)
        got = [decoder(ids[:, :37])] + [decoder(ids[:, i : i + 1]) for i in range(37, 120)]
        exact = model.double()(ids, memory and memory._replace(
            positions=memory.positions.double(), states=memory.states.double()))[0]  # fmt: skip
    got, rounding = torch.stack(got, 1), 1e-9 if dtype == torch.float64 else float((logits - exact).abs().max())
    assert (got - exact[:, 36:]).abs().max() < 8 * rounding  # another order of sums than the full pass, not worse
    assert got.argmax(-1).equal(logits[:, 36:].argmax(-1))
    with pytest.raises(ValueError, match="one token after the prompt"):
        decoder(ids)


def test_decoder_makes_room(monkeypatch):
    """Capacity changes nothing, known before or found out; neither does a prompt of one token."""
    model, ids = small(), torch.randint(31, (1, 310))
    with torch.no_grad():
        want = model(ids)[0][:, -1]
    for search in (Stream, Scan):
        for first, capacity in ((1, 0), (1, 310), (300, 301)):
            decoder = Decoder(model, capacity=capacity, search=search)
            decoder(ids[:, :first])
            for i in range(first, 310):
                got = decoder(ids[:, i : i + 1])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert decoder.capacity >= 310 and (capacity != 310 or decoder.capacity == 310)


def test_generation_reads_the_memory():
    model = small(memory_size=12, pos_dim=3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
        memory = model(torch.randint(31, (2, 40)))[1]
        ids = torch.randint(31, (2, 11))
        out = model.generate(ids, 14, temperature=0, memory=memory)
        want = model(out, memory)[0][:, 10:-1].argmax(-1)
    assert out[:, 11:].equal(want) and not out.equal(model.generate(ids, 14, temperature=0))
    with pytest.raises(ValueError, match="memory must be None"):
        small().generate(ids, 1, memory=memory)


def test_decoder_refuses_positions_that_are_not_finite():
    model, ids = small(), torch.randint(31, (1, 9))
    decoder = Decoder(model)
    decoder(ids)
    with torch.no_grad():
        model.blocks[0].attention.flow.weight[2] = float("nan")
    with pytest.raises(ValueError, match="positions must be finite"):
        decoder(ids[:, :1])


def test_half_precision_weights():
    """Positions stay in float32: with bfloat16 ones entities beyond 256 would share their times."""
    model, ids = small().bfloat16(), torch.randint(31, (1, 400))
    with torch.no_grad():
        places, decoder = model.positions(model.embed(ids)), Decoder(model)
        assert places.dtype == torch.float32 and places[0, -1, :, 0].unique().numel() == 400
        full = model(ids)[0][:, -1].float()
        decoder(ids[:, :-1])
        got = decoder(ids[:, -1:]).float()
        exact = model.float()(ids)[0][:, -1]
    assert (got - exact).norm() < 2 * (full - exact).norm() < 0.1 * exact.norm()


def test_generation_knows_no_dropout():
    """Nor does it change which modules are in training."""
    model = DFNLanguageModel(31, dim=16, layers=2, k=4, block_options={"dropout": 0.5, "attention_dropout": 0.9})
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    ids = torch.randint(31, (1, 29))
    found = Decoder(model)(ids)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(Decoder(model)(ids), found)
    assert torch.equal(Decoder(model.eval())(ids), found)


def test_generation_is_deterministic_for_a_generator():
    model = small()
    ids = torch.randint(31, (2, 5))
    draws = [model.generate(ids, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    assert model.generate(ids, 6, top_k=1).equal(model.generate(ids, 6, temperature=0))
    assert model.generate(ids, 0).equal(ids)


def test_sample():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(4000, 4)
    drawn = sample(logits, 0.5, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 2}
    assert abs((drawn == 1).float().mean() - torch.tensor([6.0, 4.0]).softmax(0)[0]) < 0.03


def test_sample_at_the_limits():
    """Ties keep k, the lower ones; any temperature behaves as its limit, and what has no chance keeps none."""
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0, -torch.inf]]).expand(3000, 5)

    def drawn(temperature, top_k=None, dtype=torch.float32):
        found = sample(tied.to(dtype), temperature, top_k, torch.Generator().manual_seed(0))
        return (found.bincount(minlength=5) / len(found)).tolist()

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert drawn(1.0, 1, dtype) == drawn(0.0, dtype=dtype) == [0, 1, 0, 0, 0]
        assert drawn(1.0, 2, dtype) == pytest.approx([0, 1 / 2, 1 / 2, 0, 0], abs=0.04)
        for temperature in (5e-324, 1e-40, 1e-3):
            assert drawn(temperature, None, dtype) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0], abs=0.04)
        for temperature in (1e40, 1e308, float("inf")):
            assert drawn(temperature, None, dtype) == pytest.approx([1 / 4] * 4 + [0], abs=0.04)
            assert drawn(temperature, 3, dtype) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0], abs=0.04)


def test_bad_input():
    model, ids = small(), torch.zeros(1, 4, dtype=torch.int64)
    for arguments, message in (
        (dict(ids=ids[0]), r"generate: ids must have shape \[B, N\]"),
        (dict(ids=ids[:, :0]), "with N > 0"),
        (dict(ids=ids, temperature=-1.0), "temperature must not be negative, got -1"),
        (dict(ids=ids, temperature=float("nan")), "temperature must not be negative, got nan"),
        (dict(ids=ids, top_k=0), "top_k must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(max_new_tokens=1, **arguments)
    memory, other = (PersistentFieldMemory(4, 24, n).initial_state(2) for n in (32, 12))
    for call, error, message in (
        (lambda: small(memory_size=-1), ValueError, "memory_size must be at least 0, got -1"),
        (lambda: small(layers=0), ValueError, "layers must be at least 1, got 0"),
        (lambda: model(ids, memory), ValueError, "memory must be None with memory_size=0"),
        (lambda: small(memory_size=4)(ids, (1, 2, 3)), TypeError, "memory must be a MemoryState, got tuple"),
        (lambda: small(memory_size=4)(ids, memory), ValueError, r"extra_positions must have shape \[B, H, E, D\]"),
        (lambda: small(memory_size=4)(ids, other), ValueError, "states of 32 and 24 dimensions, got 12 and 24"),
        (lambda: ablated({}, "hope"), ValueError, "without must be one of flow, memory, .*, got 'hope'"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_gradients_state_dict_and_deepcopy():
    model = small()
    ids = torch.randint(31, (2, 17))
    logits, memory = model(ids)
    assert logits.shape == (2, 17, 31) and memory is None
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    other = DFNLanguageModel(**model.config)
    other.load_state_dict(model.state_dict())
    assert same_bits(other(ids)[0], logits) and same_bits(copy.deepcopy(model)(ids)[0], logits)


def test_compiles_without_graph_breaks():
    model, ids = small(), torch.randint(31, (2, 11))
    check_compiled_module(model, lambda outputs: outputs[0], ids)


@pytest.mark.parametrize("without", ABLATIONS)
def test_ablated(without):
    """The part is gone, its parameters do not move, and the rest learns; a block does what its formula says."""
    whole = dict(vocab_size=31, dim=24, layers=2, k=5, memory_size=7)
    model = DFNLanguageModel(**ablated(whole, without))
    assert DFNLanguageModel(**model.config).config == model.config and "block_options" not in whole
    trainer = Trainer(model, steps=3, lr=1e-2, warmup=0)
    ids = torch.randint(31, (4, 20))
    for _ in range(3):
        trainer.train_step((ids[:, :-1], ids[:, 1:]))
    with torch.no_grad():
        x, block = model.embed(ids), model.blocks[0]
        start = model.positions(x)
        states, positions = block(x, start)
        s = block.said(x)
        y, drift = block.attention(s, start)
        divided = states - x - block.out(y)
        whole_update = block.mlp(torch.cat([s, y], -1))
        padded = block(x, start, None, torch.tensor([20, 20, 3, 20]))[0]
    assert padded[2, 3:].equal(x[2, 3:])
    assert positions.equal(start) == (without == "flow") == (not drift.energy.any())
    assert torch.allclose(divided, whole_update, rtol=1e-4, atol=1e-5) == (without in ("flow", "flow_norm"))
    assert (not block.attention.offset.any()) == (without == "receiver_drift")
    assert (model(ids)[1] is None) == (without == "memory")
    assert model.config["heads"] == block.attention.heads == (1 if without == "heads" else 4)
