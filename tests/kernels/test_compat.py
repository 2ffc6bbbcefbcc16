"""compat against implementations written here: all pairs in float64, one query after the other.

The functions of PyG, and what concerns all; test_compat_torch_cluster.py and test_compat_pytorch3d.py have the others.
"""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, same_bits

from dfn_kernels import compat

if INTERPRETED:  # what imports from here is skipped with it
    pytest.skip("plain PyTorch around ops, which have interpreter tests of their own", allow_module_level=True)


def pairs_by_hand(x, y, batch_x, batch_y, most, allowed=lambda d, i, j: True):
    """(i, j) of each y_i and its `most` nearest x_j of the same batch, by (squared distance, index)."""
    rows = []
    for i, q in enumerate(y.double()):
        near = [(((p - q) ** 2).sum().item(), j) for j, p in enumerate(x.double()) if batch_x[j] == batch_y[i]]
        rows += [(i, j) for d, j in sorted(near) if allowed(d, i, j)][:most]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).t()


def same_edges(got, want):
    return torch.equal(got.cpu(), want)


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
