"""The switches of a block and what a model makes of them: every one changes what it says and nothing else."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import unlike_at_the_start
from torch import nn

from dfn.models.decoding import Decoder
from dfn.models.feedforward import GatedMLP, ShortConvolution
from dfn.models.language import DFNLanguageModel
from dfn.models.layers import (
    FIRST_BLOCK,
    DFNBlock,
    DynamicFlowAttention,
    EntityPositions,
    FlowMixer,
    count_parameters,
    recommended_heads,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(vocab_size=19, dim=20, layers=2, heads=4, pos_dim=2, k=5)
OPTIONS = [
    dict(mlp="gelu"), dict(norm="layer"), dict(bias=True), dict(output_scale=0.7), dict(semantic=0), dict(semantic=2),
    dict(sigma=0.3), dict(normalize=False), dict(receiver_flow=False), dict(salience=False), dict(convolution=0),
    FIRST_BLOCK, dict(mlp="gelu", norm="layer", bias=True, output_scale=0.7, semantic=2),
]  # fmt: skip


def model(**options):
    torch.manual_seed(3)
    return unlike_at_the_start(DFNLanguageModel(**SIZES, block_options=options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_switch_works(options):
    """Causal to the bit, gradients everywhere, and not the default's logits."""
    one, ids = model(**options), torch.randint(19, (2, 23))
    other = torch.cat([ids[:, :13], (ids[:, 13:] + 1) % 19], 1)
    logits = one(ids)[0]
    with torch.no_grad():
        assert torch.equal(one(ids)[0][:, :13], one(other)[0][:, :13])
        assert not torch.allclose(logits, model()(ids)[0])
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.parameters())
    assert one.config["block_options"] == options
    again = DFNLanguageModel(**one.config)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again(ids)[0], logits)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("normalize", True)], ids=str)
def test_generation_is_the_forward_pass(options):
    one, ids = model(**options).eval(), torch.randint(19, (2, 17))
    with torch.no_grad():
        whole = one(ids)[0]
        decoder = Decoder(one, capacity=17)
        parts = [decoder(ids[:, :9]), *(decoder(ids[:, i : i + 1]) for i in range(9, 17))]
    torch.testing.assert_close(torch.stack(parts, 1), whole[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_generation_with_a_convolution_and_a_memory(prompt):
    """Also after a prompt that is shorter than what a convolution looks back at."""
    torch.manual_seed(3)
    one, ids = unlike_at_the_start(DFNLanguageModel(**SIZES, memory_size=6)).eval(), torch.randint(19, (2, 17))
    with torch.no_grad():
        memory = one(ids.flip(1))[1]
        whole, decoder = one(ids, memory)[0], Decoder(one, memory=memory)
        parts = [decoder(ids[:, :prompt]), *(decoder(ids[:, i : i + 1]) for i in range(prompt, 17))]
    torch.testing.assert_close(torch.stack(parts, 1), whole[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


def test_sums_do_not_generate():
    with pytest.raises(ValueError, match="normalize=True, got False"):
        model(normalize=False).generate(torch.zeros(1, 3, dtype=torch.long), 2)


def test_defaults():
    explicit = dict(mlp="swiglu", norm="rms", bias=False, output_scale=0.5, dropout=0.0, attention_dropout=0.0,
                    semantic=None, sigma=1.0, normalize=True, receiver_flow=True, salience=True,
                    convolution=4)  # fmt: skip
    ids = torch.randint(19, (1, 9))
    assert torch.equal(model()(ids)[0], model(**explicit)(ids)[0])


def test_first_block():
    """The parameters, by name and order, of what was saved before the default changed."""
    names = [name for name, _ in model(**FIRST_BLOCK).named_parameters() if name.startswith("blocks.0.")]
    inside = ["alpha", "log_sigma", "offset", "flow.weight", "flow.bias", "value.weight", "value.bias"]
    assert names == [f"blocks.0.{name}" for name in (
        "norm.weight", "norm.bias", *(f"attention.{name}" for name in inside), "out.weight", "mlp.0.weight",
        "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
    )]  # fmt: skip


def test_older_weights():
    """Weights without a receiver's flow and influence load, and say what they said; half of a layer does not."""
    older, one, ids = model(receiver_flow=False, salience=False), model(), torch.randint(19, (2, 29))
    one.load_state_dict(older.state_dict())
    assert torch.equal(one(ids)[0], older(ids)[0])
    assert one.blocks[0].attention.receiver.weight.abs().sum() == 0
    state = model().state_dict()
    del state["blocks.1.attention.offset"]
    with pytest.raises(RuntimeError, match="Missing key.*blocks.1.attention.offset"):
        one.load_state_dict(state)


def test_no_biases():
    assert not [name for name, _ in model(bias=False, norm="rms").named_parameters()
                if name.endswith("bias") and "positions" not in name]  # fmt: skip


def test_swiglu():
    mlp, x = GatedMLP(6, 5, 4), torch.randn(3, 6)
    gate, up = x @ mlp.up.weight[:5].T, x @ mlp.up.weight[5:].T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.out.weight.T)
    gelu, swiglu = (count_parameters(DFNBlock(40, mlp=mlp, bias=False)) for mlp in ("gelu", "swiglu"))
    assert abs(swiglu / gelu - 1) < 0.02


def test_output_scale():
    for mlp, last in (("gelu", lambda b: b.mlp[2]), ("swiglu", lambda b: b.mlp.out)):
        torch.manual_seed(0)
        one = DFNBlock(20, mlp=mlp)
        torch.manual_seed(0)
        half = DFNBlock(20, mlp=mlp, output_scale=0.5)
        assert torch.equal(last(half).weight, last(one).weight / 2) and torch.equal(half.out.weight, one.out.weight / 2)
        assert torch.equal(half.attention.value.weight, one.attention.value.weight)


def test_heads_at_the_start():
    assert recommended_heads(4, 2) == ([0, 0, 0.5, 1], [1, 1, 0.1, 0.1], [1, 1, 2, 0.4], [0, 0, 0, -1])
    assert recommended_heads(4, 0).time_scale == [0.125, 0.25, 0.5, 1]
    assert EntityPositions(8, 4, semantic=3).semantic == 3
    with pytest.raises(ValueError, match="semantic must be between 0 and 3, got 4"):
        recommended_heads(4, 4)
    wide = DFNBlock(8, sigma=2.0).attention.log_sigma.exp()
    torch.testing.assert_close(wide, torch.tensor([2.0, 4.0, 4.0, 0.8]))


@pytest.mark.parametrize("salience", [True, False])
def test_attention_dropout(salience):
    """In training only: a share of the influence is next to nothing, other entities in every head and every time."""
    attention = DynamicFlowAttention(8, 4, dropout=0.3, salience=salience)
    s, given = torch.randn(2, 500, 8), torch.rand(2, 500) + 0.5
    with torch.no_grad():
        heard = attention.influence(s, given)
        again = attention.influence(s, given)
        attention.eval()
        whole = attention.influence(s, given)
    whole = given[:, None].expand(-1, 4, -1) if not salience else whole  # with none learned, what was given
    quiet = heard < whole / 2
    torch.testing.assert_close(heard, torch.where(quiet, whole * math.exp(-8), whole))
    assert abs(float(quiet.double().mean()) - 0.3) < 4 * math.sqrt(0.21 / 4000)
    assert not torch.equal(heard, again) and not torch.equal(quiet[:, 0], quiet[:, 1])
    mixer, x = FlowMixer(8, dropout=0.4), torch.randn(1, 30, 8)
    assert mixer.dropout == 0.4 and not torch.equal(mixer(x), mixer(x)) and torch.equal(mixer.eval()(x), mixer(x))
    one, ids = model(attention_dropout=0.4), torch.randint(19, (2, 11))
    assert not torch.equal(one(ids)[0], one(ids)[0]) and torch.equal(one.eval()(ids)[0], model()(ids)[0])
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout must be at least 0 and below 1, got {wrong}"):
            DynamicFlowAttention(8, dropout=wrong)


def test_dropout():
    """In training only, of what a block adds and of the embeddings; on average nothing changes."""
    one, ids = model(dropout=0.4), torch.randint(19, (2, 11))
    plain = model()
    one.eval()
    assert torch.equal(one(ids)[0], plain(ids)[0])
    one.train()
    assert not torch.equal(one(ids)[0], one(ids)[0])
    block = DFNBlock(20, heads=4, pos_dim=2, k=5, causal=True, dropout=0.4)
    x, p = torch.randn(1, 300, 20), torch.randn(1, 4, 300, 2)
    with torch.no_grad():
        added = block(x, p)[0] - x
        whole = block.eval()(x, p)[0] - x
    share = float((added == 0).double().mean())
    assert abs(share - 0.4) < 4 * math.sqrt(0.24 / 6000)
    kept = added != 0
    torch.testing.assert_close(added[kept], whole[kept] / 0.6, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options, said", [
    (dict(mlp="relu"), "mlp must be one of gelu, swiglu, got 'relu'"),
    (dict(norm="batch"), "norm must be one of layer, rms, got 'batch'"),
    (dict(sigma=0.0), "sigma must be positive and finite, got 0.0"),
])  # fmt: skip
def test_what_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        DFNBlock(8, **options)


def test_rms_has_one_gain():
    norm = DFNBlock(8, norm="rms").norm
    assert isinstance(norm, nn.RMSNorm) and count_parameters(norm) == 8


def test_short_convolution():
    """The formula, channel by channel; sequences packed together, one shorter than it looks back, and none at all."""
    one, x = ShortConvolution(5, 3), torch.randn(2, 11, 5, dtype=torch.float64)
    assert torch.equal(one.double()(x), x)  # at the start
    with torch.no_grad():
        c = one.weight.normal_()
    want = sum(
        c[t] * torch.stack([x[:, i - t] if i >= t else torch.zeros(2, 5) for i in range(11)], 1) for t in range(3)
    )
    torch.testing.assert_close(one(x), want)
    ptr = torch.tensor([0, 1, 1, 7, 11])
    alone = torch.cat([one(x[:, a:b]) for a, b in pairwise(ptr.tolist())], 1)
    torch.testing.assert_close(one(x, ptr), alone)
    before = torch.zeros(2, 2, 5, dtype=torch.float64)
    for i in range(11):
        torch.testing.assert_close(one.step(x[:, i], before), want[:, i])
        before = torch.cat([before, x[:, i : i + 1]], 1)[:, 1:]
    assert torch.autograd.gradcheck(one, x[:1, :4].requires_grad_())


def test_models_of_before_the_convolution():
    """Their weights load, into the same model; a block that everybody may read from has no order to look back in."""
    before, ids = model(convolution=0), torch.randint(19, (2, 11))
    now = model()
    now.load_state_dict(before.state_dict())
    assert torch.equal(now(ids)[0], before(ids)[0])
    with pytest.raises(ValueError, match="convolution must be 0 with causal=False, got 4"):
        DFNBlock(8, 2, 2, 3, convolution=4)


def test_a_convolution_lets_padding_be():
    """Rows beyond `lengths` change nothing, and pass through."""
    torch.manual_seed(5)
    block = DFNBlock(12, 2, 3, 4, causal=True, convolution=3)
    nn.init.normal_(block.convolution.weight)
    states, places, lengths = torch.randn(2, 9, 12), torch.randn(2, 2, 9, 3), torch.tensor([4, 9])
    out = block(states, places, lengths=lengths)[0]
    torch.testing.assert_close(out[:1, :4], block(states[:1, :4], places[:1, :, :4])[0])
    assert torch.equal(out[0, 4:], states[0, 4:])
