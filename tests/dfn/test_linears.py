"""Linear layers that were replaced, parametrised, pruned, hooked or quantised: the models call them."""

import copy

import pytest
import torch
from helpers import DEVICE, INTERPRETED, unlike_at_the_start
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune

from dfn.fields.sampler import Entities
from dfn.flownetwork import FlowLayer, FlowNetwork
from dfn.models import Decoder, DFNBlock, DFNClassifier, DFNLanguageModel, DFNLayer, EntityPositions, FlowMixer
from dfn.models.linears import is_plain, operands

pytestmark = [
    pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="models are tested on compiled kernels, int8 on the CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
DIM = 24
# 8 bits move the result of a layer by about a percent: weights, even between -m and m, are rounded in steps of m / 127,
# activations in steps of 8 / 255 of their deviation. No path through the models here has ten layers.
INT8 = 0.1


class LoRA(nn.Module):
    """``W x + b + U (V x)``, of which U and V are trained."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Squared(nn.Module):
    def forward(self, weight):
        return weight * weight.abs().sqrt()


def parametrised(linear):
    return parametrize.register_parametrization(linear, "weight", Squared())


def hooked(linear):
    linear.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return linear


def hooked_before(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))
    return linear


def patched(linear):
    forward = linear.forward
    linear.forward = lambda x: forward(1.5 * x)
    return linear


CHANGES = {
    "LoRA": LoRA,
    "parametrize": parametrised,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "pruning": lambda linear: prune.random_unstructured(linear, "weight", 0.4),
    "hook": hooked,
    "hook before": hooked_before,
    "another forward": patched,
}


def flow_network(**options):
    return FlowNetwork(31, DIM, 2, num_patterns=3, max_seq_len=11, **options)


MODELS = {
    "layer": (lambda: DFNLayer(DIM, k=4, pos_dim=2), lambda: (torch.randn(2, 11, DIM), torch.randn(2, 11, 2))),
    "block": (lambda: DFNBlock(DIM, k=4), lambda: (torch.randn(2, 11, DIM), torch.randn(2, 4, 11, 3))),
    "mixer": (lambda: FlowMixer(DIM, k=4), lambda: (torch.randn(2, 11, DIM),)),
    "language": (
        lambda: unlike_at_the_start(DFNLanguageModel(31, DIM, 2, k=4, memory_size=5)),
        lambda: (torch.randint(31, (2, 11)), DFNLanguageModel(31, DIM, 1, memory_size=5)(torch.randint(31, (2, 9)))[1]),
    ),
    **{
        f"flow network {options}": (lambda o=options: flow_network(**o), lambda: (torch.randint(31, (2, 11)),))
        for options in (
            {}, dict(top_k=2), dict(block_density=0.5), dict(rank=2, tie_output=True), dict(mixer="flow_attention"),
        )
    },
}  # fmt: skip


def linears(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def changed(model, change):
    model = copy.deepcopy(model)
    for name in linears(model):
        model.set_submodule(name, change(model.get_submodule(name)).double())
    return model


def twin(model, other):
    """`model`, its linear layers plain, with the weights that those of `other` amount to."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in linears(model):
            linear, meant = model.get_submodule(name), other.get_submodule(name)
            bias = meant(torch.zeros(linear.in_features, dtype=torch.float64))
            linear.weight.copy_((meant(torch.eye(linear.in_features, dtype=torch.float64)) - bias).T)
            if linear.bias is not None:
                linear.bias.copy_(bias)
    return model


def first(output):
    return output if torch.is_tensor(output) else output[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_linear_layer_is_called(kind, change):
    make, inputs = MODELS[kind]
    model = make().double()
    inputs = tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs())
    other = changed(model, CHANGES[change])
    trained = {
        f"{name}.{n}": p
        for name in linears(model)
        for n, p in other.get_submodule(name).named_parameters()
        if p.requires_grad
    }
    for _ in range(2):  # what was computed before a step of training counts no more after it
        other.zero_grad()
        plain = twin(model, other)
        got, want = first(other(*inputs)), first(plain(*inputs))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        got.sin().sum().backward()
        want.sin().sum().backward()
        for name, p in other.named_parameters():
            if name in trained:
                assert p.grad is not None and p.grad.abs().sum() > 0, name
            elif p.requires_grad:
                torch.testing.assert_close(p.grad, plain.get_parameter(name).grad, rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            for p in trained.values():
                p.mul_(0.8)
    assert (got - first(model(*inputs))).abs().max() > 1e-3, "the change changes nothing"


def test_a_plain_layer_stays_one_product():
    linear, x = nn.Linear(3, 5), torch.randn(2, 3)
    other = nn.Linear(3, 7, bias=False)
    states, weights, biases = operands(x, linear, other)
    assert is_plain(linear) and states is x
    assert weights[0] is linear.weight and weights[1] is other.weight and biases == [linear.bias, None]
    for change in CHANGES.values():
        assert not is_plain(change(nn.Linear(3, 5)))
    seen = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_plain(linear)
    seen.remove()
    assert is_plain(linear)


def test_a_hook_sees_what_it_is_for():
    block, x, p = DFNBlock(DIM, k=4), torch.randn(2, 11, DIM), torch.randn(2, 4, 11, 3)
    calls = []
    for name in linears(block):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    block(x, p)
    assert sorted(calls) == sorted(linears(block))


@pytest.mark.parametrize("options", [dict(), dict(rank=2)], ids=str)
def test_the_patterns_see_the_tokens(options):
    """Not the unit vectors, by which a layer's matrix can be had, too: observers look at what a layer takes."""
    layer, x, seen = FlowLayer(DIM, 7, 3, **options), torch.randn(2, 11, DIM), []
    plain, told = layer(x)
    layer.router.get_submodule("down" if options else "bank").register_forward_hook(
        lambda m, inputs, y: seen.extend(inputs)
    )
    watched, told_too = layer(x)
    assert len(seen) == 1 and torch.equal(seen[0], x)
    torch.testing.assert_close(watched, plain)
    assert torch.equal(told.weights, told_too.weights)
    with torch.autocast(DEVICE, torch.bfloat16):
        half = layer(x)[0]
    assert half.dtype == torch.bfloat16 and relative(half, plain) < 4 * 2**-8  # states, patterns, results, LayerNorm


def test_density_looks_at_what_the_patterns_amount_to():
    """Within what one of the kept connections weighs: the last one is at the threshold, and rounding decides on it."""
    router, x = FlowLayer(DIM, 7, 3, density=0.4).router.double(), torch.randn(30, DIM, dtype=torch.float64)
    other = adapted(copy.deepcopy(router)).double()
    got, want = other.route(x)[0], twin(router, other).route(x)[0]
    assert relative(got, want) < 0.05 < 0.2 < relative(got, router.route(x)[0])
    got.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in other.bank.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [dict(), dict(rank=2)], ids=str)
def test_a_routers_mixed_matrices_are_those_of_its_layers(options):
    router, x = adapted(FlowLayer(DIM, 7, 3, **options).router), torch.randn(5, DIM)
    matrices, _ = router(x)
    torch.testing.assert_close(torch.einsum("toi,ti->to", matrices, x), router.route(x)[0], rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_that_of_its_embedding():
    model, ids = flow_network(rank=2, tie_output=True), torch.randint(31, (2, 11))
    plain = model(ids)[0]
    other = copy.deepcopy(model)
    other.embedding.register_forward_hook(lambda module, inputs, rows: 2 * rows)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.embedding.weight.mul_(2)
    assert (other(ids)[0] - plain).abs().max() > 0.1
    torch.testing.assert_close(other(ids)[0], doubled(ids)[0])
    torch.testing.assert_close(other.loss(ids, ids)[0], doubled.loss(ids, ids)[0])


def test_positions_keep_full_precision():
    places, x = EntityPositions(DIM), torch.randn(2, 300, DIM)
    exact = places(x)
    zero = LoRA(places.place)
    nn.init.zeros_(zero.up.weight)
    places.place = zero
    with torch.autocast(DEVICE, torch.bfloat16):
        got = places(x)
        assert places(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    assert places.bfloat16()(x.bfloat16()).dtype == torch.float32


def test_compiles_with_adapters():
    mixer = adapted(FlowMixer(DIM, k=4))
    x = torch.randn(2, 11, DIM)
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), mixer(x))


def adapted(model):
    for name in linears(model):
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    return model


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def decoding_error(model):
    """How far one token at a time is from a full pass."""
    ids = torch.randint(31, (2, 13))
    decoder = Decoder(model, capacity=13)
    with torch.no_grad():
        decoder(ids[:, :5])
        steps = torch.stack([decoder(ids[:, i : i + 1]) for i in range(5, 13)], 1)
        return relative(steps, model(ids)[0][:, 5:])


def test_decoder():
    assert decoding_error(adapted(DFNLanguageModel(31, DIM, 2, k=4))) < 1e-5
    assert decoding_error(quantize_dynamic(DFNLanguageModel(31, DIM, 2, k=4))) < INT8


def check_int8(quantised):
    """`quantised`, which gives a copy of a model in int8, held against the model."""
    x = torch.randn(2, 50, 128)
    for model, inputs in (
        (FlowMixer(128), (x,)),
        (DFNBlock(128), (x, torch.randn(2, 4, 50, 3))),
        (DFNLayer(128, pos_dim=3), (x, torch.randn(2, 50, 3))),
    ):
        error = relative(first(quantised(model)(*inputs)), first(model(*inputs)))
        assert 0 < error < INT8, f"{type(model).__name__}: {error}"
    model, ids = DFNLanguageModel(memory_size=64), torch.randint(256, (2, 2, 50))
    with torch.no_grad():
        _, memory = model(ids[0])
        error = relative(quantised(model)(ids[1], memory)[0], model(ids[1], memory)[0])
        assert 0 < error < INT8, error
        classifier, field = DFNClassifier(9, 5, 128), torch.rand(2, 40, 2)
        entities = Entities(field, torch.randn(2, 40, 9), torch.ones(2, 40))
        error = relative(quantised(classifier)(entities), classifier(entities))
        assert 0 < error < INT8, error


def test_quantize_dynamic():
    assert not linears(quantize_dynamic(DFNLanguageModel())), "some layers are not quantised"
    check_int8(quantize_dynamic)


@pytest.mark.parametrize("options", [dict(), dict(rank=2, tie_output=True)], ids=str)
def test_quantize_dynamic_of_a_flow_network_with_adapters(options):
    """The layers inside the adapters are in int8, and called: nothing is repacked for our kernels."""
    model, ids = adapted(flow_network(**options)), torch.randint(31, (2, 11))
    quantised = quantize_dynamic(model)
    assert not linears(quantised) and all(layer.router.int8 is None for layer in quantised.layers)
    assert 0 < relative(quantised(ids)[0], model(ids)[0]) < INT8


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config):
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)

    def quantised(model):
        model = copy.deepcopy(model)
        torchao.quantize_(model, getattr(torchao, config)())
        return model

    check_int8(quantised)
