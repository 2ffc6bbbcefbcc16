import copy
import io

import pytest
import torch
import torch.quantization as quant
from helpers import INTERPRETED, same_bits
from torch import nn

from dfn.flownetwork import FlowLayer, FlowNetwork
from dfn.models import DFNLanguageModel
from dfn_kernels import _native
from dfn_kernels.pattern_route import spread_blocks
from dfn_kernels.quantized_low_rank import QuantizedLowRank
from dfn_kernels.quantized_route import int8_rows

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="models are tested on compiled kernels"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
OPTIONS = [dict(), dict(top_k=2), dict(block_density=0.3, d_model=192), dict(rank=3, tie_output=True)]


def small(**changes):
    sizes = dict(vocab_size=41, d_model=64, num_layers=3, num_patterns=5, max_seq_len=19)
    return FlowNetwork(**{**sizes, **changes}).eval()


def quantise(model):
    """The page's call."""
    return quant.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_pages_call_reaches_the_patterns(options):
    model, ids = small(**options), torch.randint(41, (2, 19))
    quantised = quantise(model)
    assert all(layer.router.int8 is not None for layer in quantised.layers)
    assert all(layer.router.int8 is None for layer in model.layers), "the model itself stays as it was"
    with torch.inference_mode():
        (exact, told), (near, told_too) = model(ids), quantised(ids)
    if "top_k" not in options:  # where two weights are nearly equal, rounding decides which pattern is chosen
        assert (near - exact).norm() / exact.norm() < 0.1
    assert told_too.summary() == pytest.approx(told.summary(), rel=0.05)
    router, x = quantised.layers[1].router, torch.randn(7, model.embedding.embedding_dim)
    w = router.weights(x)
    if "top_k" in options:
        w = w.where(w >= w.topk(2, -1).values[:, 1:], 0)
    want = torch.einsum("tp,poi,ti->to", w, router.patterns, x)
    assert (router.route(x)[0] - want).norm() < 0.03 * want.norm()
    assert router(x)[0].shape == (7, router.output_dim, router.input_dim)  # for looking at


@pytest.mark.parametrize("options", OPTIONS)
def test_saves_loads_and_copies(options):
    model, ids = quantise(small(**options)), torch.randint(41, (2, 19))
    twin = quantise(small(**options))
    assert not torch.equal(twin(ids)[0], model(ids)[0])
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model), quantise(model)):  # a second time changes nothing
        assert torch.equal(other(ids)[0], model(ids)[0])


def test_the_language_model_is_quantised_too():
    torch.manual_seed(0)
    model, ids = DFNLanguageModel(41, 64, 2, 4, k=4, memory_size=5).eval(), torch.randint(41, (2, 19))
    ways = {"torch.ao": lambda m: quantise(m), **{f"torchao {n}": make for n, make in torchao_ways().items()}}
    for name, way in ways.items():
        small = way(copy.deepcopy(model))
        with torch.inference_mode():
            (exact, memory), (near, told) = model(ids), small(ids)
            near_again = small(ids, told)[0]
            assert (near - exact).norm() < 0.1 * exact.norm(), name
            assert (near_again - model(ids, memory)[0]).norm() < 0.1 * exact.norm(), name
            one = small.generate(ids[:, :7], 5, temperature=0)
        assert one.shape == (2, 12) and torch.equal(one[:, 7], small(ids[:, :7])[0][:, -1].argmax(-1)), name


def torchao_ways():
    """Its two int8 configurations, where it is installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return {}

    def way(config):
        return lambda model: quantize_(model, config()) or model

    return {c.__name__: way(c) for c in (Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig)}


@pytest.mark.parametrize("options", OPTIONS)
def test_torchao_reaches_the_patterns(options):
    """The same int8 values and scales in our kernels, whoever made them: by rows, symmetric."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model, ids = small(**options), torch.randint(41, (2, 19))
    for way in torchao_ways().values():
        quantised = way(copy.deepcopy(model))
        with torch.inference_mode():
            exact, near = model(ids)[0], quantised(ids)[0]
        assert all(layer.router.int8 is not None for layer in quantised.layers)
        assert not any("torchao" in type(p).__module__ for n, p in quantised.named_parameters() if "router" in n)
        if "top_k" not in options:
            assert (near - exact).norm() < 0.1 * exact.norm()
        assert torch.equal(copy.deepcopy(quantised)(ids)[0], quantised(ids)[0])


def test_hidden_layers_are_a_quarter_in_bytes():
    def in_file(module):
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        return buffer.tell()

    def in_memory(module):
        return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))

    # The published network's, and compact's: there the float32 scales, sums and norms weigh more, and 104 rows are
    # packed as 128.
    for layer, ratio in ((FlowLayer(512, 512, 8), 3.9), (FlowLayer(512, 512, 8, rank=12), 3.2)):
        for size in (in_file, in_memory):
            assert size(layer) / size(quantise(layer)) > ratio


def test_blocks_left_out_stay_out():
    layer = FlowLayer(192, 192, 3, block_density=0.3)
    router = quantise(layer).router
    assert router.patterns[~spread_blocks(router.blocks, router.patterns)].eq(0).all()


def test_what_cannot_be_quantised():
    with pytest.raises(TypeError, match="quantised weights must be qint8, got torch.float"):
        quant.quantize_dynamic(small(), {nn.Linear}, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="density is not available with quantised patterns"):
        quantise(small(density=0.1))(torch.randint(41, (2, 19)))
    per_channel = quant.quantize_dynamic(small(), {nn.Linear: quant.per_channel_dynamic_qconfig})
    assert per_channel.layers[0].router.int8 is not None


# ---- the low-rank router in one pass --------------------------------------------------------------------------------
def make(T=7, P=5, O=37, I=29, r=3):
    """A module and what it rounds: selector [P, I], its bias, down [P * r, I], up [O, P * r]."""
    parts = torch.randn(P, I) / I**0.5, torch.randn(P), torch.randn(P * r, I), torch.randn(O, P * r)
    selector, shift, down, up = parts
    return QuantizedLowRank(int8_rows(selector), shift, int8_rows(down), int8_rows(up)), parts, torch.randn(T, I)


def as_rounded(module, shift, x, bias):
    """The same arithmetic in float64."""

    def rounded(x):
        scale = x.abs().amax(1, keepdim=True) / 127
        return (x / scale.where(scale > 0, 1) + 0.5).floor() * scale

    P = len(shift)
    product = rounded(x.double()) @ module.down.dequantize()[0].double().T
    inner, w = product[:, :-P], (product[:, -P:] + shift).softmax(1)
    weighted = (inner.unflatten(1, (P, -1)) * w.unsqueeze(2)).flatten(1)
    return rounded(weighted) @ module.up.dequantize()[0].double().T + bias, w


@pytest.mark.parametrize(
    "sizes", [*(dict(T=T) for T in (0, 1, 2, 3, 8, 55, 57, 131)), dict(O=1), dict(I=1), dict(P=1), dict(r=1),
              dict(T=67, P=8, O=131, I=257, r=12)], ids=str,
)  # fmt: skip
def test_low_rank_is_the_rounded_product(sizes):
    module, (selector, shift, down, up), x = make(**sizes)
    bias = torch.randn(up.shape[0])
    y, w = module(x, bias)
    torch.testing.assert_close(w, (x @ selector.T + shift).softmax(1), rtol=0, atol=0.05)
    torch.testing.assert_close(module.factors()[1].flatten(0, 1), down, rtol=0, atol=down.abs().max().item() / 250)
    want, want_w = as_rounded(module, shift, x, bias)
    assert y.shape == want.shape and w.shape == want_w.shape
    for ours, exact in ((w, want_w), (y, want)):  # a value halfway between two integers may fall to either side
        assert (ours - exact).norm() <= 0.01 * exact.norm()


def test_low_rank_rows_do_not_depend_on_each_other():
    module, _, x = make(T=60)
    x[3, 4], x[57, 6] = float("nan"), float("inf")
    y, _ = module(x)
    good = [t for t in range(60) if t not in (3, 57)]
    assert not y[[3, 57]].isfinite().any() and y[good].isfinite().all()
    again = module(x[good])[0]
    assert same_bits(again, y[good])
    both = module(x[:12].view(3, 4, -1))
    assert both[0].shape[:2] == both[1].shape[:2] == (3, 4) and same_bits(both[0].flatten(0, 1)[:3], y[:3])


def test_low_rank_dtypes_fallback_and_bad_input(monkeypatch):
    module, _, x = make()
    y, w = module(x)
    assert module(x.bfloat16())[0].dtype == torch.bfloat16 and not y.requires_grad
    monkeypatch.setattr(_native, "CPU_MISSING", "not built")  # then x is not rounded
    exact, exact_w = module(x)
    assert (y - exact).norm() < 0.03 * exact.norm() and (w - exact_w).abs().max() < 0.03
    with pytest.raises(ValueError, match=r"^QuantizedLowRank: x must have shape \[..., I\] = \[7, 29\], got \[7, 28\]"):
        module(x[:, 1:])
    torch.library.opcheck(torch.ops.dfn.quantized_low_rank, (
        x, module.down.packed, module.down.scales, module.down.sums, module.selector_bias,
        module.up.packed, module.up.scales, module.up.sums, None,
    ))  # fmt: skip
