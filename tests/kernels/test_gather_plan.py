"""Plans: orders and transposed lists that several gathers share."""

import pytest
import torch
from helpers import DEVICE, backends, check_against_reference, leaves, same_bits
from test_gaussian_gather import make, with_plan

import dfn_kernels
from dfn_kernels import gather_plan, gaussian_gather

BACKENDS = backends("gaussian_gather")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", ["own", "shared by heads"])
def test_plan_serves_several_calls(backend, neighbors, monkeypatch):
    """Two layers, one plan: what one call each gives. Hubs are cut into pieces, in Triton here small ones."""
    if backend == "triton":
        import dfn_kernels.triton.gather_plan as shared
        import dfn_kernels.triton.gaussian_gather_backward as kernels

        for module in (shared, kernels):
            monkeypatch.setattr(module, "HUB", 8)
    inputs = make(N=29, queries=False, k=4)
    inputs["indices"][..., 0] = 3
    if neighbors != "own":
        inputs["indices"] = inputs["indices"][:, :1].expand(2, 3, 29, 4)
    check_against_reference(with_plan, inputs, backend)
    with dfn_kernels.use_backend(backend):
        plan = gather_plan(inputs["indices"], inputs["positions"])
        for c in (3, 41):
            results = []
            for indices in (plan, inputs["indices"]):
                values = torch.linspace(0, 170, 2 * 3 * 29 * c, device=DEVICE).view(2, 3, 29, c)
                copies = leaves({**inputs, "values": values})
                out = gaussian_gather(**{**copies, "indices": indices})
                out.square().sum().backward()
                floats = [x for x in copies.values() if torch.is_tensor(x) and x.requires_grad]
                results.append([out.detach(), *(x.grad for x in floats)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 5])
def test_spatial_order(backend, D):
    """A permutation; on a lattice, queries that follow each other are near each other."""
    side = {1: 4096, 2: 64, 3: 16, 5: 4}[D]
    axes = torch.meshgrid(*[torch.arange(side, dtype=torch.float32)] * D, indexing="ij")
    lattice = torch.stack(axes, -1).view(1, 1, -1, D)[:, :, torch.randperm(side**D)].to(DEVICE)
    order = torch.ops.dfn.spatial_order(lattice, backend)
    assert order.dtype == torch.int32 and order.sort().values.flatten().tolist() == list(range(side**D))
    served = lattice[0, 0, order[0, 0].long()]
    mean_step = (served[1:] - served[:-1]).abs()[:, :3].sum(-1).mean().item()
    random_step = (lattice[0, 0, 1:] - lattice[0, 0, :-1]).abs()[:, :3].sum(-1).mean().item()
    assert mean_step < random_step / 4
    hostile = torch.tensor([float("nan"), float("inf"), 1e30, 0.0, -0.0] * 3, device=DEVICE).view(1, 1, 15, 1)
    for points in (hostile.expand(1, 1, 15, D), torch.ones(1, 1, 7, D, device=DEVICE)):
        order = torch.ops.dfn.spatial_order(points.contiguous(), backend)
        assert order.sort().values.flatten().tolist() == list(range(points.shape[2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_without_heads_and_batch(backend):
    inputs = make(B=1, H=1, sigma="float", influence=None)
    with dfn_kernels.use_backend(backend):
        want = with_plan(**inputs)
        for squeeze in (lambda x: x[:, 0], lambda x: x[0, 0]):
            got = with_plan(**{n: squeeze(x) if torch.is_tensor(x) else x for n, x in inputs.items()})
            assert same_bits(got, squeeze(want))


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ guards memory")
def test_a_plan_of_other_indices_does_no_harm():
    """Indices changed behind a plan's back: wrong numbers, but no crash and no read outside of memory."""
    inputs = make(N=3001, queries=False, k=7)
    plan = gather_plan(inputs["indices"], inputs["positions"])
    values = inputs.pop("values").requires_grad_()
    inputs["indices"].copy_(torch.randint(0, 3001, inputs["indices"].shape))
    gaussian_gather(**{**inputs, "indices": plan, "values": values}).sum().backward()
    assert values.grad.shape == values.shape


BAD_PLANS = {
    "positions": (dict(positions=torch.zeros(5)), ValueError, r"positions must have shape \[N, D\]"),
    "indices": (dict(indices=torch.zeros(2, 3, 4)), TypeError, "indices must be int64"),
    "rows": (dict(query_positions=None), ValueError, "one row per position, got 11 rows for N = 17"),
    "queries": (dict(query_positions=torch.zeros(2, 3, 11, 3)), ValueError, "query_positions must have shape"),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plan(case):
    changes, error, message = BAD_PLANS[case]
    inputs = make()
    arguments = {n: inputs[n] for n in ("indices", "positions", "query_positions")}
    with pytest.raises(error, match="^gather_plan: .*" + message):
        gather_plan(**{**arguments, **changes})
