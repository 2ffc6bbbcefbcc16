"""The Triton search: boxes, and brute force in slices. In the interpreter sizes are tiny, and so are the boxes."""

import point_sets
import pytest
import torch
from helpers import DEVICE, INTERPRETED, MASKS, backends, check_same, same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfn_kernels
from dfn_kernels import KNNIndex, knn

if "triton" not in backends("knn"):
    pytest.skip("no Triton for tensors of this device", allow_module_level=True)

from dfn_kernels.triton import knn as package  # noqa: E402
from dfn_kernels.triton.knn import brute, lists, tree, walk, warm  # noqa: E402

N = 61 if INTERPRETED else 3001
use_tree = package.use_tree


def small_trees(monkeypatch):
    """Trees for few points, with as many kinds of boxes and as many prefixes as large ones have."""
    monkeypatch.setattr(package, "use_tree", lambda B, N, M, D, dtype: dtype == torch.float32 and D < 9)
    if INTERPRETED:
        monkeypatch.setattr(lists, "LANES", 64)  # a wide block costs the interpreter no more than a narrow one
        for name, value in dict(LEAF=4, FAN=4, EARLY=8, SAMPLE=16).items():
            monkeypatch.setattr(tree, name, value)


@pytest.fixture(autouse=True)
def always_a_tree(monkeypatch):
    small_trees(monkeypatch)


@pytest.fixture
def walks(monkeypatch):
    """What the walks were called with: a test that means the tree must not be served by brute force."""
    calls = []
    search = walk.search
    monkeypatch.setattr(walk, "search", lambda *args: calls.append(args) or search(*args))
    return calls


def check(positions, k, **options):
    return check_same("triton", positions, k, **options)


# ---- the walk -------------------------------------------------------------------------------------------------------
FAST = ("clusters", "lattice", "two rows", "256 positions", "1e18", "underflowing", "signed zeros", "reversed")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if INTERPRETED and name not in FAST else ()) for name in point_sets.NAMES
])  # fmt: skip
def test_hostile_sets(name, walks):
    at = point_sets.NAMES.index(name)
    for D in (1 + at % 3,) if INTERPRETED else (1, 2, 3):
        positions = point_sets.points(name, N + at % 5, D).to(DEVICE)
        for mask in [MASKS[(at + D) % 4]] if INTERPRETED else MASKS:
            check(positions, (4, 3, 7)[at % 3], **mask)
    assert len(walks) == (1 if INTERPRETED else 12)


def test_batches_and_lengths(walks):
    n = N // 2
    positions = torch.randn(4, n, 3, device=DEVICE)
    lengths = torch.tensor([0, 1, n // 2, n], device=DEVICE)
    positions[2, n // 2 :] = float("nan")  # padding may hold anything
    positions[3, 5, 1], positions[3, 7] = float("inf"), float("nan")
    for mask in MASKS[1:3] if INTERPRETED else MASKS:
        got = check(positions, 4, lengths=lengths, check=False, **mask)
        assert got.indices[0].eq(-1).all() and got.indices[3, 7].eq(-1).all()
    assert len(walks) > 0


@pytest.mark.parametrize("D, k", [(1, 5), (2, 8), (3, 2), (5, 6)])
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


@pytest.mark.parametrize("k", [1, 16, 41] if INTERPRETED else [1, 2, 4, 7, 8, 13, 16, 17, 32, 33, 63, 64, 500, 1024])
def test_lists_of_any_length(k):
    check(torch.randn(N, 2, device=DEVICE).round(decimals=1), k, **MASKS[k % 4])


# ---- long lists -----------------------------------------------------------------------------------------------------
def check_long_lists(monkeypatch, walks, name, k, D, by_tree, mask, given) -> None:
    """One search of 64 neighbours and more. In the interpreter a program takes all queries, for a wide block costs no
    more than a narrow one, and boxes have the sizes that ship."""
    if INTERPRETED:
        for module, attribute, value in (
            (lists, "LANES", 2048),
            (tree, "LEAF", 16),
            (tree, "FAN", 32),
            (tree, "EARLY", 512),
        ):
            monkeypatch.setattr(module, attribute, value)
    monkeypatch.setattr(package, "use_tree", lambda *sizes: by_tree)
    n = k + 5 + len(name)
    positions = point_sets.points(name, n, D).to(DEVICE)[None]
    options = dict(mask)
    if given == "lengths":
        positions = torch.cat([positions, positions.flip(1)])
        options |= dict(lengths=torch.tensor([n - 3, k // 2], device=DEVICE), check=False)
    if given == "queries":
        options = dict(queries=torch.cat([positions[:, ::3], -positions[:, 5::7]], 1))
    check(positions, k, **options)
    assert len(walks) == by_tree


@pytest.mark.parametrize("by_tree", [False, True])
def test_a_long_list(by_tree, monkeypatch, walks):
    check_long_lists(monkeypatch, walks, "two rows", 65, 2, by_tree, MASKS[by_tree], "")


@pytest.mark.slow
@pytest.mark.parametrize("name, k", [("256 positions", 65), ("lattice", 300), ("normal", 1024)])
def test_long_lists_in_float64(name, k):
    """A program a query: few of them, and more points than are sorted at a time."""
    positions = point_sets.points(name, 1103 + k, 3).to(DEVICE).double()
    check(positions, k, queries=positions[-2:] / 3)


# Time grows with the square of k: few of the longest ones.
LONGEST = (64, 65, 128, 64, 65, 256, 64, 128, 65, 512, 128, 256)


@pytest.mark.slow
@pytest.mark.parametrize("by_tree", [False, True])
@pytest.mark.parametrize("name", point_sets.NAMES)
def test_long_lists(name, by_tree, monkeypatch, walks):
    at = point_sets.NAMES.index(name)
    k = 1024 if name == "normal" else LONGEST[(at + 5 * by_tree) % len(LONGEST)]
    given = ("", "lengths", "queries")[(at + by_tree) % 3]
    check_long_lists(monkeypatch, walks, name, k, 2 + at // 2 % 2, by_tree, MASKS[(at + at // 4) % 4], given)


def test_many_equal_distances():
    """Which of them are kept is decided by index, in every leaf and every list."""
    for n, D, k in ((N, 2, 20),) if INTERPRETED else ((N, 1, 16), (N, 3, 100), (N, 8, 5)):
        check(torch.randint(2, (n, D), device=DEVICE).float(), k, **MASKS[D % 4])


@pytest.mark.skipif(INTERPRETED, reason="needs many branches")
def test_many_branches(monkeypatch):
    monkeypatch.setattr(tree, "FAN", 4)
    monkeypatch.setattr(tree, "LEAF", 4)
    for causal in (False, True):
        check(torch.randn(N, 3, device=DEVICE), 9, causal=causal)


@pytest.mark.parametrize("name, D, mask", [("normal", 2, MASKS[0]), ("lattice", 3, MASKS[3])])
def test_boxes_that_no_lane_needs(name, D, mask, monkeypatch):
    """Packets of few queries: one of all queries would look into every box, whatever the test of boxes says."""
    n = 37 if INTERPRETED else N
    if INTERPRETED:
        monkeypatch.setattr(lists, "LANES", 4)
    check(point_sets.points(name, n, D).to(DEVICE), 3, **mask)


@pytest.mark.skipif(not INTERPRETED, reason="counts what a kernel calls")
@pytest.mark.parametrize("causal", [False, True])
def test_packets_are_cut_where_the_order_jumps(causal, monkeypatch):
    """Four queries here and four far away: one box around them would hold all points between."""
    n = 100
    monkeypatch.setattr(lists, "LANES", 8)
    monkeypatch.setattr(tree, "EARLY", n)
    x = torch.cat([torch.rand(n, 1) * 20, torch.zeros(n, 1)], 1)  # between them
    far = torch.tensor([[-1.0, 0], [21.0, 0]]).repeat_interleave(4, 0) + 1e-3 * torch.rand(8, 2)
    x, queries = x.to(DEVICE)[None], far.to(DEVICE)[None]
    tested = []
    needs = walk.any_needs
    monkeypatch.setattr(walk, "any_needs", lambda *args: tested.append(args) or needs(*args))
    boxes = []
    for jump in (walk.JUMP, 0.0):
        monkeypatch.setattr(walk, "JUMP", jump)
        tested.clear()
        grown = tree.build(x, None, causal)
        rows, seats = tree.in_order(queries, None, grown)
        found = walk.search(queries, rows, seats, None, None, grown, 3, False, True)
        with dfn_kernels.use_backend("reference"):
            want = knn(x, 3, queries=queries)
        assert same_bits(found[0], want.indices) and same_bits(found[1], want.sq_dists)
        boxes.append(len(tested))
    assert 1.5 * boxes[0] < boxes[1]


def test_the_order_does_not_matter(monkeypatch):
    """Where the curve runs decides how fast a search is, never what it finds."""
    monkeypatch.setattr(tree.Layout, "bits", 1)
    monkeypatch.setattr(tree.Layout, "fine", 1)
    check(torch.randn(N, 3, device=DEVICE), 5, **MASKS[3])


@pytest.mark.parametrize("causal", [False, True])
def test_zeros_among_the_first_points(causal, monkeypatch):
    """Some queries find k points at distance zero there, others must walk."""
    if INTERPRETED:
        monkeypatch.setattr(lists, "LANES", 16)
    monkeypatch.setattr(tree, "FIRST", 16 if INTERPRETED else 256)
    x = point_sets.points("underflowing", N, 2)
    x[::5] *= 3
    x[3] = float("nan")
    for k in (1, 2) if INTERPRETED else (1, 2, 16, 60):
        check(x.to(DEVICE)[None], k, lengths=torch.tensor([N - 4], device=DEVICE), check=False, causal=causal,
              include_self=k % 2 == 0)  # fmt: skip


def test_second_words(monkeypatch):
    """Points that the first word of a key cannot tell apart follow each other as the second has them."""
    monkeypatch.setattr(tree.Layout, "bits", 2)
    x = point_sets.points("uniform", 64, 3).to(DEVICE)[None]
    layout = tree.Layout.of(1, 64, 3, False)
    frame = torch.tensor([[0.5, 0.5, 0.5, 0.5]], device=DEVICE)
    keys, order = tree._sorted(x, None, layout, frame, False)
    assert layout.fine == 10 and keys.unique().numel() < 9  # an eighth of the frame holds them all
    points = x[0, order]
    assert (points[1:] - points[:-1]).norm(dim=-1).max() < 0.9 and (keys[1:] >= keys[:-1]).all()
    assert (points[1:] - points[:-1]).norm(dim=-1).mean() < 0.7 * (x[0, 1:] - x[0, :-1]).norm(dim=-1).mean()


def test_fewer_points_than_neighbors():
    for n in (1, 5):
        for mask in MASKS[1:2] if INTERPRETED else MASKS:
            check(torch.randn(3, n, 2, device=DEVICE), 6, **mask)


# ---- every pair -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [3, 21] if INTERPRETED else [1, 7, 16, 64, 65, 1000])
@pytest.mark.parametrize("shortest", [16, 128])
def test_slices(k, shortest, monkeypatch):
    """Points in several slices and in one: ties in different slices, lists that no slice can fill."""
    monkeypatch.setattr(package, "use_tree", lambda *sizes: False)
    monkeypatch.setattr(brute, "SHORTEST", shortest)
    for D, mask in ((2, MASKS[3]), (11, MASKS[0])):
        positions = torch.randn(2, N, D, device=DEVICE).round(decimals=0 if D == 2 else 3)
        positions[1, 3] = float("nan")
        positions[1, 4, 0] = -float("inf")
        lengths = torch.tensor([N, N - 9], device=DEVICE)
        check(positions, k, lengths=lengths, check=False, **mask)


def test_where_brute_force_ends():
    for B, n, M, D, a_tree in (
        (1, 8192, 8192, 3, False),
        (1, 16_384, 16_384, 3, True),
        (1, 10**6, 32, 2, False),
        (1, 10**6, 10**6, 8, True),
        (1, 32_768, 32_768, 8, False),
        (200_000, 8, 8, 3, False),
        (64, 2048, 2048, 2, True),
        (1, 10**6, 10**6, 9, False),
        (2**20, 2048, 1, 2, False),
    ):
        assert use_tree(B, n, M, D, torch.float32) == a_tree
    assert not use_tree(1, 10**6, 10**6, 2, torch.float64)


def test_slices_fill_a_gpu():
    for items, n, kept in ((64, 2048, 16), (1, 1_000_003, 1024), (31_250, 10_000, 16), (3, 5, 4), (1, 1, 4)):
        slices, size = brute.cut(items, n, kept)
        assert (slices - 1) * size < n <= slices * size and size % brute.GROUP == 0
        assert slices == 1 or size >= brute.SHORTEST and items * slices <= brute.PROGRAMS
        assert items * slices * kept * lists.LANES * 8 <= lists.MOST_MEMORY or slices == 1
    assert brute.cut(64, 2048, 16)[0] == 16


# ---- KNNIndex and warm starts ---------------------------------------------------------------------------------------
def test_index(walks, monkeypatch):
    n, k = N // 2, 4
    positions = torch.randn(2, n, 2, device=DEVICE)
    lengths = torch.tensor([n, n - 7], device=DEVICE)
    builds = []
    monkeypatch.setattr(package, "build", lambda *args: builds.append(args) or tree.build(*args))
    index = KNNIndex(positions, lengths)
    with dfn_kernels.use_backend("reference"):
        want = KNNIndex(positions, lengths).query(k)
        far = knn(positions, k, queries=-2 * positions[:, :5], lengths=lengths)
        alone = knn(positions, 2, lengths=lengths, include_self=False)
        earlier = knn(positions, 20, lengths=lengths, causal=True)
    built = len(builds)
    shuffled = torch.randint(n, (2, n, k), device=DEVICE)
    twice = want.indices[..., :1].expand(-1, -1, k).contiguous()  # as near as can be, but not k different ones
    absent = torch.full_like(shuffled, -1)
    with dfn_kernels.use_backend("triton"):
        for warm in (want.indices, shuffled, twice, *(() if INTERPRETED else (absent, absent + 2**40))):
            got = index.query(k, warm=want._replace(indices=warm))
            assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
        for got, right in ((index.query(k, -2 * positions[:, :5]), far), (index.query(2, include_self=False), alone)):
            assert same_bits(got.indices, right.indices) and same_bits(got.sq_dists, right.sq_dists)
        assert len(builds) == built, "sorted once"
        for _ in range(2):
            got = index.query(20, causal=True)
            assert same_bits(got.indices, earlier.indices) and same_bits(got.sq_dists, earlier.sq_dists)
        assert len(builds) == built + 1, "prefixes are sorted once, too"
    assert len(walks) == 5 + (0 if INTERPRETED else 2) + 2
    number = index._grids["triton"]
    del index
    assert number > 0 and number not in package._kept


# ---- what GPUs need -------------------------------------------------------------------------------------------------
class _NoLaunch:
    """Stands in for a kernel: takes any grid and arguments, and counts."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(grid)


FREE = ("empty", "new_empty", "empty_strided", "empty_like", "view", "_unsafe_view", "reshape", "expand", "detach",
        "select", "slice", "unsqueeze", "squeeze", "transpose", "as_strided")  # fmt: skip  # no work on the device


class _OneDevice(TorchDispatchMode):
    """No tensor comes from the host, none goes there. Counts the calls that do work."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", f"{func} on {x.device}"
        if func.overloadpacket.__name__ not in FREE:
            self.calls.append(func)
        return out


@pytest.fixture
def launches(monkeypatch):
    found = []
    for module in (brute, tree, walk, warm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _NoLaunch(found))
    return found


# as docs/search.md counts them, and one for the warm start
@pytest.mark.parametrize(
    "k, causal, others, started", [(7, 0, False, 7), (7, 1, False, 9), (7, 0, True, 11), (100, 1, False, 9)]
)
def test_nothing_waits_for_the_device(k, causal, others, started, launches):
    """On meta tensors, which have no values: whatever needs one on the host, or in a shape, fails. So a CUDA graph can
    capture a search. And few calls: a sort by PyTorch counts as one.
    """
    for D in (1, 2, 3, 8):
        points = torch.empty(2, 100_003, D, device="meta")
        queries = torch.empty(2, 50_021, D, device="meta") if others else None
        lengths = torch.empty(2, dtype=torch.int64, device="meta")
        found = torch.empty(2, 50_021 if others else 100_003, k, dtype=torch.int64, device="meta")
        inputs = points, queries, lengths, lengths if others else None
        launches.clear()
        with _OneDevice() as device:
            indices, sq_dists = package.knn(*inputs, k, bool(causal), not causal, found)
            assert indices.shape == sq_dists.shape == found.shape
        second_words = (3 + 3 * others) * (D > 2)
        assert len(launches) + len(device.calls) == started + second_words, (launches, device.calls)


@pytest.mark.parametrize("dtype, D, n", [(torch.float32, 3, 2003), (torch.float32, 20, 100), (torch.float64, 2, 5000)])
def test_launches_of_brute_force(dtype, D, n, launches, monkeypatch):
    monkeypatch.setattr(package, "use_tree", lambda *sizes: False)
    for k in (5, 100):
        points = torch.empty(2, n, D, device="meta", dtype=dtype)
        launches.clear()
        with _OneDevice() as device:
            package.knn(points, None, None, None, k, False, True)
        assert 1 <= len(launches) + len(device.calls) <= 3, (launches, device.calls)


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
