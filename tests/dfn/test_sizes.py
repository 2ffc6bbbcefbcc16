"""Impossible sizes are refused by name when a module is made; a FlowMixer in the place of self-attention."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from dfn.fields import LearnedDensity
from dfn.flownetwork import AdaptiveFlowRouter, FlowLayer, FlowNetwork
from dfn.models import (
    DFNBlock,
    DFNClassifier,
    DFNFieldModel,
    DFNLanguageModel,
    DFNLayer,
    FlowMixer,
    PersistentFieldMemory,
)
from dfn.models.layers import DynamicFlowAttention, EntityPositions
from dfn.training.losses import MeanStateHead

MODULES = {
    DFNLayer: dict(dim=6, k=2, pos_dim=2),
    DFNBlock: dict(dim=6, heads=2, pos_dim=2, k=2),
    DynamicFlowAttention: dict(dim=6, heads=2, pos_dim=2, k=2),
    EntityPositions: dict(dim=6, heads=2, pos_dim=2),
    FlowMixer: dict(d_model=6, heads=2, k=2, pos_dim=2),
    DFNLanguageModel: dict(vocab_size=7, dim=6, layers=1, heads=2, pos_dim=2, k=2),
    DFNFieldModel: dict(channels={"a": 3}, dim=6, layers=1, heads=2, pos_dim=2, k=2),
    DFNClassifier: dict(channels=3, classes=2, dim=6, layers=1, heads=2, pos_dim=2, k=2),
    PersistentFieldMemory: dict(size=3, dim=2, pos_dim=1),
    MeanStateHead: dict(dim=3, classes=2),
    LearnedDensity: dict(channels=3, dim=2, hidden=4, width=3),
    AdaptiveFlowRouter: dict(input_dim=3, output_dim=4, num_patterns=2),
    FlowLayer: dict(input_dim=3, output_dim=4, num_patterns=2),
    FlowNetwork: dict(vocab_size=5, d_model=6, num_layers=1, num_patterns=2, max_seq_len=4),
}


@pytest.mark.parametrize("module, name", [(m, n) for m, sizes in MODULES.items() for n in sizes])
def test_an_impossible_size_is_refused_by_name(module, name):
    sizes = MODULES[module]
    module(**sizes)
    mapping = isinstance(sizes[name], dict)
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"{name}.* must be .*, got {bad}"):
            module(**{**sizes, name: {"a": bad} if mapping else bad})
    with pytest.raises((TypeError, ValueError), match=f"{name}.* must be (an integer|1, 2 or 3)"):
        module(**{**sizes, name: {"a": 2.5} if mapping else 2.5})
    if name == "k":
        with pytest.raises(ValueError, match="k must be at most 1024, got 1025"):
            module(**{**sizes, "k": 1025})


def test_other_impossible_options():
    for make, message in (
        (lambda: DFNBlock(6, heads=4), "DFNBlock: dim must be a multiple of heads, got 6 and 4"),
        (lambda: FlowMixer(6, heads=4), "FlowMixer: d_model must be a multiple of heads, got 6 and 4"),
        (lambda: DFNLayer(6, sigma=0.0), "DFNLayer: sigma must be positive and finite, got 0.0"),
        (lambda: FlowLayer(3, 4, 2, rank=0), "rank must be at least 1, got 0"),
        (lambda: FlowLayer(3, 4, 2, top_k=3), "top_k must be at most 2, got 3"),
        (lambda: FlowLayer(3, 4, 2, density=1.5), "density must be above 0 and at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def encoder(causal, layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True, **options)
    layer.self_attn = FlowMixer(12, 3, k=4, causal=causal)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def by_hand(module, x, padding=None):
    for layer in module.layers:

        def feed(y, layer=layer):
            return layer.linear2(layer.activation(layer.linear1(y)))

        if layer.norm_first:
            x = x + layer.self_attn(layer.norm1(x), padding)
            x = x + feed(layer.norm2(x))
        else:
            x = layer.norm1(x + layer.self_attn(x, padding))
            x = layer.norm2(x + feed(x))
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_in_place_of_self_attention(causal, norm_first, training):
    module, x = encoder(causal, norm_first=norm_first).train(training), torch.randn(2, 9, 12, requires_grad=True)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (None, padding):
            got = module(x, mask=mask, src_key_padding_mask=given)
            torch.testing.assert_close(got, by_hand(module, x, given))
            if causal:
                bools = torch.ones(9, 9, dtype=torch.bool).triu(1)
                torch.testing.assert_close(module.layers[0](x, bools, given), module.layers[0](x, mask, given))
                assert torch.equal(module(x, mask=mask, is_causal=True, src_key_padding_mask=given), got)
    if training:
        got.sum().backward()
        missing = {n for n, p in module.named_parameters() if p.requires_grad and p.grad is None}
        assert not missing and x.grad.isfinite().all()


def test_no_later_row_and_no_padding_reaches_an_output():
    module, x = encoder(True).eval(), torch.randn(1, 9, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.arange(9)[None] >= 7
    changed, filled = x.clone(), x.clone()
    changed[:, 5:] += 1
    filled[:, 7:] = 1e3
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(module(x, mask=mask)[:, :5], module(changed, mask=mask)[:, :5])
        found = [module(y, mask=mask, src_key_padding_mask=padding)[:, :7] for y in (x, filled)]
        assert torch.equal(*found)


def test_a_mask_that_it_cannot_keep_is_refused():
    x, causal = torch.randn(2, 5, 12), nn.Transformer.generate_square_subsequent_mask(5)
    mixer, other = FlowMixer(12, 3, k=4), torch.zeros(5, 5)
    assert mixer(x, x, x)[1] is None and torch.equal(mixer(x, x, x, attn_mask=causal)[0], mixer(x))
    for call, message in (
        (lambda: mixer(x, x, x.clone()), "key and value must be the query"),
        (lambda: mixer(x, x, x, need_weights=True), "need_weights must be False"),
        (lambda: mixer(x, x, x, attn_mask=other), r"attn_mask must be causal, \[N, N\] with N = 5, got \[5, 5\]"),
        (lambda: mixer(x, x, x, attn_mask=causal + torch.eye(5)), "attn_mask must be causal"),
        (lambda: mixer(x, x, x, attn_mask=causal[:4, :4]), r"got \[4, 4\]"),
        (lambda: FlowMixer(12, 3, causal=False)(x, attn_mask=causal), "attn_mask must be None with causal=False"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    names = inspect.signature(nn.MultiheadAttention.forward).parameters
    assert set(names) == set(inspect.signature(FlowMixer.forward).parameters) - {"ptr"}  # keyword only, ours
