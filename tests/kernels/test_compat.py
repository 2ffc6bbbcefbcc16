import pytest
import torch
from helpers import INTERPRETED

from dfn_kernels import compat

if INTERPRETED:
    pytest.skip("plain PyTorch around knn, which has interpreter tests of its own", allow_module_level=True)


def edges_by_hand(x, y, k, batch_x, batch_y, loop=True):
    rows = []
    for i, q in enumerate(y):
        candidates = [
            (((p - q) ** 2).sum().item(), j) for j, p in enumerate(x) if batch_x[j] == batch_y[i] and (loop or i != j)
        ]
        rows += [(i, j) for _, j in sorted(candidates)[:k]]
    return torch.tensor(rows).reshape(-1, 2).t()


@pytest.mark.parametrize("k", [1, 3, 50])
def test_knn_as_torch_cluster(k):
    x, y = torch.randn(23, 2, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    batch_x = torch.tensor([0] * 5 + [1] * 17 + [3])
    batch_y = torch.tensor([0] * 4 + [2] * 2 + [3] * 5)  # batch 2 has no x, batch 1 no y
    assert torch.equal(compat.knn(x, y, k, batch_x, batch_y), edges_by_hand(x, y, k, batch_x, batch_y))
    one = torch.zeros(23, dtype=torch.int64)
    assert torch.equal(compat.knn(x, y, k), edges_by_hand(x, y, k, one, one))
    assert torch.equal(compat.knn(x[:, 0], y[:, 0], k), compat.knn(x[:, :1], y[:, :1], k))


@pytest.mark.parametrize("loop", [False, True])
def test_knn_graph_as_torch_cluster(loop):
    x = torch.randint(0, 3, (31, 2)).double()  # many copies
    batch = torch.tensor([0] * 12 + [1] * 19)
    want = edges_by_hand(x, x, 4, batch, batch, loop)
    assert torch.equal(compat.knn_graph(x, 4, batch, loop, flow="target_to_source"), want)
    assert torch.equal(compat.knn_graph(x, 4, batch, loop), want.flip(0))
    assert loop or (compat.knn_graph(x, 40)[0] != compat.knn_graph(x, 40)[1]).all()
    assert compat.knn_graph(x[:0], 4).shape == (2, 0)


@pytest.mark.parametrize("norm", [1, 2])
def test_knn_points_as_pytorch3d(norm):
    p1 = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    p2 = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    lengths1, lengths2 = torch.tensor([7, 4, 0]), torch.tensor([9, 2, 5])
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


def test_knn_gather_as_pytorch3d():
    x, idx = torch.randn(2, 5, 3), torch.randint(5, (2, 4, 3))
    out = compat.knn_gather(x, idx, torch.tensor([5, 2]))
    assert torch.equal(out[0], x[0][idx[0]]) and torch.equal(out[1, :, :2], x[1][idx[1, :, :2]])
    assert out[1, :, 2].eq(0).all()


def test_knn_interpolate_as_pyg():
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: compat.knn(x, x, 1, cosine=True), NotImplementedError, "knn: cosine=True is not offered"),
        (lambda x: compat.knn_graph(x, 1, flow="up"), ValueError, "knn_graph: flow must be 'source_to_target' or"),
        (lambda x: compat.knn_graph(x, 1, torch.tensor([1, 0, 0])), ValueError, "knn_graph: batch_x must ascend"),
        (lambda x: compat.knn(x, x, 1, torch.zeros(3, dtype=torch.int64)), ValueError, "both or neither"),
        (lambda x: compat.knn(x, x[:, :1], 1), ValueError, r"knn: y must have shape \[M, D\] = \[3, 2\], got \[3, 1\]"),
        (lambda x: compat.knn_points(x, x), ValueError, r"knn_points: p1 must have shape \[N, P, D\], got \[3, 2\]"),
        (lambda x: compat.knn_points(x[None], x[None], norm=3), ValueError, "norm must be 1 or 2, got 3"),
        (lambda x: compat.knn_points(x[None], x[None], K=0), ValueError, "K must be between 1 and 1024, got 0"),
        (lambda x: compat.knn_gather(x, torch.zeros(1, 1, 1, dtype=torch.int64)), ValueError, "knn_gather: x must be"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 2))
