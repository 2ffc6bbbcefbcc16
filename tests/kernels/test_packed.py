"""Packed sets: every op with `ptr` is the op on each set alone."""

import itertools

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits

import dfn_kernels as dk
from dfn_kernels.packed import offsets_of_batch, place_in_set, set_of_rows

BACKENDS = backends("knn")
MASKS = [dict(causal=c, include_self=s) for c in (False, True) for s in (True, False)]
# Empty ones first, last and between; one of a single row; one that takes the grid among small ones.
SIZES = [0, 1, 5, 0, 0, 17, 2, 23, 0] if INTERPRETED else [0, 3, 1, 0, 17, 0, 0, 40, 800, 2, 0]


def offsets(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], device=DEVICE)


def each_set(positions, k, ptr, queries=None, query_ptr=None, **options):
    """The same by one search per set."""
    own = queries is None
    found = []
    for s in range(len(ptr) - 1):
        x = positions[..., ptr[s] : ptr[s + 1], :]
        q = None if own else queries[..., query_ptr[s] : query_ptr[s + 1], :]
        with dk.use_backend("reference"):
            near = dk.knn(x, k, queries=q, **options)
        found.append((near.indices.where(near.indices < 0, near.indices + ptr[s]), near.sq_dists))
    return dk.Neighbors(*(torch.cat(part, -2) for part in zip(*found, strict=True)))


def check(backend, positions, k, ptr, **options):
    with dk.use_backend(backend):
        got = dk.knn(positions, k, ptr=ptr, **options)
    want = each_set(positions, k, ptr, **options)
    assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
    return got


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
def test_knn_is_each_set_alone(backend, dtype, mask):
    ptr = offsets(SIZES)
    for D, k in ((2, 5),) if INTERPRETED else ((1, 1), (2, 5), (3, 16), (9, 70)):
        positions = torch.randn(int(ptr[-1]), D, dtype=dtype, device=DEVICE).round(decimals=1)
        got = check(backend, positions, k, ptr, **mask)
        sets = set_of_rows(ptr, len(positions))
        assert (sets[got.indices.clamp(min=0)] == sets[:, None])[got.indices >= 0].all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_knn_with_queries_and_leading_dims(backend):
    ptr = offsets(SIZES)
    sizes = SIZES[::-1]
    query_ptr = offsets(sizes)
    positions = torch.randn(2, int(ptr[-1]), 3, device=DEVICE)
    queries = torch.randn(2, int(query_ptr[-1]), 3, device=DEVICE)
    check(backend, positions, 4, ptr, queries=queries, query_ptr=query_ptr)
    check(backend, positions.unsqueeze(1), 3, ptr, causal=True)
    strided = positions.transpose(0, 1).contiguous().transpose(0, 1)
    check(backend, strided, 3, torch.stack([ptr, ptr], 1)[:, 0])
    for empty in ([], [0], [0, 0, 0]):  # no set, and sets without rows
        got = check(backend, positions[:, :0], 3, offsets(empty)) if empty else dk.knn(
            positions[:, :0], 3, ptr=offsets([])
        )  # fmt: skip
        assert got.indices.shape == (2, 0, 3)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_not_finite_stays_in_its_set(backend):
    ptr = offsets([4, 6, 0, 3])
    positions = torch.randn(13, 2, device=DEVICE)
    positions[5, 1], positions[11, 0] = torch.nan, torch.inf
    with dk.use_backend(backend):
        got = dk.knn(positions, 3, ptr=ptr, check=False)
        assert same_bits(got.indices[:4], dk.knn(positions[:4], 3).indices)
    assert got.indices[5].eq(-1).all() and got.indices[11].eq(-1).all()
    assert not torch.isin(got.indices, torch.tensor([5, 11], device=DEVICE)).any()
    check(backend, positions, 3, ptr, check=False)


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the scheduling of the C++ search")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_huge_among_thousands(threads):
    sizes = [8] * 700 + [40_000] + [int(x) for x in torch.randint(0, 30, (2000,))] + [5_000, 70]
    ptr = offsets(sizes)
    positions = torch.rand(int(ptr[-1]), 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = dk.knn(positions, 6, ptr=ptr)
        index = dk.KNNIndex(positions, ptr=ptr)
        again = [index.query(6), index.query(6, queries=positions, query_ptr=ptr)]
    finally:
        torch.set_num_threads(before)
    for other in again:
        assert same_bits(got.indices, other.indices) and same_bits(got.sq_dists, other.sq_dists)
    for s in [*range(700, 1200), len(sizes) - 2, len(sizes) - 1]:
        a, e = int(ptr[s]), int(ptr[s + 1])
        alone = dk.knn(positions[a:e], 6)
        assert torch.equal(got.indices[a:e], alone.indices.where(alone.indices < 0, alone.indices + a))
        assert torch.equal(got.sq_dists[a:e], alone.sq_dists)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_of_distances(backend):
    ptr, query_ptr = offsets([3, 0, 4]), offsets([2, 1, 3])
    positions = torch.randn(7, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    queries = torch.randn(6, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def distances(p, q):
        with dk.use_backend(backend):
            found = dk.knn(p, 2, queries=q, ptr=ptr, query_ptr=query_ptr)
        return found.sq_dists.where(found.indices >= 0, 0)

    assert torch.autograd.gradcheck(distances, (positions, queries))
    assert torch.autograd.gradgradcheck(distances, (positions, queries))


def test_index():
    ptr = offsets(SIZES)
    positions = torch.randn(int(ptr[-1]), 3, device=DEVICE)
    for backend in BACKENDS:
        index = dk.KNNIndex(positions, ptr=ptr)
        for options in MASKS:
            with dk.use_backend(backend):
                got = index.query(4, **options)
            assert same_bits(got.indices, each_set(positions, 4, ptr, **options).indices)
    with pytest.raises(ValueError, match="query_ptr must be given with queries and ptr"):
        index.query(4, queries=positions)


def test_offsets_of_rows():
    ptr = torch.tensor([0, 0, 3, 3, 5])
    assert set_of_rows(ptr, 5).tolist() == [1, 1, 1, 3, 3] and place_in_set(ptr, 5).tolist() == [0, 1, 2, 0, 1]
    assert offsets_of_batch(torch.tensor([1, 1, 1, 3, 3]), 4).tolist() == ptr.tolist()
    assert set_of_rows(torch.tensor([0]), 0).tolist() == []


@pytest.mark.parametrize(
    ("ptr", "options", "error", "message"),
    [
        ([0.0, 5.0], {}, TypeError, "knn: ptr must be int64, got torch.float32"),
        ([[0, 5]], {}, ValueError, r"knn: ptr must have shape \[S \+ 1\], got \[1, 2\]"),
        ([], {}, TypeError, "knn: ptr must be int64"),
        ([0, 4], {}, ValueError, "knn: ptr must go from 0 to the number of rows, 5, got 0 to 4"),
        ([1, 5], {}, ValueError, "knn: ptr must go from 0 to the number of rows, 5, got 1 to 5"),
        ([0, 4, 2, 5], {}, ValueError, "knn: ptr must ascend, got 4 before 2 in place 1"),
        ([0, 5], dict(lengths=torch.tensor(5)), ValueError, "knn: lengths must be None with ptr"),
        ([0, 5], dict(query_ptr=torch.tensor([0, 5])), ValueError, "knn: query_ptr must be None without queries"),
        ([0, 5], dict(queries=torch.zeros(3, 2)), ValueError, "knn: query_ptr must be given with queries and ptr"),
        ([0, 5], dict(queries=torch.zeros(3, 2), query_ptr=torch.tensor([0, 1, 3])), ValueError,
         r"query_ptr must have as many offsets as ptr, \[S \+ 1\] = \[2\], got \[3\]"),
        ([0, 5], dict(queries=torch.zeros(3, 2), query_ptr=torch.tensor([0, 4])), ValueError,
         "knn: query_ptr must go from 0 to the number of rows, 3, got 0 to 4"),
    ],
)  # fmt: skip
@pytest.mark.skipif(DEVICE != "cpu", reason="offsets are looked at on the CPU only")
def test_bad_offsets(ptr, options, error, message):
    with pytest.raises(error, match=message):
        dk.knn(torch.randn(5, 2), 1, ptr=torch.tensor(ptr), **options)
