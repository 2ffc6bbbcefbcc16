"""What PyTorch users do to ops: vmap, torch.func, second derivatives, forward mode, export, checkpointing."""

import pytest
import torch
from every_op import CASES, PARAMETERS, Op, assert_same
from helpers import DEVICE, INTERPRETED, same_bits
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import dfn_kernels as dk

natively = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")


@pytest.mark.parametrize("op, backend", CASES)
def test_vmap(op, backend):
    inputs = op.make(torch.float32)
    dims = {n: None if n in PARAMETERS else 0 for n in inputs}
    with dk.use_backend(backend):
        want = torch.stack([op.call(**{n: x if dims[n] is None else x[i] for n, x in inputs.items()})
                            for i in range(3)])  # fmt: skip
        got = torch.vmap(lambda x: op.call(**x), in_dims=(dims,))(inputs)
        ensemble = torch.vmap(lambda x: op.call(**x), in_dims=({n: 0 for n in inputs},))(
            {n: x.expand(2, *x.shape) for n, x in inputs.items()}
        )
        whole = op.call(**inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ensemble, whole.expand(2, *whole.shape))


def test_vmap_of_field_sample():
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: dk.field_sample(x, 5)[0])(torch.rand(2, 1, 30))


@natively  # minutes in the interpreter
@pytest.mark.parametrize("op, backend", CASES)
def test_second_derivative_is_right_or_raises(op, backend):
    inputs = op.make(torch.float64)

    def second(backend):
        mine = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        wanted = [x for x in mine.values() if x.requires_grad]
        with dk.use_backend(backend):
            grads = torch.autograd.grad(op.call(**mine).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted, allow_unused=True)

    want = second("reference")
    assert any(x is not None and x.abs().sum() > 0 for x in want)
    try:
        got = second(backend)
    except RuntimeError as error:
        assert "backward" in str(error)
        return
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@natively
@pytest.mark.parametrize("op, backend", CASES)
def test_func_grad(op, backend):
    inputs = op.make(torch.float64)
    first = next(iter(inputs))

    def loss(x):
        return op.call(**{**inputs, first: x}).square().sum()

    with dk.use_backend("reference"):
        x = inputs[first].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(x), x)
    with dk.use_backend(backend):
        torch.testing.assert_close(torch.func.grad(loss)(inputs[first]), want)


@natively
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op, backend", CASES)
def test_gradients_per_sample(op, backend):
    shared = {n: x for n, x in op.make(torch.float64).items() if n in PARAMETERS}
    samples = {n: x for n, x in op.make(torch.float64).items() if n not in PARAMETERS}
    if not shared:
        pytest.skip("an op without parameters")

    def loss(shared, sample):
        return op.call(**shared, **sample).square().sum()

    def one(i):
        mine = {n: x.clone().requires_grad_() for n, x in shared.items()}
        grads = torch.autograd.grad(loss(mine, {n: x[i] for n, x in samples.items()}), list(mine.values()))
        return dict(zip(mine, grads, strict=True))

    with dk.use_backend(backend):
        got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(shared, samples)
        each = [one(i) for i in range(3)]
    for name in shared:
        torch.testing.assert_close(got[name], torch.stack([x[name] for x in each]))


@natively
@pytest.mark.parametrize("op, backend", CASES)
def test_forward_mode_is_right_or_raises(op, backend):
    inputs = op.make(torch.float64)
    first = next(iter(inputs))
    tangent = torch.randn_like(inputs[first])

    def call(x):
        with dk.use_backend(backend):
            return op.call(**{**inputs, first: x})

    if backend != "reference":  # a custom op alone would give a zero tangent without a word
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(call, (inputs[first],), (tangent,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            call(forward_ad.make_dual(inputs[first], tangent))
        return
    eps = 1e-6
    want = (call(inputs[first] + eps * tangent) - call(inputs[first] - eps * tangent)) / (2 * eps)
    _, got = torch.func.jvp(call, (inputs[first],), (tangent,))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


class Holder(nn.Module):
    """An op as a module: its parameters are parameters, the rest is input."""

    def __init__(self, op: Op, inputs: dict):
        super().__init__()
        self.call = op.call
        self.own = nn.ParameterDict({n: nn.Parameter(x.clone()) for n, x in inputs.items() if n in PARAMETERS})

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.call(**x, **self.own).tanh()


def held(op: Op) -> tuple[Holder, dict]:
    inputs = op.make(torch.float32)
    return Holder(op, inputs), {n: x for n, x in inputs.items() if n not in PARAMETERS}


@pytest.mark.parametrize("op, backend", [c for c in CASES if "triton" not in c.id or DEVICE != "cpu"])
def test_export(op, backend):
    module, x = held(op)
    with dk.use_backend(backend):
        program = torch.export.export(module, (x,))
        want = module(x)
    assert same_bits(program.module()(x), want)
    if backend != "reference":
        assert any("dfn." in str(node.target) for node in program.graph.nodes)


def longer(x: Tensor) -> Tensor:
    """Of [3, 11, ..]: one more in the batch and four more entities, made of those that are there."""
    return torch.cat([x, x[:1]])[:, torch.arange(15) % 11]


@pytest.mark.parametrize("op, backend", [c for c in CASES if "triton" not in c.id or DEVICE != "cpu"])
def test_export_with_any_batch_and_length(op, backend):
    module, x = held(op)
    batch, length = torch.export.Dim("B", min=2, max=64), torch.export.Dim("N", min=8, max=4096)
    more = {n: longer(t) for n, t in x.items()}
    with dk.use_backend(backend):
        program = torch.export.export(module, (x,), dynamic_shapes=({n: {0: batch, 1: length} for n in x},))
        want = module(more)
    assert same_bits(program.module()(more), want)


@pytest.mark.parametrize("op, backend", CASES)
def test_checkpointing(op, backend):
    module, x = held(op)
    x = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in x.items()}
    wanted = [*module.parameters(), *(t for t in x.values() if t.requires_grad)]
    results = []
    with dk.use_backend(backend):
        for wrap in (lambda x: module(x), lambda x: checkpoint(module, x, use_reentrant=False)):
            out = wrap(x)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
    assert_same(*results)
