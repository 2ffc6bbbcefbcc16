"""An op is reached by two routes: straight to its launcher in eager mode, and as the registered op where somebody looks
on. Both give the same bits, forward and backward; and each is taken where it should be."""

import copy
from unittest import mock

import pytest
import torch
from every_op import CASES, OPS, PARAMETERS, assert_same, rand, run
from helpers import DEVICE, INTERPRETED, backends, same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import dfn_kernels as dk
from dfn_kernels import _transforms

OURS = [case for case in CASES if case.values[1] != "reference"]
natively = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")


class Seen(TorchDispatchMode):
    """The registered ops that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dfn":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def forbidden(*args, **kwargs):
    raise AssertionError("the registered op was called")


@pytest.fixture
def no_registered_op(monkeypatch):
    """Whoever calls a registered op in this test fails; so does a backward pass."""
    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", forbidden)


def test_the_guard_bites(no_registered_op):
    if not OURS:
        pytest.skip("no backend of ours")
    op, backend = OURS[0].values
    with mock.patch.object(_transforms, "_is_plain", return_value=False), pytest.raises(AssertionError, match="called"):
        run(op, backend, op.make(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, backend", OURS)
def test_both_routes_have_the_same_bits(op, backend, dtype):
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("minutes in the interpreter")
    inputs = op.make(dtype)
    straight = run(op, backend, inputs)
    with mock.patch.object(_transforms, "_is_plain", return_value=False):
        registered = run(op, backend, inputs)
    assert_same(straight, registered)
    assert any(x.abs().sum() > 0 for x in straight[1:])


@pytest.mark.parametrize("op, backend", OURS)
def test_eager_calls_go_straight(op, backend, no_registered_op):
    run(op, backend, op.make(torch.float32))
    with torch.no_grad(), dk.use_backend(backend):
        op.call(**op.make(torch.float32))


@natively
@pytest.mark.parametrize("op, backend", OURS)
def test_without_gradients_nothing_is_recorded(op, backend):
    inputs = op.make(torch.float32)
    with dk.use_backend(backend):
        plain = op.call(**inputs)
        wanted = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        with torch.no_grad():
            silent = op.call(**wanted)
        recorded = op.call(**wanted)
        with torch.inference_mode():
            inferred = op.call(**inputs)
        inside = op.call(**wanted)  # nothing made in inference mode is left for a call that records
    assert not plain.requires_grad and not silent.requires_grad and recorded.requires_grad
    assert inferred.is_inference() and not recorded.is_inference()
    for other in (silent, recorded.detach(), inferred, inside.detach()):
        assert same_bits(plain, other)
    inside.sum().backward()


@natively
@pytest.mark.parametrize("op, backend", OURS)
def test_who_looks_on_sees_the_registered_op(op, backend):
    inputs = op.make(torch.float32)
    with dk.use_backend(backend):
        want = op.call(**inputs)
        with Seen() as seen:
            got = op.call(**inputs)
        traced = make_fx(lambda x: op.call(**x))(inputs)
        with FakeTensorMode() as fake:
            shaped = op.call(**{n: fake.from_tensor(x) for n, x in inputs.items()})
    assert same_bits(got, want) and seen.names and all(name.startswith("dfn::") for name in seen.names)
    assert any(str(node.target).startswith("dfn.") for node in traced.graph.nodes)
    assert same_bits(traced(inputs), want)
    assert shaped.shape == want.shape and shaped.dtype == want.dtype


class Logged(torch.Tensor):
    """A subclass whose arithmetic is somebody else's business."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype,
                                                   device=inner.device, requires_grad=inner.requires_grad)  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func._schema.name)

        def bare(x):
            return x.inner if isinstance(x, cls) else x

        args, kwargs = tree_map(bare, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, out)


@natively
@pytest.mark.parametrize("op, backend", OURS)
def test_subclasses_of_tensor_see_the_registered_op(op, backend):
    inputs = op.make(torch.float32)
    Logged.seen.clear()
    with dk.use_backend(backend):
        want = op.call(**inputs)
        got = op.call(**{n: Logged(x) for n, x in inputs.items()})
    assert type(got) is Logged and same_bits(got.inner, want)
    assert any(name.startswith("dfn::") for name in Logged.seen)


@natively
@pytest.mark.parametrize("op, backend", OURS)
def test_autocast_on_both_routes(op, backend):
    inputs = op.make(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        straight = run(op, backend, inputs)
        with mock.patch.object(_transforms, "_is_plain", return_value=False):
            registered = run(op, backend, inputs)
    assert_same(straight, registered)


@natively
@pytest.mark.parametrize("op, backend", OURS)
def test_hooks_and_saved_tensors(op, backend):
    """Each saved tensor is packed and unpacked once; hooks on the output see its gradient; and in-place changes of the
    output, or of what was saved, are noticed as anywhere else."""
    inputs = {n: x.requires_grad_(x.is_floating_point()) for n, x in op.make(torch.float32).items()}
    wanted = [x for x in inputs.values() if x.requires_grad]
    packed, unpacked, seen = [], [], []

    def pack(x):
        packed.append(x)
        return len(packed) - 1

    def unpack(number):
        unpacked.append(number)
        return packed[number]

    with dk.use_backend(backend):
        plain = op.call(**inputs)
        want = torch.autograd.grad(plain.square().sum(), wanted)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = op.call(**inputs)
        out.register_hook(lambda g: seen.append(g.clone()))
        got = torch.autograd.grad(out.square().sum(), wanted)
        again = op.call(**inputs)
        doubled = torch.autograd.grad(again.mul_(2).sum(), wanted)
        halves = torch.autograd.grad(op.call(**inputs).sum(), wanted)
        late = op.call(**inputs)
    assert_same(list(want), list(got))
    assert_same([2 * x for x in halves], list(doubled))
    assert packed and sorted(unpacked) == sorted(set(unpacked)) and len(seen) == 1
    with torch.no_grad():
        wanted[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.sum().backward()


@natively
@pytest.mark.parametrize("op, backend", OURS)
def test_some_gradients_only(op, backend):
    inputs = op.make(torch.float64)
    floats = [n for n, x in inputs.items() if x.is_floating_point()]
    want = dict(zip(floats, run(op, backend, inputs)[1:], strict=True))
    weight = None
    for name in floats:
        mine = {n: x.clone().requires_grad_(n == name) for n, x in inputs.items()}
        with dk.use_backend(backend):
            out = op.call(**mine)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
        (got,) = torch.autograd.grad(out, mine[name], weight)
        torch.testing.assert_close(got, want[name], rtol=1e-12, atol=1e-14)


@natively
@pytest.mark.parametrize("name", [op.name for op in OPS if backends(op.name) and op.name != "low_rank_route"])
def test_second_derivatives_say_what_is_missing(name):
    op = next(op for op in OPS if op.name == name)
    inputs = {n: x.requires_grad_(x.is_floating_point()) for n, x in op.make(torch.float64).items()}
    wanted = [x for x in inputs.values() if x.requires_grad]
    grads = torch.autograd.grad(op.call(**inputs).square().sum(), wanted, create_graph=True)
    if name in ("knn", "gaussian_gather"):  # these have one
        torch.autograd.grad(grads[0].square().sum(), wanted)
        return
    with pytest.raises(RuntimeError, match=r"dfn::\w+_backward: the second derivative is not implemented; use_backend"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)


@natively
def test_modules_with_parameters_go_straight(no_registered_op):
    weight, bias = nn.Parameter(rand(2, 7)), nn.Parameter(rand(2))
    states, positions = rand(3, 11, 7), rand(3, 11, 2)
    out = dk.flow_drift(states, positions, weight, bias)
    (out.positions.sum() + out.energy.sum()).backward()
    assert weight.grad.abs().sum() > 0 and bias.grad.abs().sum() > 0
    assert set(PARAMETERS) >= {"weight", "bias"}


# ---- numbers that become tensors ------------------------------------------------------------------------------------
def test_a_number_is_filled_in_once(monkeypatch):
    monkeypatch.setattr(_transforms, "_constants", {})
    like = rand(2)
    first = _transforms.per_head(0.25, 3, like, torch.float32)
    assert first.tolist() == [0.25] * 3 and _transforms.per_head(0.25, 3, like, torch.float32) is first
    wide = _transforms.per_head(0.1, 3, like, torch.float64)
    assert wide.dtype == torch.float64 and wide[0].item() == 0.1
    assert _transforms.per_head(0.25, 1, like, torch.float32).shape == (1,)
    with torch.inference_mode():
        assert not _transforms.per_head(0.75, 3, like, torch.float32).is_inference()
    monkeypatch.setattr(_transforms, "MOST_CONSTANTS", len(_transforms._constants))
    assert _transforms.per_head(0.5, 3, like, torch.float32).tolist() == [0.5] * 3
    assert _transforms.per_head(0.5, 3, like, torch.float32) is not _transforms.per_head(0.5, 3, like, torch.float32)
    with FakeTensorMode() as fake:
        faked = _transforms.per_head(0.25, 3, fake.from_tensor(like), torch.float32)
    assert type(faked) is not torch.Tensor
    assert copy.deepcopy(first).tolist() == [0.25] * 3
