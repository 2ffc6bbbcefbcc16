import copy
import math

import pytest
import torch
from helpers import INTERPRETED, check_compiled_module
from torch import nn

import dfn_kernels
from dfn.flownetwork import AdaptiveFlowRouter, FlowLayer, FlowNetwork
from dfn.flownetwork.metrics import FlowMetrics
from dfn_kernels.pattern_route import spread_blocks

pytestmark = pytest.mark.skipif(INTERPRETED, reason="models are tested on compiled kernels")


def small(**changes):
    return FlowNetwork(**{**dict(vocab_size=37, d_model=24, num_layers=3, num_patterns=5, max_seq_len=19), **changes})


@pytest.mark.parametrize("options", [dict(), dict(rank=3), dict(top_k=2)])
def test_router_mixes_as_published(options):
    """route(x) is what the materialised matrix gives."""
    router = AdaptiveFlowRouter(11, 7, 5, **options).double()
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    w = router.weights(x)
    patterns = router.patterns
    if options.get("top_k"):
        w = w * (w >= w.topk(2, -1).values[..., -1:])
    want = torch.einsum("btp,poi,bti->bto", w, patterns, x)
    torch.testing.assert_close(router.route(x)[0], want)
    if not options.get("top_k"):
        matrix, metrics = router(x)
        assert matrix.shape == (2, 3, 7, 11)
        torch.testing.assert_close(torch.einsum("btoi,bti->bto", matrix, x), want)
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
    "options",
    [dict(), dict(rank=2, tie_output=True), dict(top_k=2), dict(density=0.1), dict(mixer="flow_attention"),
     dict(num_layers=12)],
)  # fmt: skip
def test_network(options):
    model = small(**options)
    ids = torch.randint(37, (2, 13))
    logits, metrics = model(ids)
    assert logits.shape == (2, 13, 37) and len(metrics) == 2 + options.get("num_layers", 3)
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


@pytest.mark.parametrize("options", [dict(), dict(rank=2, tie_output=True)])
def test_loss_is_cross_entropy_of_the_logits(options):
    model = small(**options).double()
    ids, targets = torch.randint(37, (2, 2, 13))
    loss, metrics = model.loss(ids, targets)
    want = nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, want)
    with torch.no_grad():  # logits come another way then
        torch.testing.assert_close(model(ids)[0], model.requires_grad_()(ids)[0])
    grads = [torch.autograd.grad(x, list(model.parameters())) for x in (model.loss(ids, targets)[0], want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_autocast_and_compile():
    model = small()
    ids = torch.randint(37, (2, 13))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids)[0]
    full = model(ids)[0]
    assert (half.float() - full).norm() / full.norm() < 0.05
    check_compiled_module(model, lambda outputs: outputs[0], ids)


@pytest.mark.parametrize("options", [dict(), dict(rank=2, tie_output=True), dict(block_density=0.5)])
def test_export(options, tmp_path):
    model, ids = small(**options).eval(), torch.randint(37, (2, 13))
    exported = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: torch.export.Dim("B", min=2, max=64)}})
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    ids = torch.randint(37, (3, 13))
    for ours, want in zip(again(ids), model(ids), strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(ours, want)
        else:
            assert ours.summary() == pytest.approx(want.summary())


@pytest.mark.parametrize("options", [dict(), dict(rank=2, tie_output=True), dict(block_density=0.1, d_model=192)])
def test_safetensors(options, tmp_path):
    from safetensors.torch import load_file, load_model, save_file, save_model

    model, ids = small(**options), torch.randint(37, (2, 13))
    save_model(model, tmp_path / "a.safetensors")
    save_file(model.state_dict(), tmp_path / "b.safetensors")  # a tied output is no second tensor
    twins = [small(**options) for _ in range(2)]
    load_model(twins[0], tmp_path / "a.safetensors")
    twins[1].load_state_dict(load_file(tmp_path / "b.safetensors"))
    for twin in twins:
        assert torch.equal(twin(ids)[0], model(ids)[0])
        assert twin(ids)[1].summary() == model(ids)[1].summary()


# ---- ten per cent of the connections --------------------------------------------------------------------------------
def mixed_share(router: AdaptiveFlowRouter, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of the mixed entries that y can be explained with: those of the largest magnitude, token by token."""
    matrix = router(x)[0].double().flatten(1)
    order = matrix.abs().argsort(1, descending=True)
    shares = []
    for t in range(len(x)):
        mask = torch.zeros_like(matrix[t])
        best = None
        for keep in torch.arange(0.05, 0.151, 0.0025).mul(matrix.shape[1]).long().tolist():
            mask[order[t, :keep]] = 1
            sparse = (matrix[t] * mask).view(router.output_dim, -1) @ x[t].double()
            error = (sparse - y[t]).norm().item()
            best = min(best or (error, keep), (error, keep))
        shares.append(best[1] / matrix.shape[1])
    return sum(shares) / len(shares)


def test_a_tenth_of_each_tokens_connections():
    router = AdaptiveFlowRouter(160, 220, 3, density=0.1)  # more entries than the threshold is calibrated on
    x = torch.randn(5, 160)
    y, metrics = router.route(x)
    assert metrics.active.item() == pytest.approx(0.1, abs=0.01)
    assert mixed_share(router, x, y) == pytest.approx(0.1, abs=0.01)
    _, metrics = small(density=0.1, d_model=64)(torch.randint(37, (2, 13)))
    assert all(layer.active.item() == pytest.approx(0.1, abs=0.01) for layer in metrics)


def test_a_tenth_of_the_blocks():
    layer = FlowLayer(640, 640, 2, block_density=0.1)
    router, x = layer.router, torch.randn(3, 640)
    y, metrics = layer(x)
    mask = spread_blocks(router.blocks, router.patterns)
    assert metrics.active.item() == pytest.approx(0.1) and mask.double().mean().item() == pytest.approx(0.1)
    layer(x)[0].pow(3).sum().backward()
    grad = router.bank.weight.grad.view_as(mask)
    assert grad[~mask].eq(0).all() and grad[mask].ne(0).all()
    with torch.no_grad():
        router.bank.weight[~mask.flatten(0, 1)] = float("nan")  # what does not count is not even read
        assert torch.equal(layer(x)[0], y)
    router.set_density(None)
    assert router.blocks is None and layer(x)[1].active == 1


@pytest.mark.parametrize("blocks", [False, True])
def test_set_density(blocks):
    model, ids = small(d_model=192), torch.randint(37, (2, 5))
    dense = model(ids)[0]
    model.set_density(0.25, blocks=blocks)
    logits, metrics = model(ids)
    assert not torch.equal(logits, dense) and metrics.summary()["active"] < 0.7
    model.set_density(1.0, blocks=blocks)
    torch.testing.assert_close(model(ids)[0], dense)
    model.set_density(None)
    assert torch.equal(model(ids)[0], dense)
    with pytest.raises(ValueError, match="density needs full-rank patterns, got rank 2"):
        small(rank=2).set_density(0.1, blocks=blocks)
    with pytest.raises(ValueError, match="density and block_density exclude each other"):
        small(density=0.1, block_density=0.1)


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


def test_plot(tmp_path):
    _, metrics = small()(torch.randint(37, (2, 13)))
    metrics.plot(tmp_path / "patterns.png")
    assert (tmp_path / "patterns.png").stat().st_size > 10_000
