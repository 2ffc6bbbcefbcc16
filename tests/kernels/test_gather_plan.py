"""Plans: orders and transposed lists that several gathers share."""

import pytest
import torch
from helpers import DEVICE, backends, check_against_reference, leaves, same_bits
from launches import started_by
from test_gaussian_gather import make, with_plan

import dfn_kernels
from dfn_kernels import gather_plan, gaussian_gather

BACKENDS = backends("gaussian_gather")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", ["own", "shared by heads"])
def test_plan_serves_several_calls(backend, neighbors, monkeypatch):
    """Two layers, one plan: what one call each gives. Hubs are cut into pieces, in Triton here small ones."""
    if backend == "triton":
        import dfn_kernels.triton.gaussian_gather_backward as kernels

        monkeypatch.setattr(kernels, "HUB", 8)
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


@pytest.mark.skipif("triton" not in BACKENDS, reason="what the lists of the other backends hold is theirs to say")
@pytest.mark.parametrize("sizes", [(2, 3, 11, 5, 17), (1, 1, 50, 1, 7), (2, 2, 40, 16, 3), (1, 2, 3, 4, 900)], ids=str)
def test_transposed_lists(sizes):
    """Every edge of an entity once, in its order; indices out of range are nobody's."""
    from dfn_kernels.triton.gather_plan import slot_bits, transpose_neighbors

    B, H, M, k, N = sizes
    indices = torch.randint(-2, N + 2, (B, H, M, k), device=DEVICE)
    starts, edges = transpose_neighbors(indices, None, None, N)
    assert edges.dtype == torch.int32 and starts.shape == (B, H, N + 1)
    edges = edges.flatten(2).long()
    pairs = torch.stack([edges >> slot_bits(k), edges & (1 << slot_bits(k)) - 1], 3)  # query, slot
    for b in range(B):
        for h in range(H):
            for n in range(N):
                mine = slice(starts[b, h, n], starts[b, h, n + 1])
                want = (indices[b, h] == n).nonzero()
                assert pairs[b, h, mine].equal(want)


@pytest.mark.skipif("triton" not in BACKENDS, reason="pieces as the Triton kernels cut them")
@pytest.mark.parametrize("counts", [
    (8, 9, 0, 7, 16),  # as long as a piece, one longer, none, the next begins with a block
    (0, 24, 40, 8, 1, 15),  # two hubs that share a block; a hub that begins with one, and one that ends with one
    (3, 160),  # pieces of 20 blocks
    (12, 12, 12, 12),
])  # fmt: skip
def test_hubs_are_cut_into_pieces(counts, monkeypatch):
    """Lists of these lengths, cut into pieces of 8: every gradient is the reference's."""
    import dfn_kernels.triton.gaussian_gather_backward as kernels

    monkeypatch.setattr(kernels, "HUB", 8)
    N, k = len(counts), 3
    ends = torch.arange(N, device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    M = -(-len(ends) // k)
    inputs = make(B=1, H=2, N=N, M=M, k=k, c=19)
    for h in range(2):
        missing = torch.full((M * k - len(ends),), -1, device=DEVICE)
        inputs["indices"][0, h] = torch.cat([ends, missing])[torch.randperm(M * k, device=DEVICE)].view(M, k)
    check_against_reference(gaussian_gather, inputs, "triton")


@pytest.mark.skipif("triton" not in BACKENDS, reason="what the Triton launchers start")
@pytest.mark.parametrize("given", ["plan", "nothing"])
def test_what_large_inputs_start(given, monkeypatch):
    """With lists that could be hubs, and without a plan: what test_launches.py allows, and the making of the lists."""
    import dfn_kernels.triton.gaussian_gather as forward
    import dfn_kernels.triton.gaussian_gather_backward as backward

    monkeypatch.setattr(backward, "HUB", 8)
    i = make(N=29, M=31, k=4)
    with dfn_kernels.use_backend("triton"):
        plan = gather_plan(i["indices"], i["positions"], i["query_positions"])
    reuse = plan[1:5] if given == "plan" else (None,) * 4
    inputs = i["positions"], i["query_positions"], i["values"], i["indices"], i["sigma"], i["influence"], None
    started = started_by(lambda: forward.gaussian_gather(*inputs, reuse[0], True))
    assert started == ["kernel weights_kernel", "kernel gather_kernel"]
    grad = torch.randn(2, 3, 31, 37, device=DEVICE)
    started = started_by(lambda: backward.gaussian_gather_backward(grad, *inputs, *reuse, True, 31))
    lists = ["kernel keys_kernel", "aten.sort.stable", "kernel lists_kernel"] if given == "nothing" else []
    assert started == ["kernel dots_kernel", "kernel edges_kernel", "aten.sum.dim_IntList", *lists,
                       "kernel entities_kernel", "kernel hubs_kernel"]  # fmt: skip


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
