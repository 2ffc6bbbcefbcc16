"""compat's functions of pytorch3d, as test_compat.py says."""

import pytest
import torch
from helpers import DEVICE
from test_compat import pairs_by_hand, same_edges
from test_farthest_points import by_hand as farthest_by_hand

from dfn_kernels import compat


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
