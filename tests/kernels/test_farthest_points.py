"""Farthest point sampling on every backend, against all distances in float64."""

import itertools

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends

import dfn_kernels
from dfn_kernels.farthest_points import farthest_points

BACKENDS = [*backends("farthest_points"), "reference"]


def by_hand(x, count, start=0):
    x, chosen = x.double(), [start]
    while len(chosen) < min(count, len(x)):
        d = (x[:, None] - x[chosen]).square().sum(-1).amin(1)
        d[chosen] = -1
        chosen.append(int((d == d.max()).nonzero()[0]))
    return chosen[: min(count, len(x))]


def offsets(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 3, 5])
def test_against_all_distances(backend, dtype, D):
    if INTERPRETED and D == 5:
        pytest.skip("slow in the interpreter")
    sizes, counts = ([0, 7, 1, 0, 12], [0, 3, 1, 2, 5]) if INTERPRETED else ([0, 57, 1, 0, 203], [0, 19, 1, 2, 31])
    ptr, out_ptr, total = offsets(sizes), offsets(counts), sum(counts)
    x = torch.randint(-8, 9, (sum(sizes), D), device=DEVICE).to(dtype)  # sums are exact; ties and copies abound
    start = torch.tensor([0, 5, 0, 3, 11], device=DEVICE)
    with dfn_kernels.use_backend(backend):
        got = [farthest_points(x, ptr, out_ptr, total), farthest_points(x, ptr, out_ptr, total, start)]
    for n, found in enumerate(got):
        want = []
        for s, size in enumerate(sizes):
            chosen = by_hand(x[ptr[s] : ptr[s + 1]], counts[s], int(start[s]) * n) if size else []
            want += [int(ptr[s]) + i for i in chosen] + [-1] * (counts[s] - len(chosen))
        assert found.tolist() == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_point_once_and_odd_ones_last(backend):
    n = 9 if INTERPRETED else 40
    x = torch.zeros(n, 2, device=DEVICE)
    x[3], x[5, 1], x[7] = 1.0, torch.nan, -torch.inf
    with dfn_kernels.use_backend(backend):
        got = farthest_points(x, offsets([n]), offsets([n]), n)
        assert got.sort().values.tolist() == list(range(n))
        assert got[:3].tolist() == [0, 3, 1]
        got = farthest_points(x, offsets([n]), offsets([2]), 2, torch.tensor([5], device=DEVICE))
        assert got.tolist() == [5, 0]  # nobody is near or far from what is not finite


def test_nothing():
    for backend in BACKENDS:
        with dfn_kernels.use_backend(backend):
            empty = torch.zeros(0, 2, device=DEVICE)
            assert farthest_points(empty, offsets([]), offsets([]), 0).shape == (0,)
            assert farthest_points(empty, offsets([0]), offsets([2]), 2).tolist() == [-1, -1]


@pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
def test_opcheck():
    x, ptr, out_ptr = torch.randn(9, 2, device=DEVICE), offsets([4, 5]), offsets([2, 3])
    backend = dfn_kernels._backends.choose("farthest_points", DEVICE)
    torch.library.opcheck(torch.ops.dfn.farthest_points, (x, ptr, out_ptr, None, 5, backend))
