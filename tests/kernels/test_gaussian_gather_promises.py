"""What the op promises beside its values: same bits, second derivatives, torch.compile, autocast, memory."""

import importlib

import pytest
import torch
from helpers import DEVICE, backends, check_compiled, check_same_bits, same_bits
from test_gaussian_gather import make

import dfn_kernels
from dfn_kernels import GaussianGatherFunction, gather_plan, gaussian_gather

BACKENDS = backends("gaussian_gather")


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    check_same_bits(gaussian_gather, {**make(c=64), "normalize": True}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_function(backend):
    inputs = make(B=1, H=1, N=4, M=4, c=3, k=2, queries=False, influence=None)
    p = inputs["positions"]
    out = GaussianGatherFunction.apply(p, p, inputs["values"], inputs["indices"], inputs["sigma"], None, False, backend)
    with dfn_kernels.use_backend(backend):
        assert same_bits(out, gaussian_gather(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", ["one", "a query each"])
@pytest.mark.parametrize("normalize", [False, True])
def test_second_derivative(backend, pieces, normalize, monkeypatch):
    """Everything by everything."""
    inputs = make(B=1, H=2, N=5, M=3, D=2, c=3, k=4, dtype=torch.float64)
    indices = inputs.pop("indices")
    names = list(inputs)
    if pieces != "one":
        monkeypatch.setattr(importlib.import_module("dfn_kernels.gaussian_gather"), "MOST_ROWS", 1)

    def op(*values):
        return gaussian_gather(indices=indices, normalize=normalize, **dict(zip(names, values, strict=True)))

    with dfn_kernels.use_backend(backend):
        tensors = [inputs[name].requires_grad_() for name in names]
        assert torch.autograd.gradgradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_by_every_route(backend):
    """As forces and their training, Hessians and torch.func ask for it."""
    inputs = make(B=1, H=1, N=5, c=3, k=3, queries=False, dtype=torch.float64)
    positions = inputs.pop("positions")

    def loss(x):
        return gaussian_gather(positions=x, **inputs, normalize=True).square().sum()

    with dfn_kernels.use_backend("reference"):
        want = torch.autograd.functional.hessian(loss, positions)
    assert want.abs().sum() > 0
    size = positions.numel()
    with dfn_kernels.use_backend(backend):
        x = positions.clone().requires_grad_()
        (force,) = torch.autograd.grad(loss(x), x, create_graph=True)
        force.square().sum().backward()
        torch.testing.assert_close(x.grad.flatten(), 2 * want.view(size, size) @ force.detach().flatten())
        torch.testing.assert_close(torch.autograd.functional.hessian(loss, positions), want)
        torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(positions), want)
        v = torch.randn_like(positions)
        _, product = torch.autograd.functional.vhp(loss, positions, v)
        torch.testing.assert_close(product.flatten(), want.view(size, size) @ v.flatten())
        grad = torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(positions)
        torch.testing.assert_close(grad, product)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for normalize in (False, True):
        i = make(dtype=torch.float64 if normalize else torch.float32)
        floats = [x.requires_grad_() for x in (i["positions"], i["query_positions"], i["values"])]
        arguments = (
            *floats,
            i["indices"],
            i["sigma"].requires_grad_(),
            i["influence"].requires_grad_(),
            normalize,
            backend,
        )
        torch.library.opcheck(torch.ops.dfn.gaussian_gather, arguments)
        with dfn_kernels.use_backend(backend):
            plan = gather_plan(i["indices"], i["positions"], i["query_positions"])
        torch.library.opcheck(torch.ops.dfn.gaussian_gather, (*arguments, None, *plan[1:5]))
        torch.library.opcheck(torch.ops.dfn.spatial_order, (i["positions"].detach(), backend))
        torch.library.opcheck(torch.ops.dfn.transpose_neighbors, (i["indices"], *plan[1:3], backend))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
def test_compile(backend):
    def layer(x, positions, indices):
        plan = gather_plan(indices, positions)
        x = gaussian_gather(positions, x.tanh(), plan, 0.9)
        y = gaussian_gather(positions, x.tanh(), plan, 0.7, normalize=True)
        return y.transpose(1, 2).flatten(2).relu()

    def plain(x, positions, indices):
        x = gaussian_gather(positions, x.tanh(), indices, 0.9)
        y = gaussian_gather(positions, x.tanh(), indices, 0.7, normalize=True)
        return y.transpose(1, 2).flatten(2).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for N in (13, 29):
        i = make(N=N, queries=False)
        check_compiled(plain, compiled, [i[n] for n in ("values", "positions", "indices")], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    inputs = make()
    with dfn_kernels.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        out = gaussian_gather(**inputs)
    assert out.dtype == torch.bfloat16
    with dfn_kernels.use_backend(backend):
        assert same_bits(out, gaussian_gather(**{**inputs, "values": inputs["values"].bfloat16()}))


@pytest.mark.slow
@pytest.mark.skipif("native" not in BACKENDS, reason="what is measured is the resident set of the process")
@pytest.mark.parametrize("attention", [False, True], ids=["gather", "attention"])
def test_memory_grows_with_entities_and_edges_not_with_their_product(attention):
    """Forward and backward: O(N (c + k)). The reference, which builds [N, k, c], breaks the same bound."""
    from bench.timing import peak_growth_mib

    N, D, c, k = 50_021, 3, 96, 32
    positions = torch.rand(1, 1, N, D).requires_grad_()
    values = torch.randn(1, 1, N, c).requires_grad_()
    weight = torch.zeros(1, D, c)
    indices = dfn_kernels.knn(positions.detach(), k).indices
    grad = torch.randn(1, 1, N, c)

    def run():
        if attention:
            out = dfn_kernels.flow_attention(values[:, 0], positions, weight, values, 0.1, k)[0]
        else:
            out = gaussian_gather(positions, values, indices, 0.1)
        torch.autograd.grad(out, [positions, values], grad)

    torch.utils.deterministic.fill_uninitialized_memory = False  # it reads and writes copies of its own
    grown = peak_growth_mib(run, "cpu")
    if grown is None:
        pytest.skip("this system does not let a process reset its peak")
    # out, its sum of gradients, and some numbers for each edge and each entity
    bound = N * (4 * c * 4 + (60 if attention else 28) * k + 400) / 2**20
    assert grown < bound, f"{grown:.0f} MiB, expected at most {bound:.0f}"
    if not attention:
        with dfn_kernels.use_backend("reference"):
            assert peak_growth_mib(run, "cpu") > 2 * bound
