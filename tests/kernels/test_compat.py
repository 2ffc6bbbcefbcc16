"""compat against implementations written here: all pairs in float64, one query after the other."""

import itertools
import math

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits
from test_farthest_points import by_hand as farthest_by_hand

import dfn_kernels
from dfn_kernels import compat

if INTERPRETED:
    pytest.skip("plain PyTorch around ops, which have interpreter tests of their own", allow_module_level=True)


def pairs_by_hand(x, y, batch_x, batch_y, most, allowed=lambda d, i, j: True):
    """(i, j) of each y_i and its `most` nearest x_j of the same batch, by (squared distance, index)."""
    rows = []
    for i, q in enumerate(y.double()):
        near = [(((p - q) ** 2).sum().item(), j) for j, p in enumerate(x.double()) if batch_x[j] == batch_y[i]]
        rows += [(i, j) for d, j in sorted(near) if allowed(d, i, j)][:most]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).t()


def clouds():
    """Batches of other sizes on both sides: batch 2 has no x, batch 1 no y."""
    x, y = torch.randn(23, 2).double().to(DEVICE), torch.randn(11, 2).double().to(DEVICE)
    batch_x = torch.tensor([0] * 5 + [1] * 17 + [3], device=DEVICE)
    batch_y = torch.tensor([0] * 4 + [2] * 2 + [3] * 5, device=DEVICE)
    return x, y, batch_x, batch_y


def same_edges(got, want):
    return torch.equal(got.cpu(), want)


# ---- torch_cluster --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 3, 50])
def test_knn(k):
    x, y, batch_x, batch_y = clouds()
    want = pairs_by_hand(x, y, batch_x, batch_y, k)
    assert same_edges(compat.knn(x, y, k, batch_x, batch_y), want)
    assert same_edges(compat.knn(x, y, k, batch_x, batch_y, batch_size=9), want)
    ptr_x, ptr_y = torch.tensor([0, 5, 22, 22, 23], device=DEVICE), torch.tensor([0, 4, 4, 6, 11], device=DEVICE)
    assert same_edges(compat.knn(x, y, k, ptr_x=ptr_x, ptr_y=ptr_y), want)
    one = torch.zeros(23, dtype=torch.int64, device=DEVICE)
    want = pairs_by_hand(x, y, one, one, k)
    for one_side in (dict(), dict(batch_x=one), dict(batch_y=one[:11]), dict(batch_x=one, batch_size=1)):
        assert same_edges(compat.knn(x, y, k, **one_side), want)
    assert torch.equal(compat.knn(x[:, 0], y[:, 0], k), compat.knn(x[:, :1], y[:, :1], k))


@pytest.mark.parametrize("loop", [False, True])
def test_knn_graph(loop):
    x = torch.randint(0, 3, (31, 2), device=DEVICE).double()  # many copies
    batch = torch.tensor([0] * 12 + [1] * 19, device=DEVICE)
    want = pairs_by_hand(x, x, batch, batch, 4, lambda d, i, j: loop or i != j)
    assert same_edges(compat.knn_graph(x, 4, batch, loop, flow="target_to_source"), want)
    assert same_edges(compat.knn_graph(x, 4, batch, loop), want.flip(0))
    assert same_edges(compat.knn_graph(x, 4, loop=loop, ptr=torch.tensor([0, 12, 31], device=DEVICE)), want.flip(0))
    assert compat.knn_graph(x[:0], 4).shape == (2, 0)


@pytest.mark.parametrize("most", [1, 4, 300])
def test_radius(most):
    x, y, batch_x, batch_y = clouds()
    x, y = x.round(decimals=1), y.round(decimals=1)
    for r in (0.0, 0.7, 1.9):

        def near(d, i, j, r=r):
            return d < r * r

        def others(d, i, j, r=r):
            return d < r * r and i != j

        want = pairs_by_hand(x, y, batch_x, batch_y, most, near)
        assert same_edges(compat.radius(x, y, r, batch_x, batch_y, most), want)
        want = pairs_by_hand(x, y, batch_x, batch_y, most, others)
        assert same_edges(compat.radius(x, y, r, batch_x, batch_y, most, ignore_same_index=True), want)
        for loop, allowed in ((False, others), (True, near)):
            want = pairs_by_hand(x, x, batch_x, batch_x, most, allowed)
            assert same_edges(compat.radius_graph(x, r, batch_x, loop, most), want.flip(0))


def test_radius_of_many_points():
    """Enough for the grid, where lanes of a group share their candidates; on the border a pair does not count."""
    x = (torch.randint(0, 64, (3000, 3), device=DEVICE) / 64).float()
    got = compat.radius_graph(x, 0.125, max_num_neighbors=9, flow="target_to_source").cpu()
    d = (x[:, None].cpu() - x.cpu()).square().sum(-1).fill_diagonal_(torch.inf)
    values, order = d.sort(dim=1, stable=True)
    query, slot = (values[:, :9] < 0.125**2).nonzero(as_tuple=True)
    assert torch.equal(got, torch.stack([query, order[query, slot]])) and (d == 0.125**2).any()
    assert (torch.bincount(query) == 9).any() and (torch.bincount(query) < 9).any()


def test_nearest():
    x, y, batch_x, batch_y = clouds()
    got = compat.nearest(x, y, batch_x, batch_y)
    want = dict(pairs_by_hand(y, x, batch_y, batch_x, 1).t().tolist())
    assert got.tolist() == [want.get(i, -1) for i in range(23)]
    assert got[5:22].eq(-1).all()  # batch 1 has no y


@pytest.mark.parametrize("backend", [*backends("farthest_points"), "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fps(backend, dtype):
    x = torch.randint(-4, 5, (61, 3), device=DEVICE).to(dtype)  # ties, and copies
    sizes = [0, 17, 1, 43, 0]
    ptr = [0, *itertools.accumulate(sizes)]
    want = [ptr[s] + i for s, n in enumerate(sizes) if n
            for i in farthest_by_hand(x[ptr[s] : ptr[s + 1]].double(), math.ceil(0.6 * n))]  # fmt: skip
    batch = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes)).to(DEVICE)
    with dfn_kernels.use_backend(backend):
        for options in (dict(ptr=ptr), dict(ptr=torch.tensor(ptr, device=DEVICE)), dict(batch=batch, batch_size=5)):
            assert compat.fps(x, ratio=0.6, random_start=False, **options).tolist() == want
        every = compat.fps(x, ratio=1.0, ptr=ptr)
        assert every.sort().values.tolist() == list(range(61))  # no point twice, copies or not
        firsts = {int(compat.fps(x[:9], ratio=0.1)) for _ in range(60)}
    assert len(firsts) > 3


@pytest.mark.skipif(DEVICE != "cpu", reason="about threads of the C++ kernel")
def test_fps_of_a_large_set():
    x = torch.rand(40_001, 3)
    got = [compat.fps(x, ratio=20 / 40_001, random_start=False)]
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            got.append(compat.fps(x, ratio=20 / 40_001, random_start=False))
    finally:
        torch.set_num_threads(threads)
    dist = torch.full((len(x),), torch.inf)
    want = [0]
    for _ in range(19):
        step = x - x[want[-1]]
        dist = torch.minimum(dist, (step[:, 0] ** 2 + step[:, 1] ** 2) + step[:, 2] ** 2)
        want.append(int(dist.argmax()))
    assert all(one.tolist() == want for one in got)


# ---- pytorch3d ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [1, 2])
def test_knn_points(norm):
    p1 = torch.randn(3, 7, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    p2 = torch.randn(3, 9, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths1, lengths2 = torch.tensor([7, 4, 0], device=DEVICE), torch.tensor([9, 2, 5], device=DEVICE)
    dists, idx, nn = compat.knn_points(p1, p2, lengths1, lengths2, norm=norm, K=4, return_nn=True)
    for n in range(3):
        for i in range(7):
            step = p1[n, i] - p2[n, : lengths2[n]]
            d = (step.abs() if norm == 1 else step * step).sum(-1)
            count = min(4, int(lengths2[n])) if i < lengths1[n] else 0
            order = d.argsort(stable=True)[:count]
            assert torch.equal(idx[n, i, :count], order) and torch.equal(nn[n, i, :count], p2[n, order])
            torch.testing.assert_close(dists[n, i, :count], d[order])
            assert not (dists[n, i, count:].any() or idx[n, i, count:].any() or nn[n, i, count:].any())
    options = dict(norm=norm, K=3)
    assert torch.autograd.gradcheck(lambda a, b: compat.knn_points(a, b, lengths1, lengths2, **options).dists, (p1, p2))
    assert compat.knn_points(p1, p2).knn is None and compat.knn_points(p1, p2).idx.shape == (3, 7, 1)
    mapped = torch.vmap(lambda a, b: compat.knn_points(a[None], b[None], norm=norm, K=2).idx[0])(p1, p2)
    assert torch.equal(mapped, compat.knn_points(p1, p2, norm=norm, K=2).idx)


@pytest.mark.parametrize("D", [1, 3, 5])
def test_absolute_differences_of_many_points(D):
    """Enough for the grid, with ties and copies."""
    p1 = torch.randint(-40, 40, (2, 900, D), device=DEVICE) / 8.0
    p2 = torch.randint(-40, 40, (2, 1500, D), device=DEVICE) / 8.0
    d = (p1[:, :, None].double() - p2[:, None].double()).abs().sum(-1)  # exact
    values, order = d.sort(dim=-1, stable=True)
    got = compat.knn_points(p1, p2, norm=1, K=11)
    assert torch.equal(got.idx, order[..., :11]) and torch.equal(got.dists, values[..., :11].float())


@pytest.mark.parametrize("norm", [1, 2])
def test_knn_points_hides_no_nan_and_no_overflow(norm):
    p1, p2 = torch.randn(2, 5, 3, device=DEVICE), torch.randn(2, 6, 3, device=DEVICE)
    p1[0, 2, 1] = torch.nan
    p2[1, 0], p2[1, 4, 0] = torch.nan, 3e38  # with a p1 of -3e38: no distance is finite
    p1[1, 3] = -3e38
    p1.requires_grad_()
    got = compat.knn_points(p1, p2, norm=norm, K=6)
    d = (p1[:, :, None] - p2[:, None]).detach()
    d = (d.abs() if norm == 1 else d.square()).sum(-1).gather(2, got.idx)
    assert torch.equal(got.idx.sort(-1).values, torch.arange(6, device=DEVICE).expand(2, 5, 6))  # each point once
    assert torch.equal(got.dists.isnan(), d.isnan()) and torch.equal(got.dists.isinf(), d.isinf())
    assert got.dists[0, 2].isnan().all() and got.idx[0, 2].tolist() == list(range(6))
    assert got.dists[1, 3].isinf().any() and got.dists[1, 0].isnan().sum() == 1
    assert got.dists[0, 0].isfinite().all() and (got.dists[0, 0].diff() >= 0).all()
    loss = compat.chamfer_distance(p1, p2, norm=norm)[0]
    assert loss.isnan()
    (grad,) = torch.autograd.grad(got.dists[0].sum(), p1)
    assert (norm == 1 or grad[0, 2].isnan().any()) and grad[0, [0, 1, 3, 4]].isfinite().all()
    lengths1, lengths2 = torch.tensor([2, 3], device=DEVICE), torch.tensor([6, 0], device=DEVICE)
    padded = compat.knn_points(p1, p2, lengths1, lengths2, norm=norm, K=2)
    assert padded.dists.isfinite().all() and not padded.dists[1].any()


def test_knn_gather():
    x, idx = torch.randn(2, 5, 3, device=DEVICE), torch.randint(5, (2, 4, 3), device=DEVICE)
    out = compat.knn_gather(x, idx, torch.tensor([5, 2], device=DEVICE))
    assert torch.equal(out[0], x[0][idx[0]]) and torch.equal(out[1, :, :2], x[1][idx[1, :, :2]])
    assert out[1, :, 2].eq(0).all()
    more = compat.knn_gather(x, torch.full((2, 4, 8), 3, device=DEVICE))  # K > M
    assert more[:, :, 5:].eq(0).all() and torch.equal(more[:, :, :5], x[:, 3, None, None].expand(2, 4, 5, 3))
    idx[0, 1, 1] = -1
    assert compat.knn_gather(x, idx)[0, 1, 1].eq(0).all()


def test_ball_query():
    p1 = torch.randn(2, 9, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    p2 = torch.randn(2, 21, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths1, lengths2 = torch.tensor([9, 4], device=DEVICE), torch.tensor([8, 21], device=DEVICE)
    got = compat.ball_query(p1, p2, lengths1, lengths2, K=5, radius=1.3)
    for n in range(2):
        x, y = p2[n, : lengths2[n]].detach(), p1[n, : lengths1[n]].detach()
        same = torch.zeros(21, dtype=torch.int64)
        want = pairs_by_hand(x, y, same, same, 5, lambda d, i, j: d < 1.3**2)
        query, slot = (got.idx[n] >= 0).nonzero(as_tuple=True)
        assert same_edges(torch.stack([query, got.idx[n][query, slot]]), want)
        torch.testing.assert_close(got.knn[n][query, slot], p2[n][want[1]])
        d = (p1[n][query] - p2[n][want[1]]).square().sum(-1)
        torch.testing.assert_close(got.dists[n][query, slot], d)
    missing = got.idx < 0
    assert missing.any() and got.dists[missing].eq(0).all() and got.knn[missing].eq(0).all()
    distances = lambda a, b: compat.ball_query(a, b, lengths1, lengths2, K=5, radius=1.3).dists  # noqa: E731
    assert torch.autograd.gradcheck(distances, (p1, p2))


def test_sample_farthest_points():
    points = torch.randint(-3, 4, (3, 19, 2), device=DEVICE).double().requires_grad_()
    lengths, wanted = torch.tensor([19, 3, 0], device=DEVICE), [6, 6, 2]
    selected, idx = compat.sample_farthest_points(points, lengths, wanted)
    for n in range(3):
        want = farthest_by_hand(points[n, : lengths[n]].detach(), wanted[n]) if lengths[n] else []
        assert idx[n].tolist() == want + [-1] * (6 - len(want))
        assert torch.equal(selected[n, : len(want)], points[n, want]) and not selected[n, len(want) :].any()
    selected.sum().backward()
    assert points.grad.sum() == 2 * (idx >= 0).sum()
    draws = [compat.sample_farthest_points(points, lengths, 1, random_start_point=True)[1] for _ in range(40)]
    assert {int(idx[1, 0]) for idx in draws} == {0, 1, 2}


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("point_reduction", ["mean", "sum", "max", None])
def test_chamfer_distance(norm, point_reduction):
    x, y = torch.randn(3, 6, 2).double().to(DEVICE), torch.randn(3, 8, 2).double().to(DEVICE)
    x_lengths, y_lengths = torch.tensor([6, 2, 4], device=DEVICE), torch.tensor([3, 8, 5], device=DEVICE)
    weights = torch.rand(3, device=DEVICE).double()
    normals = None, None
    if point_reduction != "max":
        normals = torch.randn_like(x), torch.randn_like(y)
    options = dict(norm=norm, point_reduction=point_reduction)

    def by_hand(a, b, normals_a, normals_b):
        d = a[:, None] - b
        d = (d.abs() if norm == 1 else d.square()).sum(-1)
        near, j = d.min(1)
        angle = None
        if normals_a is not None:
            angle = 1 - torch.nn.functional.cosine_similarity(normals_a, normals_b[j], dim=1).abs()
        return near, angle

    def reduced(part):
        return {"mean": part.mean, "sum": part.sum, "max": part.max, None: lambda: part}[point_reduction]()

    losses = [[], []]
    for n in range(3):
        a, b = x[n, : x_lengths[n]], y[n, : y_lengths[n]]
        na, nb = (None, None) if normals[0] is None else (normals[0][n, : len(a)], normals[1][n, : len(b)])
        both = by_hand(a, b, na, nb), by_hand(b, a, nb, na)
        for kind in (0, 1) if na is not None else (0,):
            forth, back = (reduced(one[kind]) for one in both)
            if point_reduction is None:
                losses[kind].append((weights[n] * forth, weights[n] * back))
            else:
                losses[kind].append(weights[n] * (max(forth, back) if point_reduction == "max" else forth + back))
    got = compat.chamfer_distance(x, y, x_lengths, y_lengths, *normals, weights, **options)
    for kind in (0, 1) if normals[0] is not None else (0,):
        if point_reduction is None:
            for side, lengths in ((0, x_lengths), (1, y_lengths)):
                for n in range(3):
                    torch.testing.assert_close(got[kind][side][n, : lengths[n]], losses[kind][n][side])
                    assert not got[kind][side][n, lengths[n] :].any()
        else:
            torch.testing.assert_close(got[kind], sum(losses[kind]) / weights.sum())
            whole = compat.chamfer_distance(x, y, x_lengths, y_lengths, *normals, weights, "sum", **options)
            torch.testing.assert_close(whole[kind], sum(losses[kind]))
            each = compat.chamfer_distance(x, y, x_lengths, y_lengths, *normals, weights, None, **options)
            torch.testing.assert_close(each[kind], torch.stack(losses[kind]))
    if point_reduction == "max":
        assert got[1] is None
    one_way = compat.chamfer_distance(x, y, batch_reduction="sum", single_directional=True, **options)[0]
    want = torch.stack([reduced(by_hand(a, b, None, None)[0]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(one_way, want if point_reduction is None else want.sum())


# ---- PyG ------------------------------------------------------------------------------------------------------------
def test_knn_interpolate():
    x, pos_x, pos_y = torch.randn(20, 5).double(), torch.randn(20, 3).double(), torch.randn(8, 3).double()
    pos_y[3] = pos_x[4]
    x.requires_grad_()
    out = compat.knn_interpolate(x, pos_x, pos_y, k=3)
    d = (pos_y[:, None] - pos_x).square().sum(-1)
    near, j = d.topk(3, largest=False)
    w = 1 / near.clamp(min=1e-16)
    torch.testing.assert_close(out, (w[..., None] * x[j]).sum(1) / w.sum(1, keepdim=True))
    torch.testing.assert_close(out[3], x[4])
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    half = compat.knn_interpolate(x.detach().half(), pos_x.half(), pos_y.half())
    assert half.dtype == torch.float16 and torch.equal(half[3], x[4].half())
    batch_x, batch_y = torch.tensor([0] * 12 + [2] * 8), torch.tensor([0] * 5 + [1] + [2] * 2)
    parts = compat.knn_interpolate(x, pos_x, pos_y, batch_x, batch_y, batch_size=3)
    torch.testing.assert_close(parts[:5], compat.knn_interpolate(x[:12], pos_x[:12], pos_y[:5]))
    torch.testing.assert_close(parts[6:], compat.knn_interpolate(x[12:], pos_x[12:], pos_y[6:]))
    assert parts[5].isnan().all()  # nobody to interpolate from


# ---- all ------------------------------------------------------------------------------------------------------------
def test_static_shapes_compile():
    p1, p2 = torch.randn(2, 7, 3, device=DEVICE), torch.randn(2, 9, 3, device=DEVICE)

    def everything(p1, p2):
        near = compat.knn_points(p1, p2, K=3, return_nn=True)
        ball = compat.ball_query(p1, p2, K=4, radius=1.0)
        chosen, idx = compat.sample_farthest_points(p2, K=4)
        loss, _ = compat.chamfer_distance(p1, p2, norm=1)
        between = compat.knn_interpolate(p2[0], p2[0], p1[0])
        return *near, *ball, chosen, idx, loss, between, compat.knn_gather(p2, near.idx), compat.nearest(p1[0], p2[0])

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for a, b in zip(everything(p1, p2), compiled(p1, p2), strict=True):
        torch.testing.assert_close(a, b)


def test_a_huge_cloud_among_tiny_ones_needs_no_padding():
    """120,000 points in 2,001 clouds: padded to the largest they would take 2.9 GB, and their lists far more."""
    x = torch.rand(120_000, 3)
    sizes = torch.tensor([100_000, *[10] * 2000])
    batch = torch.repeat_interleave(torch.arange(2001), sizes)
    got = compat.knn_graph(x, 4, batch, flow="target_to_source")
    assert torch.equal(batch[got[0]], batch[got[1]]) and got.shape == (2, 480_000)
    assert torch.equal(got[1, 400_000:400_040], compat.knn_graph(x[100_000:100_010], 4)[0] + 100_000)
    assert same_bits(got[1, :400_000], compat.knn_graph(x[:100_000], 4)[0])


@pytest.mark.parametrize(
    ("name", "hint"), [("graclus_cluster", "torch_geometric.nn.graclus"), ("approx_knn", "knn, w")]
)
def test_not_offered(name, hint):
    with pytest.raises(ImportError, match=f"compat: {name} is not offered; use .*{hint}"):
        getattr(compat, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compat.nothing


BATCH = torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: compat.knn(x, x, 1, cosine=True), NotImplementedError, "knn: cosine=True is not offered"),
        (lambda x: compat.knn(x, None, 2), TypeError, "knn: y must be a tensor, got NoneType"),
        (lambda x: compat.knn(x, x, 0), ValueError, "knn: k must be between 1 and 1024, got 0"),
        (lambda x: compat.knn(x, x[:, :1], 1), ValueError,
         r"knn: y must have shape \[M, D\] = \[3, 2\] like x, got \[3, 1\]"),
        (lambda x: compat.knn(x.long(), x, 1), TypeError, "knn: x must be float16, .* got torch.int64"),
        (lambda x: compat.knn(x, x, 1, BATCH), ValueError, "knn: batch_y must be given where there are 2 batches"),
        (lambda x: compat.knn(x, x, 1, BATCH, BATCH, batch_size=1), ValueError,
         "batch_x must be below batch_size, 1, got 1"),
        (lambda x: compat.knn(x, x, 1, BATCH[:2], BATCH), ValueError,
         r"knn: batch_x must have shape \[3\].* got \[2\]"),
        (lambda x: compat.knn(x, x, 1, BATCH - 1, BATCH), ValueError, "knn: batch_x must not be negative, got -1"),
        (lambda x: compat.knn(x, x, 1, BATCH, BATCH.int()), TypeError, "knn: batch_y must be int64, got torch.int32"),
        (lambda x: compat.knn(x, x, 1, BATCH, BATCH, ptr_x=BATCH), ValueError,
         "batch_x and ptr_x must not be given both"),
        (lambda x: compat.knn(x, x, 1, ptr_x=torch.tensor([0, 3])), ValueError, "ptr_y must be given with the other"),
        (lambda x: compat.knn(x, x, 1, ptr_x=torch.tensor([0, 2]), ptr_y=torch.tensor([0, 3])), ValueError,
         "knn: ptr_x must go from 0 to the number of rows, 3, got 0 to 2"),
        (lambda x: compat.knn_graph(x, 1, flow="up"), ValueError, "knn_graph: flow must be 'source_to_target' or"),
        (lambda x: compat.knn_graph(x, 1, loop="yes"), TypeError, "knn_graph: loop must be True or False, got str"),
        (lambda x: compat.knn_graph(x, 1, BATCH.flip(0)), ValueError, "knn_graph: batch must ascend, got 1"),
        (lambda x: compat.knn_graph(x[None], 1), ValueError,
         r"knn_graph: x must have shape \[N, D\].* got \[1, 3, 2\]"),
        (lambda x: compat.radius(x, x, -1.0), ValueError, "radius: r must not be negative, got -1.0"),
        (lambda x: compat.radius_graph(x, 1.0, max_num_neighbors=2000), ValueError,
         "radius_graph: max_num_neighbors must be between 1 and 1024, got 2000"),
        (lambda x: compat.fps(x, ratio=0.0), ValueError, "fps: ratio must be above 0 and at most 1, got 0.0"),
        (lambda x: compat.fps(x, BATCH - 2), ValueError, "fps: batch must not be negative, got -2"),
        (lambda x: compat.knn_points(x, x), ValueError, r"knn_points: p1 must have shape \[N, P, D\], got \[3, 2\]"),
        (lambda x: compat.knn_points(x[None], x[None], norm=3), ValueError, "norm must be 1 or 2, got 3"),
        (lambda x: compat.knn_points(x[None], x[None], K=0), ValueError, "K must be between 1 and 1024, got 0"),
        (lambda x: compat.knn_points(x[None], x[None], BATCH), ValueError, r"lengths1 must have shape \[N\] = \[1\]"),
        (lambda x: compat.knn_gather(x, torch.zeros(1, 1, 1, dtype=torch.int64)), ValueError, "knn_gather: x must be"),
        (lambda x: compat.ball_query(x[None], x[None], radius="a"), TypeError, "ball_query: radius must be a number"),
        (lambda x: compat.chamfer_distance(x[None], x[None], point_reduction="no"), ValueError,
         "point_reduction must be"),
        (lambda x: compat.chamfer_distance(x[None], x[None], weights=-x[:1, 0].abs()), ValueError,
         "weights must not be"),
        (lambda x: compat.chamfer_distance(x, x[None]), ValueError, r"chamfer_distance: x must have shape \[N, P, D\]"),
        (lambda x: compat.sample_farthest_points(x), ValueError, "sample_farthest_points: points must have shape"),
        (lambda x: compat.knn_interpolate(x, x, x[None]), ValueError, "knn_interpolate: pos_y must have shape"),
        (lambda x: compat.knn_interpolate(x[:2], x, x), ValueError,
         r"knn_interpolate: x must have shape \[N, c\] = \[3, 2\]"),
        (lambda x: compat.knn_interpolate(x, x[:, :1], x), ValueError,
         r"pos_y must have shape \[M, D\] = \[3, 1\] like pos_x"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 2))
