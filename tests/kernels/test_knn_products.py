"""The search by products (docs/search.md, Many dimensions): the bits of the reference, on what it could get wrong."""

from concurrent.futures import ThreadPoolExecutor

import point_sets
import pytest
import torch
from helpers import INTERPRETED, MASKS, backends, check_on_instruction_set, check_same, same_bits
from torch.nn.functional import normalize

from dfn_kernels import KNNIndex, knn

pytestmark = pytest.mark.skipif(
    INTERPRETED or "native" not in backends("knn") or torch.cuda.is_available(), reason="about the C++ kernels"
)


def two_far_clusters(n, D):
    """Products lose the distances within either: norms are 1e4 times those."""
    return 100.0 * torch.randint(2, (n, 1)) + torch.randn(n, D)


def one_far_outlier(n, D):
    x = torch.randn(n, D)
    x[n // 3] *= 1e15
    return x


def near_copies(n, D):
    x = torch.randn(n, D)
    x[n // 2 :] = x[: n - n // 2] + 1e-4 * torch.randn(n - n // 2, D)
    return x[torch.randperm(n)]


def any_norm(n, D):
    return torch.randn(n, D) * 10 ** (76 * torch.rand(n, 1) - 38)


SETS = {
    "normal": torch.randn,
    "of length one": lambda n, D: normalize(torch.randn(n, D), dim=1),
    "far from the origin": lambda n, D: 100 + 1e-3 * torch.randn(n, D),
    "two far clusters": two_far_clusters,
    "one far outlier": one_far_outlier,
    "near copies": near_copies,
    "corners": lambda n, D: torch.eye(D)[torch.randint(D, (n,))],  # all others at one distance
    "integers": lambda n, D: torch.randint(-1, 2, (n, D)).float(),
    "any norm": any_norm,
    "near the longest": lambda n, D: 2.0**58 * torch.randn(n, D) * (1 + 3 * torch.rand(n, 1)),
    **{name: lambda n, D, name=name: point_sets.points(name, n, D) for name in
       ("clusters", "half identical", "identical", "256 positions", "overflowing", "denormal", "underflowing",
        "signed zeros", "diagonal", "sorted")},
}  # fmt: skip


def enough(D, k):
    """So many points that products serve, an odd number of them."""
    return (10_000 + 2000 * k) // (D - 16) + 1 | 1


@pytest.mark.parametrize("name", SETS)
def test_hostile_sets(name):
    for i, (D, n, k) in enumerate(((64, 701, 7), (257, 301, 16), (100, 461, 1))):
        x = SETS[name](n, D)
        check_same("native", x, k, **MASKS[(len(name) + i) % 4])
        if i != 1:
            check_same("native", x.double() * (1 + 1e-9 * torch.randn(n, D)), k, **MASKS[(len(name) + i + 1) % 4])


@pytest.mark.parametrize("D", [17, 31, 64, 257, 768])
def test_dimensions(D):
    k = 3
    n = max(enough(D, k), 233) if D > 17 else 233  # there by comparing every pair
    for mask in MASKS:
        check_same("native", torch.randn(2, n, D), k, **mask)
    check_same("native", torch.rand(n, D, dtype=torch.float64), k)


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1e-1, 1.0, 10.0])
def test_where_products_are_wrong(spread):
    """Their order is not that of the distances, and theirs is not used."""
    n, D, k = 601, 96, 5
    far = torch.where(torch.arange(n) % 3 > 0, 0.0, 100.0)[:, None]  # the centre lies in one of the clusters
    x = (far + spread * torch.randn(n, D))[torch.randperm(n)]
    got = check_same("native", x, k)
    norms = x.square().sum(1)
    by_products = (norms - 2 * x @ x.T).topk(k, largest=False).indices
    assert spread > 1 or not torch.equal(by_products.sort().values, got.indices.sort().values)


def test_precision_of_matrix_products():
    x = torch.randn(501, 200)
    before = torch.get_float32_matmul_precision()
    want = check_same("native", x, 9)
    try:
        torch.set_float32_matmul_precision("medium")
        got = knn(x, 9)
    finally:
        torch.set_float32_matmul_precision(before)
    assert same_bits(got.sq_dists, want.sq_dists) and torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_and_an_index(dtype):
    x = torch.randn(2, 533, 90, dtype=dtype)
    index = KNNIndex(x)
    for m in (0, 1, 15, 130):
        queries = torch.cat([x[:, : m // 2], 2 * torch.randn(2, m - m // 2, 90, dtype=dtype)], 1)
        want = check_same("native", x, 11, queries=queries)
        got = index.query(11, queries)
        assert same_bits(got.sq_dists, want.sq_dists) and torch.equal(got.indices, want.indices)
    for k in (1, 13, 200):  # the last by comparing every pair
        for mask in MASKS[::3]:
            want, got = check_same("native", x, k, **mask), index.query(k, **mask)
            assert same_bits(got.sq_dists, want.sq_dists) and torch.equal(got.indices, want.indices)


def test_large_k():
    x = torch.randn(7301, 300)
    for k in (300, 1024):
        check_same("native", x, k, queries=torch.randn(21, 300))


def test_ragged_and_packed_sets():
    x = torch.randn(3, 611, 90)
    x[1, 400:] = float("nan")  # padding
    lengths = torch.tensor([611, 400, 5])
    check_same("native", x, 6, lengths=lengths)
    check_same("native", x, 6, lengths=lengths, queries=torch.randn(3, 57, 90), query_lengths=torch.tensor([0, 57, 3]))
    x = torch.cat([x[0], two_far_clusters(701, 90)])
    ptr = torch.tensor([0, 0, 300, 304, 900, len(x)])
    for mask in MASKS:
        check_same("native", x, 4, ptr=ptr, **mask)
    check_same("native", x, 4, ptr=ptr, queries=x[:500], query_ptr=torch.tensor([0, 2, 200, 201, 450, 500]))


def test_not_finite():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(401, 128, dtype=dtype)
        x[0, 127], x[57, 0], x[400, 60] = float("nan"), float("inf"), -float("inf")
        for mask in MASKS:
            got = check_same("native", x, 8, check=False, **mask)
            assert got.indices[[0, 57, 400]].eq(-1).all()
    check_same("native", torch.full((301, 128), float("nan")), 3, check=False)


def test_within_a_radius():
    x = torch.randn(1, 403, 150)
    within = check_same("native", x, 9).sq_dists.median().item()  # not below: that pair is out
    got, want = (torch.ops.dfn.knn(x, None, None, None, 9, False, True, True, None, 0, backend, within=within)
                 for backend in ("native", "reference"))  # fmt: skip
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1]) and want[1].eq(-1).any()


def test_threads_and_float_modes():
    x = torch.cat([torch.randn(700, 64), 1e-39 * torch.randn(500, 64), torch.eye(64).repeat(4, 1)])
    want = check_same("native", x, 9)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.set_flush_denormal(count == 2)
            got = knn(x, 9)
            assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as callers:
        for got in callers.map(lambda _: knn(x, 9), range(8)):
            assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Every instruction set gives the bits of the reference (one that is missing here falls back)."""
    code = """
import torch, test_knn_products as t
torch.manual_seed(1)
for i, name in enumerate(("two far clusters", "corners", "any norm", "underflowing")):
    x = t.SETS[name](333, 131)
    t.check_same("native", x, 11, **t.MASKS[i % 4])
    t.check_same("native", x.double(), 5, **t.MASKS[(i + 1) % 4])
"""
    check_on_instruction_set(isa, code)
