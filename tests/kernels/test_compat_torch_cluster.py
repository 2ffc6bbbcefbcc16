"""compat's functions of torch_cluster, as test_compat.py says."""

import itertools
import math

import pytest
import torch
from helpers import DEVICE, backends, on_threads
from test_compat import pairs_by_hand, same_edges
from test_farthest_points import by_hand as farthest_by_hand

import dfn_kernels
from dfn_kernels import compat


def clouds():
    """Batches of other sizes on both sides: batch 2 has no x, batch 1 no y."""
    x, y = torch.randn(23, 2).double().to(DEVICE), torch.randn(11, 2).double().to(DEVICE)
    batch_x = torch.tensor([0] * 5 + [1] * 17 + [3], device=DEVICE)
    batch_y = torch.tensor([0] * 4 + [2] * 2 + [3] * 5, device=DEVICE)
    return x, y, batch_x, batch_y


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
    got = on_threads(lambda: compat.fps(x, ratio=20 / 40_001, random_start=False))
    dist = torch.full((len(x),), torch.inf)
    want = [0]
    for _ in range(19):
        step = x - x[want[-1]]
        dist = torch.minimum(dist, (step[:, 0] ** 2 + step[:, 1] ** 2) + step[:, 2] ** 2)
        want.append(int(dist.argmax()))
    assert all(one.tolist() == want for one in got)
