import copy
import pickle
import threading

import numpy as np
import point_sets
import pytest
import torch

import dfn_kernels

pytest.importorskip("dfn_kernels._host", reason="the host module is not built")
from dfn_kernels import StreamingKNN  # noqa: E402


def want(points: np.ndarray, k: int):
    """Of every point, the k nearest earlier ones."""
    with dfn_kernels.use_backend("reference"):
        found = dfn_kernels.knn(torch.from_numpy(points), k, causal=True, include_self=False, check=False)
    return found.indices.numpy(), found.sq_dists.numpy()


def same(ours, theirs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("name", point_sets.NAMES)
def test_append_one_by_one(name):
    for D, k in ((1, 3), (2, 16), (3, 40), (5, 1)):
        points = np.stack([point_sets.points(name, 600, D).numpy() for _ in range(2)])
        index = StreamingKNN(2, D)
        steps = [index.append(points[:, i], k) for i in range(600)]
        got = [np.stack([step[part] for step in steps], 1) for part in (0, 1)]
        assert same(got, want(points, k))


def test_extend_and_query():
    points = np.random.default_rng(0).normal(size=(3, 5000, 2)).round(2).astype(np.float32)
    index = StreamingKNN(3, 2)
    for a, b in ((0, 1), (1, 700), (700, 701), (701, 1000), (1000, 5000), (5000, 5000)):
        index.extend(points[:, a:b])
        assert len(index) == b
    with dfn_kernels.use_backend("reference"):
        found = dfn_kernels.knn(torch.from_numpy(points), 9, queries=torch.from_numpy(points[:, ::50].copy()))
    want = (found.indices.numpy(), found.sq_dists.numpy())
    assert same(index.query(points[:, ::50], 9), want)
    assert same(index.query(points[:, 50], 9), (want[0][:, 1], want[1][:, 1]))
    assert np.array_equal(index.points, points)


def test_float64_and_narrower_floats():
    points = np.random.default_rng(0).normal(size=(1, 300, 3))
    index = StreamingKNN(1, 3, dtype="float64")
    steps = [index.append(points[:, i], 4) for i in range(300)]
    assert same([np.stack([s[part] for s in steps], 1) for part in (0, 1)], want(points, 4))
    half = points.astype(np.float16)
    index = StreamingKNN(1, 3)
    index.extend(half)
    assert same(index.query(half[:, 7], 2), StreamingKNN.query(copy.copy(index), half[:, 7].astype(np.float32), 2))
    with pytest.raises(TypeError, match="points must be float32 or narrower floats, got float64"):
        index.extend(points)


def test_not_finite():
    points = np.random.default_rng(0).normal(size=(1, 200, 2)).astype(np.float32)
    points[0, 3], points[0, 50, 1], points[0, 51, 0] = np.nan, np.inf, -np.inf
    index = StreamingKNN(1, 2)
    steps = [index.append(points[:, i], 5) for i in range(200)]
    assert same([np.stack([s[part] for s in steps], 1) for part in (0, 1)], want(points, 5))
    assert len(index) == 200


def test_pickles_and_copies_go_their_own_way():
    points = np.random.default_rng(0).normal(size=(2, 400, 3)).astype(np.float32)
    index = StreamingKNN(2, 3)
    index.extend(points[:, :300])
    twins = [pickle.loads(pickle.dumps(index)), copy.copy(index), copy.deepcopy(index)]
    results = [[twin.append(points[:, i], 6) for i in range(300, 400)] for twin in [index, *twins]]
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))
    twins[0].extend(points)
    assert len(twins[0]) == 800 and len(index) == 400
    assert repr(index) == "StreamingKNN(streams=2, dim=3, dtype='float32') with 400 points"


def test_threads_wait_for_each_other():
    points = np.random.default_rng(0).normal(size=(1, 4000, 2)).astype(np.float32)
    index = StreamingKNN(1, 2)

    def work(part):
        for i in range(part, 4000, 4):
            index.append(points[:, i], 3)
            index.query(points[:, i], 3)

    workers = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(index) == 4000
    assert np.array_equal(np.sort(index.points[0], 0), np.sort(points[0], 0))
    found = dfn_kernels.knn(torch.from_numpy(index.points), 7, queries=torch.from_numpy(points[:, :100].copy()))
    assert same(index.query(points[:, :100], 7), (found.indices.numpy(), found.sq_dists.numpy()))


def test_empty():
    index = StreamingKNN(0, 2)
    assert index.append(np.zeros((0, 2), np.float32), 3)[0].shape == (0, 3)
    ids, dists = StreamingKNN(2, 2).query(np.zeros((2, 2), np.float32), 3)
    assert (ids == -1).all() and np.isinf(dists).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.append(np.zeros((2, 3), np.float32), 0), ValueError, "k must be between 1 and 1024, got 0"),
        (lambda i: i.append(np.zeros((2, 2), np.float32), 1), ValueError, r"\[S, D\] with S = 2, D = 3, got \[2, 2\]"),
        (lambda i: i.append(np.zeros((2, 3)), 1), TypeError, "must be float32 or narrower floats, got float64"),
        (lambda i: i.append(np.zeros((2, 3), int), 1), TypeError, "got int64"),
        (lambda i: i.append(torch.zeros(2, 3), 1), TypeError, "append: points must be a NumPy array, got Tensor"),
        (lambda i: i.extend([[[0.0] * 3]] * 2), TypeError, "extend: points must be a NumPy array, got list"),
        (lambda i: i.query(None, 1), TypeError, "query: points must be a NumPy array, got NoneType"),
        (lambda i: i.extend(np.zeros((2, 3), np.float32)), ValueError, r"extend: points must have shape \[S, n, D\]"),
        (lambda i: i.query(np.zeros((3, 1, 3), np.float32), 1), ValueError, r"got \[3, 1, 3\]"),
        (lambda i: StreamingKNN(2, 0), ValueError, "dim must be between 1 and 2\\^31 - 1, got 0"),
        (lambda i: StreamingKNN(2, 2**32), ValueError, "dim must be between 1 and 2\\^31 - 1, got 4294967296"),
        (lambda i: StreamingKNN(-1, 2), ValueError, "streams must not be negative, got -1"),
        (lambda i: StreamingKNN(1, 2, dtype="int32"), TypeError, "dtype must be float32 or float64, got int32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^StreamingKNN.*" + message):
        call(StreamingKNN(2, 3))


GOOD = (2, 3, np.dtype("float32"), np.zeros((2, 5, 3), np.float32))
CORRUPT = {
    "empty": (),
    "short": GOOD[:3],
    "streams": (3, *GOOD[1:]),
    "no streams": (-1, *GOOD[1:]),
    "more streams than memory": (2**60, *GOOD[1:]),
    "dim": (2, 2, *GOOD[2:]),
    "dim 0": (2, 0, *GOOD[2:]),
    "dim 2^32": (2, 2**32, *GOOD[2:]),
    "dtype": (2, 3, np.dtype("int8"), GOOD[3]),
    "wider points": (2, 3, np.dtype("float32"), GOOD[3].astype(np.float64)),
    "flat points": (*GOOD[:3], GOOD[3].ravel()),
    "scalar points": (*GOOD[:3], np.float32(1)),
    "objects": (*GOOD[:3], np.full((2, 5, 3), None)),
    "no array": (*GOOD[:3], "x"),
    "words": ("a", "b", "c", "d"),
}


@pytest.mark.parametrize("state", CORRUPT)
def test_corrupt_pickles(state):
    """An error, or an index that works: never a crash."""
    index = StreamingKNN.__new__(StreamingKNN)
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, MemoryError)):
        index.__setstate__(CORRUPT[state])
    index = StreamingKNN.__new__(StreamingKNN)
    index.__setstate__(GOOD)
    assert len(index) == 5 and index.query(np.zeros((2, 3), np.float32), 2)[0].tolist() == [[0, 1], [0, 1]]
