import copy
import math

import pytest
import torch
from helpers import INTERPRETED
from torch import nn

import dfn_kernels
from dfn.flownetwork import AdaptiveFlowRouter, FlowLayer, FlowMetrics, FlowNetwork
from flownetwork import benchmark_flow_network, create_dummy_data, train_flow_network

pytestmark = pytest.mark.skipif(INTERPRETED, reason="models are tested on compiled kernels")


def small(**changes):
    return FlowNetwork(**{**dict(vocab_size=37, d_model=24, num_layers=3, num_patterns=5, max_seq_len=19), **changes})


@pytest.mark.parametrize("options", [dict(), dict(rank=3), dict(top_k=2)])
def test_router_mixes_as_published(options):
    """route(x) is what the materialised matrix gives."""
    router = AdaptiveFlowRouter(11, 7, 5, **options).double()
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    w = router.weights(x).double()
    patterns = router.patterns
    if options.get("top_k"):
        w = w * (w >= w.topk(2, -1).values[..., -1:])
    want = torch.einsum("btp,poi,bti->bto", w, patterns, x)
    torch.testing.assert_close(router.route(x)[0], want, rtol=1e-6, atol=1e-6)
    if not options.get("top_k"):
        matrix, metrics = router(x)
        assert matrix.shape == (2, 3, 7, 11)
        torch.testing.assert_close(torch.einsum("btoi,bti->bto", matrix, x), want, rtol=1e-6, atol=1e-6)
        assert 0 <= metrics.entropy <= math.log2(5)


def test_layer_is_norm_of_route_plus_bias():
    layer = FlowLayer(11, 7, 5)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 11)
    y, _ = layer(x)
    want = nn.functional.layer_norm(layer.router.route(x)[0] + layer.bias, (7,))
    torch.testing.assert_close(y, want)


def test_metrics():
    certain = FlowMetrics.of(torch.eye(4)[torch.tensor([0, 0, 1, 1])])
    assert certain.entropy == 0 and certain.usage.tolist() == [0.5, 0.5, 0, 0] and certain.usage_entropy == 1
    even = FlowMetrics.of(torch.full((2, 3, 8), 1 / 8))
    assert even.entropy == 3 and even.usage_entropy == 3 and even.active == 1
    assert even.summary() == {"entropy": 3, "usage_entropy": 3, "max_entropy": 3, "active": 1}


def test_published_sizes():
    """The page's counts: 6.0M parameters and 22.9 MB for compact; its other arguments give 62.9M."""
    compact = FlowNetwork.from_preset("compact")
    assert compact.num_parameters() == pytest.approx(6.0e6, rel=0.01)
    assert round(compact.size_mb(), 1) == 22.9
    assert compact.parameter_reduction()["reduction"] >= 0.991
    with torch.device("meta"):
        assert FlowNetwork(vocab_size=10000, d_model=512, num_layers=6).num_parameters() == pytest.approx(
            62.9e6, rel=0.001
        )
        for preset in ("edge", "base", "large"):
            assert FlowNetwork.from_preset(preset).num_parameters() > 0
    with pytest.raises(ValueError, match="preset must be one of edge, base, large, compact, got 'huge'"):
        FlowNetwork.from_preset("huge")


@pytest.mark.parametrize(
    "options", [dict(), dict(rank=2, tie_output=True), dict(top_k=2), dict(density=0.1), dict(mixer="flow_attention")]
)
def test_network(options):
    model = small(**options)
    ids = torch.randint(37, (2, 13))
    logits, metrics = model(ids)
    assert logits.shape == (2, 13, 37) and len(metrics) == 5
    summary = metrics.summary()
    assert 0 < summary["entropy"] <= math.log2(5) + 1e-6 and 0 < summary["gate"] < 1
    if options.get("top_k"):
        assert summary["active"] == pytest.approx(2 / 5)
    nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, f"no gradient reaches {silent}"
    twin = small(**options)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids)[0], model(ids)[0])
    assert torch.equal(copy.deepcopy(model)(ids)[0], model(ids)[0])


@pytest.mark.parametrize("mixer", ["none", "flow_attention"])
def test_causal_to_the_bit(mixer):
    model = small(mixer=mixer).eval()
    ids = torch.randint(37, (1, 19))
    later = ids.clone()
    later[0, 11:] = (later[0, 11:] + 5) % 37
    with torch.no_grad():
        assert torch.equal(model(ids)[0][:, :11], model(later)[0][:, :11])
        earlier = ids.clone()
        earlier[0, 3] = (ids[0, 3] + 1) % 37
        moved = (model(ids)[0] != model(earlier)[0]).any(-1)[0]
    assert moved[3] and not moved[:3].any()
    assert moved[4:].any() == (mixer == "flow_attention"), "as published, nothing crosses positions"


def test_training_and_benchmark(capsys):
    data = create_dummy_data(37, 13, 4, 3)
    assert len(data) == 3 and data[0][0].shape == (4, 13) and data[0][0].dtype == torch.int64
    assert torch.equal(data[0][0][:, 1:], data[0][1][:, :-1])
    model = small()
    history = train_flow_network(model, data, num_epochs=8, progress=False)
    assert set(history) == {"loss", "pattern_entropy", "tokens_per_second"} and len(history["loss"]) == 8
    assert history["loss"][-1] < history["loss"][0] and min(history["tokens_per_second"]) > 0
    with torch.no_grad():
        model.gate.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan in epoch 1, batch 1"):
        train_flow_network(model, data, num_epochs=1, progress=False)

    results = benchmark_flow_network(vocab_size=37, d_model=16, num_layers=2, batch_size=2, seq_len=7, lengths=(5, 9))
    assert results["flow_network"]["inference tokens/s"] > 0 and results["transformer"]["parameters"] > 0
    assert "page (claim)" in capsys.readouterr().out


def test_bfloat16_autocast_and_compile():
    model = small()
    ids = torch.randint(37, (2, 13))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids)[0]
    full = model(ids)[0]
    assert (half.float() - full).norm() / full.norm() < 0.05
    compiled = torch.compile(lambda x: model(x)[0], fullgraph=True)
    torch.testing.assert_close(compiled(ids), full, rtol=1e-4, atol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="mixer must be 'none' or 'flow_attention', got 'lstm'"):
        small(mixer="lstm")
    with pytest.raises(ValueError, match="N at most 19, got"):
        small()(torch.zeros(1, 20, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids must be int64, got torch.float32"):
        small()(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="top_k and density need full-rank patterns"):
        small(rank=2, top_k=1)


def test_backend_choice_reaches_the_model():
    model, ids = small(), torch.randint(37, (1, 5))
    with dfn_kernels.use_backend("reference"):
        want = model(ids)[0]
    torch.testing.assert_close(model(ids)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [dict(), dict(rank=3, tie_output=True)])
def test_the_pages_quantize_dynamic_reaches_the_patterns(options):
    import io

    import torch.quantization as quant

    model = small(vocab_size=41, d_model=64, **options).eval()
    quantised = quant.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert all(layer.router.quantized and not layer_before.router.quantized
               for layer, layer_before in zip(quantised.layers, model.layers, strict=True))  # fmt: skip
    ids = torch.randint(41, (2, 19))
    with torch.inference_mode():
        exact, near = model(ids)[0], quantised(ids)[0]
    assert (near - exact).norm() / exact.norm() < 0.1

    def size(module):
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        return buffer.tell()

    wide = FlowLayer(256, 256, 8)
    assert size(wide) / size(quant.quantize_dynamic(wide, {nn.Linear}, dtype=torch.qint8)) > 3.9


def test_density_falls_during_training():
    model, seen = small(), []
    model.layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.router.density))
    train_flow_network(model, create_dummy_data(37, 7, 2, 4), num_epochs=2, final_density=0.1, progress=False)
    assert seen == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1, 0.1])
    assert model.layers[0].router.density == pytest.approx(0.1)
    _, metrics = model(torch.randint(37, (2, 13)))
    assert metrics.summary()["active"] < 0.3


def test_plot(tmp_path):
    _, metrics = small()(torch.randint(37, (2, 13)))
    metrics.plot(tmp_path / "patterns.png")
    assert (tmp_path / "patterns.png").stat().st_size > 10_000
