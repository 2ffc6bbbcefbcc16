"""The Triton search over strips and boxes. In the interpreter sizes are tiny, and so are strips, boxes and budgets."""

import point_sets
import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, check_same, same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfn_kernels
from dfn_kernels import KNNIndex, knn

if "triton" not in backends("knn"):
    pytest.skip("no Triton for tensors of this device", allow_module_level=True)

from dfn_kernels.triton import knn as package  # noqa: E402
from dfn_kernels.triton.knn import boxes, cuts, grid, strips  # noqa: E402

N = 61 if INTERPRETED else 3001
MASKS = [dict(causal=c, include_self=s) for c in (False, True) for s in (True, False)]


def small_grids(monkeypatch):
    """Grids for few points, with as many strips, levels and boxes as large ones have."""
    monkeypatch.setattr(package, "FEW_POINTS", 0)
    monkeypatch.setattr(package, "FEW_STEPS", 0)
    if INTERPRETED:
        monkeypatch.setattr(package, "BOX", 4)
        monkeypatch.setattr(strips, "LANES", 128)  # a wide block costs the interpreter no more than a narrow one
        monkeypatch.setattr(cuts, "EARLY", 8)
        monkeypatch.setattr(cuts, "ROUNDING", 2)
        monkeypatch.setattr(cuts, "STRIP_DEPTH", {1: 0, 2: 3, 3: 3})
        monkeypatch.setattr(cuts, "SLAB_DEPTH", 12)


@pytest.fixture(autouse=True)
def always_a_grid(monkeypatch):
    small_grids(monkeypatch)


@pytest.fixture
def left(monkeypatch):
    """How many queries each search left to the boxes."""
    counts = []
    search = strips.search

    def watched(*args):
        found = search(*args)
        counts.append(int(found[2]))
        return found

    monkeypatch.setattr(strips, "search", watched)
    return counts


def check(positions, k, **options):
    return check_same("triton", positions, k, **options)


# ---- strips ---------------------------------------------------------------------------------------------------------
FAST = ("clusters", "lattice", "two rows", "256 positions", "1e18", "underflowing", "signed zeros", "reversed")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if INTERPRETED and name not in FAST else ()) for name in point_sets.NAMES
])  # fmt: skip
def test_hostile_sets(name, left):
    at = point_sets.NAMES.index(name)
    for D in (1 + at % 3,) if INTERPRETED else (1, 2, 3):
        positions = point_sets.points(name, N + at % 5, D).to(DEVICE)
        for mask in [MASKS[(at + D) % 4]] if INTERPRETED else MASKS:
            check(positions, (4, 3, 7)[at % 3], **mask)
    assert sum(left) < len(left) * N / 4, "the strips serve most of the queries"


@pytest.mark.parametrize("D", [1, 2, 3])
def test_boxes_serve_what_strips_leave(D, monkeypatch, left):
    monkeypatch.setattr(strips, "budget_of", lambda K: strips.VISIT)
    n = N // 2
    for name, mask in ((("clusters", MASKS[0]), ("lattice", MASKS[3]), ("denormal", MASKS[2]))[D - 1],):
        check(point_sets.points(name, n, D).to(DEVICE), 5, **mask)
    assert left[0] > n / 2


def test_positions_that_share_a_hash(monkeypatch):
    """Fewer copies are dropped then, but never another position."""
    monkeypatch.setattr(grid, "HASH_BITS", 1)
    positions = torch.randint(3, (N, 2), device=DEVICE).float()
    positions[:, 1] *= 10  # sorted along this axis, three positions of each value in one strip
    monkeypatch.setattr(cuts, "STRIP_DEPTH", {1: 0, 2: N, 3: N})
    check(positions, 2)


def test_batches_and_lengths(left):
    n = N // 2
    positions = torch.randn(4, n, 3, device=DEVICE)
    lengths = torch.tensor([0, 1, n // 2, n], device=DEVICE)
    positions[2, n // 2 :] = float("nan")  # padding may hold anything
    positions[3, 5, 1], positions[3, 7] = float("inf"), float("nan")
    for mask in MASKS[1:3] if INTERPRETED else MASKS:
        got = check(positions, 4, lengths=lengths, check=False, **mask)
        assert got.indices[0].eq(-1).all() and got.indices[3, 7].eq(-1).all()
    assert len(left) > 0


@pytest.mark.parametrize("D, k", [(1, 5), (2, 8), (3, 2)])
def test_other_queries(D, k):
    positions = torch.randn(2, N, D, device=DEVICE)
    queries = torch.cat([3 * torch.randn(2, N // 3, D, device=DEVICE), positions[:, :7], positions[:, :1] * 1e18], 1)
    queries[1, 3] = float("nan")
    lengths = torch.tensor([N - 3, N], device=DEVICE)
    query_lengths = torch.tensor([queries.shape[1], 5], device=DEVICE)
    check(positions, k, queries=queries, lengths=lengths, query_lengths=query_lengths, check=False)


def test_queries_of_entities_are_causal():
    """flow_attention asks for query i what entity i may see, from another place."""
    positions, queries = torch.randn(1, N // 2, 2, device=DEVICE), torch.randn(1, N // 2, 2, device=DEVICE)
    op = torch.ops.dfn.knn
    for include_self in (False,) if INTERPRETED else (True, False):
        arguments = positions, queries, None, None, 3, True, include_self, True, None, 0
        want, got = op(*arguments, "reference"), op(*arguments, "triton")
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


@pytest.mark.parametrize("k", [1, 9, 64] if INTERPRETED else [1, 2, 4, 7, 8, 13, 16, 17, 32, 33, 63, 64])
def test_short_lists(k):
    check(torch.randn(N, 2, device=DEVICE).round(decimals=1), k, **MASKS[k % 4])


def test_fewer_points_than_neighbors():
    for n in (1, 5):
        for mask in MASKS[1:2] if INTERPRETED else MASKS:
            check(torch.randn(3, n, 2, device=DEVICE), 6, **mask)


# ---- boxes: more than 64 neighbours ---------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [65, 130] if INTERPRETED else [65, 100, 128, 129, 500, 1000, 1024])
def test_long_lists(k):
    n = 140 if INTERPRETED else 2500
    for D, name, mask in ((2, "lattice", MASKS[3]), (3, "256 positions", MASKS[0]), (1, "normal", MASKS[2])):
        if INTERPRETED and (D == 1 or k == 130 and D == 2):
            continue
        positions = point_sets.points(name, n, D).to(DEVICE)
        queries = torch.randn(3, D, device=DEVICE) if INTERPRETED else None
        check(positions, k, queries=queries, **(MASKS[0] if INTERPRETED else mask))


# ---- KNNIndex and warm starts ---------------------------------------------------------------------------------------
def test_index(left, monkeypatch):
    n, k = N // 2, 4
    positions = torch.randn(2, n, 2, device=DEVICE)
    lengths = torch.tensor([n, n - 7], device=DEVICE)
    builds = []
    monkeypatch.setattr(package, "build", lambda *args: builds.append(args) or grid.build(*args))
    index = KNNIndex(positions, lengths)
    with dfn_kernels.use_backend("reference"):
        want = KNNIndex(positions, lengths).query(k)
        far = knn(positions, k, queries=-2 * positions[:, :5], lengths=lengths)
        alone = knn(positions, 2, lengths=lengths, include_self=False)
    built = len(builds)
    shuffled = torch.randint(n, (2, n, k), device=DEVICE)
    twice = want.indices[..., :1].expand(-1, -1, k).contiguous()  # as near as can be, but not k different ones
    absent = torch.full_like(shuffled, -1)
    with dfn_kernels.use_backend("triton"):
        for warm in (want.indices, shuffled, twice, *(() if INTERPRETED else (absent, absent + 2**40))):
            got = index.query(k, warm=want._replace(indices=warm))
            assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
        assert left[0] == 0 and left[2] > n, "a wrong warm start shows"
        for got, right in ((index.query(k, -2 * positions[:, :5]), far), (index.query(2, include_self=False), alone)):
            assert same_bits(got.indices, right.indices) and same_bits(got.sq_dists, right.sq_dists)
    assert len(builds) == built, "sorted once"
    number = index._grids["triton"]
    del index
    assert number > 0 and number not in package._grids


# ---- what GPUs need -------------------------------------------------------------------------------------------------
class _NoLaunch:
    """Stands in for a kernel: takes any grid and arguments."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


class _OneDevice(TorchDispatchMode):
    """No tensor comes from the host, none goes there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", f"{func} on {x.device}"
        return out


@pytest.mark.parametrize("k, causal, others", [(7, 0, False), (7, 1, False), (7, 0, True), (100, 1, False)])
def test_nothing_waits_for_the_device(k, causal, others, monkeypatch):
    """On meta tensors, which have no values: whatever needs one on the host, or in a shape, fails. So a CUDA graph can
    capture a search."""
    for module in (package.brute, grid, strips, boxes, package.warm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _NoLaunch())
    for D in (1, 2, 3):
        points = torch.empty(2, 100_003, D, device="meta")
        queries = torch.empty(2, 50_021, D, device="meta") if others else None
        lengths = torch.empty(2, dtype=torch.int64, device="meta")
        warm = torch.empty(2, 50_021 if others else 100_003, k, dtype=torch.int64, device="meta")
        inputs = points, queries, lengths, lengths if others else None
        with _OneDevice():
            indices, sq_dists = package.knn(*inputs, k, bool(causal), not causal, warm)
            assert indices.shape == sq_dists.shape == warm.shape


def test_what_waits_for_the_device_shows():
    x = torch.empty(5, device="meta")
    for wrong in (lambda: x[x > 3], x.tolist, lambda: torch.tensor([1]), lambda: x.nonzero(), lambda: x.cpu()):
        with _OneDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            wrong()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("k", [16, 100])
def test_cuda_graph(k):
    positions = torch.rand(20_000, 3, device=DEVICE)
    with dfn_kernels.use_backend("triton"):
        knn(positions, k)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = knn(positions, k)
        for name in ("clusters", "256 positions"):
            positions.copy_(point_sets.points(name, len(positions), 3))
            captured.replay()
            want = knn(positions, k)
            assert same_bits(found.indices, want.indices) and same_bits(found.sq_dists, want.sq_dists)
