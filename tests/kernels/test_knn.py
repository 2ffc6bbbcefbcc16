import copy

import point_sets
import pytest
import torch
from helpers import (
    DEVICE,
    INTERPRETED,
    MASKS,
    backends,
    check_compiled,
    check_on_instruction_set,
    check_same,
    same_bits,
)

import dfn_kernels
from dfn_kernels import KnnFunction, KNNIndex, knn

BACKENDS = backends("knn")
N_SMALL = 24 if INTERPRETED else 900  # the interpreter is slow; natively, enough points for the grid


def reference(*args, **options):
    with dfn_kernels.use_backend("reference"):
        return knn(*args, **options)


def check_rows(positions, k, got, rows, causal=False, include_self=True):
    """The sampled rows of a large search: against all points, each compared directly."""
    for i in rows.tolist():
        total = 0
        for d in range(positions.shape[1]):
            step = positions[:, d] - positions[i, d]
            total = total + step * step
        if causal:
            total[i + 1 :] = torch.inf
        if not include_self:
            total[i] = torch.inf
        values, order = total.sort(stable=True)
        order = order[:k].masked_fill(values[:k].isinf(), -1)
        assert torch.equal(got.indices[i], order) and torch.equal(got.sq_dists[i], values[:k])


# ---- against the reference ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", point_sets.NAMES[9::3] if INTERPRETED else point_sets.NAMES)
def test_hostile_sets(backend, name):
    for D, n, k in ((2, 19, 3),) if INTERPRETED else ((1, 801, 5), (2, 1301, 16), (3, 1001, 37), (5, 801, 1)):
        positions = point_sets.points(name, n, D).to(DEVICE)
        for mask in MASKS if D == 2 and not INTERPRETED else [MASKS[(len(name) + D) % 4]]:
            check_same(backend, positions, k, **mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    for mask in MASKS[::2] if INTERPRETED else MASKS:
        positions = torch.randn(1, 7 if INTERPRETED else N_SMALL // 2, 3, device=DEVICE).to(dtype)
        got = check_same(backend, positions, 5, **mask)
        assert got.sq_dists.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 4, 7, 8, 13, 16, 17, 32, 33, 64, 65, 128, 1000, 1024])
def test_k(backend, k):
    if INTERPRETED and k not in (2, 17, 65):
        pytest.skip("minutes in the interpreter")
    n = 12 if INTERPRETED else 1500 if k > 100 else N_SMALL
    for dtype in (torch.float32, torch.float64) if not INTERPRETED else (torch.float32,):
        check_same(backend, torch.randn(n, 2, dtype=dtype, device=DEVICE).round(decimals=1), k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 2, 3, 4, 6, 8, 9, 17])
def test_dimensions_and_batches(backend, D):
    if INTERPRETED and D not in (1, 3, 6):
        pytest.skip("slow in the interpreter")
    n = 13 if INTERPRETED else 811
    check_same(backend, torch.randn(3, n, D, device=DEVICE), 6)
    if not INTERPRETED:
        check_same(backend, torch.randn(2, 1, n, D, device=DEVICE).double(), 3, include_self=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 15, 16, 17, 767, 769])
def test_few_points(backend, n):
    if INTERPRETED and n not in (0, 1, 3):
        pytest.skip("slow in the interpreter")
    for k in (1, 4, n + 1):
        for mask in MASKS:
            check_same(backend, torch.randn(2, n, 2, device=DEVICE), k, **mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries(backend):
    n = N_SMALL
    positions = torch.randn(2, n, 2, device=DEVICE)
    for m in (0, 1, 11, 19) if INTERPRETED else (0, 1, 63, 500):
        check_same(backend, positions, 5, queries=3 * torch.randn(2, m, 2, device=DEVICE))
    check_same(backend, positions[:, :0], 5, queries=positions)
    for name in ("lattice", "clusters", "denormal") if not INTERPRETED else ():
        positions = point_sets.points(name, 2000, 3).to(DEVICE)
        queries = torch.cat([positions[:300], torch.rand(300, 3, device=DEVICE), positions.new_full((2, 3), 1e-39)])
        check_same(backend, positions, 7, queries=queries)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend):
    n = N_SMALL
    positions = torch.randn(4, n, 3, device=DEVICE)
    lengths = torch.tensor([0, 1, n // 2, n], device=DEVICE)
    positions[2, n // 2 :] = float("nan")  # padding may hold anything
    for mask in MASKS[::3] if INTERPRETED else MASKS:
        got = check_same(backend, positions, 4, lengths=lengths, **mask)
        assert got.indices[0].eq(-1).all() and got.sq_dists[2, n // 2 :].isinf().all()
    queries = torch.randn(4, 7, 3, device=DEVICE)
    got = check_same(backend, positions, 4, lengths=lengths, queries=queries,
                     query_lengths=torch.tensor([7, 6, 5, 0], device=DEVICE))  # fmt: skip
    assert got.indices[3].eq(-1).all() and got.indices[2, :5].ge(0).all()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_not_finite(backend):
    positions = torch.randn(N_SMALL, 2, device=DEVICE)
    positions[3, 0], positions[7, 1], positions[8] = float("nan"), float("inf"), -float("inf")
    bad = [3, 7, 8]
    for mask in MASKS[:1] if INTERPRETED else MASKS:
        got = check_same(backend, positions, 6, check=False, **mask)
        assert got.indices[bad].eq(-1).all() and got.sq_dists[bad].isinf().all()
        assert not torch.isin(got.indices, torch.tensor(bad, device=DEVICE)).any()
    check_same(backend, positions, 3, check=False, queries=positions)
    if DEVICE == "cpu":
        message = "knn: positions must be finite.* row 3 of"
        with dfn_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
            knn(positions, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dims_and_strides(backend):
    x = torch.randn(2, 3, 19, 2, device=DEVICE)
    with dfn_kernels.use_backend(backend):
        want = knn(x, 4)
        strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        one_by_one = [torch.stack([torch.stack([knn(a, 4)[i] for a in y]) for y in x]) for i in (0, 1)]
        for got in (knn(strided, 4), one_by_one):
            assert same_bits(got[0], want.indices) and same_bits(got[1], want.sq_dists)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_by_perturbation(backend):
    """What comes later does not change a bit of what is earlier."""
    positions = torch.randn(N_SMALL, 2, device=DEVICE)
    cut = N_SMALL // 2 + 3
    changed = positions.clone()
    changed[cut:] = torch.randn_like(changed[cut:]) * 0.1
    with dfn_kernels.use_backend(backend):
        before, after = knn(positions, 5, causal=True), knn(changed, 5, causal=True)
    assert torch.equal(before.indices[:cut], after.indices[:cut])
    assert same_bits(before.sq_dists[:cut], after.sq_dists[:cut])
    assert not torch.equal(before.indices[cut:], after.indices[cut:])


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the C++ kernels")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Every instruction set gives the bits of the reference (one that is missing here falls back)."""
    code = """
import torch, test_knn, point_sets
torch.manual_seed(1)
for name in ("lattice", "256 positions", "overflowing"):
    for D, k in ((1, 3), (2, 16), (3, 40), (7, 1)):
        p = point_sets.points(name, 800, D)
        for mask in test_knn.MASKS[::3]:
            test_knn.check_same("native", p, k, **mask)
        test_knn.check_same("native", p.double(), k)
"""
    check_on_instruction_set(isa, code)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "native"])
def test_same_bits_with_any_threads_and_float_modes(backend):
    positions = torch.cat([torch.randn(3000, 3), 1e-39 * torch.randn(3000, 3)])
    before = copy.deepcopy(positions)
    want = check_same(backend, positions, 9)
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        torch.set_flush_denormal(count == 2)
        got = knn(positions, 9)
        torch.set_flush_denormal(False)
        assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
    torch.set_num_threads(threads)
    assert same_bits(positions, before)


# ---- gradients and the machinery around the op ----------------------------------------------------------------------
@pytest.mark.skipif(INTERPRETED, reason="the backward pass is the same PyTorch code for every backend")
@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_gradients(backend):
    p = torch.rand(2, 9, 2, dtype=torch.float64, device=DEVICE).requires_grad_()
    q = torch.rand(2, 5, 2, dtype=torch.float64, device=DEVICE).requires_grad_()
    lengths = torch.tensor([2, 9], device=DEVICE)

    def sums(p, q=None, **options):  # inf - inf has no finite difference
        found = knn(p, 3, queries=q, **options).sq_dists
        return found.where(found.isfinite(), 0)

    with dfn_kernels.use_backend(backend):
        cases = ((p,), {}), ((p,), dict(causal=True, include_self=False)), ((p, q), dict(lengths=lengths))
        for args, options in cases:
            assert torch.autograd.gradcheck(lambda *a, o=options: sums(*a, **o), args, fast_mode=INTERPRETED)
        assert torch.autograd.gradgradcheck(sums, (p, q), fast_mode=INTERPRETED)
        found = knn(p, 3, causal=True)
        assert not found.indices.requires_grad
        (grad,) = torch.autograd.grad(found.sq_dists.sum(), p)  # missing neighbours: 0, not NaN
        assert grad.isfinite().all() and grad.abs().sum() > 0
        via_function = KnnFunction.apply(p, q, None, None, 3, False, True, True, None, 0, backend)
        assert same_bits(via_function[0], knn(p, 3, queries=q).sq_dists)
        assert torch.autograd.grad(via_function[0].sum(), q)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    p = torch.rand(2, 9, 2, device=DEVICE).requires_grad_()
    q = torch.rand(2, 5, 2, device=DEVICE).requires_grad_()
    lengths = torch.tensor([2, 9], device=DEVICE)
    torch.library.opcheck(torch.ops.dfn.knn, (p, None, lengths, None, 2, True, False, True, None, 0, backend))
    torch.library.opcheck(torch.ops.dfn.knn, (p, q, None, None, 2, False, True, True, None, 0, backend))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
def test_compile(backend):
    def nearest(x):
        found = knn(x.tanh(), 3, causal=True, include_self=False)
        return found.sq_dists.where(found.indices >= 0, 0).sum(-1)

    compiled = torch.compile(nearest, fullgraph=True, dynamic=True)
    for n in (13, 29):
        check_compiled(nearest, compiled, [torch.randn(2, n, 2, device=DEVICE)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_positions_alone(backend):
    positions = torch.randn(30, 3, device=DEVICE)
    with dfn_kernels.use_backend(backend):
        want = knn(positions, 4)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = knn(positions, 4)
    assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)


# ---- KNNIndex -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_index(backend):
    n, k = (12, 4) if INTERPRETED else (200, 6) if backend == "reference" else (1100, 6)
    positions = torch.randn(2, n, 3, device=DEVICE)
    queries = torch.randn(2, 11, 3, device=DEVICE)
    lengths = torch.tensor([n, n - 7], device=DEVICE)
    index = KNNIndex(positions, lengths)
    moved = KNNIndex(positions + 0.01 * torch.randn_like(positions), lengths)
    wrong = [torch.full((2, n, k), value, device=DEVICE) for value in (0, -1, n, 2**40)]
    wrong.append(torch.randint(n, (2, n, k), device=DEVICE))
    with dfn_kernels.use_backend(backend):
        for mask in MASKS[:1] if INTERPRETED else MASKS:
            found = index.query(k, **mask)
            want = reference(positions, k, lengths=lengths, **mask)
            assert same_bits(found.indices, want.indices) and same_bits(found.sq_dists, want.sq_dists)
            want = reference(moved.positions, k, lengths=lengths, **mask)
            for warm in [found.indices, *wrong]:
                got = moved.query(k, **mask, warm=found._replace(indices=warm))
                assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
        got, want = index.query(k, queries), reference(positions, k, queries=queries, lengths=lengths)
        assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
        with pytest.raises(ValueError, match="knn: causal must be False with queries"):
            index.query(k, queries, causal=True)
        with pytest.raises(ValueError, match=r"knn: warm.indices must have shape"):
            index.query(k + 1, warm=found)


@pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter; test_knn_triton.py has smaller ones")
def test_index_on_hostile_sets():
    for name in ("denormal", "underflowing", "256 positions", "lattice", "line 0"):
        positions = point_sets.points(name, 1700, 2).to(DEVICE)
        index = KNNIndex(positions)
        queries = torch.rand(99, 2, device=DEVICE)
        causal = [(k, dict(causal=True, include_self=s)) for k, s in ((5, True), (2, False))]  # sorted once for both
        for k, options in ((3, {}), (20, dict(include_self=False)), (70, dict(queries=queries)), *causal):
            got, want = index.query(k, **options), reference(positions, k, **options)
            assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)
    other = copy.copy(index)
    del index  # the grid is forgotten with it; the copy searches without
    assert same_bits(other.query(5).indices, knn(positions, 5).indices)


# ---- large ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not BACKENDS or INTERPRETED, reason="neither the reference nor the interpreter gets that far")
@pytest.mark.parametrize("D", [2, 3])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("clusters", "256 positions") else pytest.mark.slow)
                                  for n in point_sets.NAMES if n != "underflowing" or DEVICE == "cpu"])  # fmt: skip
def test_million(name, D):
    """No point outside is nearer, ties by index, for sampled queries."""
    positions = point_sets.points(name, 1_000_000, D).to(DEVICE)
    rows = torch.randint(len(positions), (12,))
    for mask in (MASKS[0], MASKS[2]):
        check_rows(positions, 16, knn(positions, 16, **mask), rows, **mask)


@pytest.mark.slow
@pytest.mark.skipif(not BACKENDS or INTERPRETED, reason="neither the reference nor the interpreter gets that far")
def test_output_past_2_to_31_bytes():
    positions = torch.rand(300_000, 2, device=DEVICE)
    got = knn(positions, 1000)
    assert got.indices.numel() * 8 > 2**31
    rows = torch.cat([torch.randint(len(positions), (5,)), torch.tensor([len(positions) - 1])])
    check_rows(positions, 1000, got, rows)


# ---- bad input ------------------------------------------------------------------------------------------------------
BAD = {
    "not a tensor": (dict(positions=[[0.0]]), TypeError, "positions must be a tensor, got list"),
    "dtype": (dict(positions=torch.zeros(3, 2, dtype=torch.int64)), TypeError, "positions must be float"),
    "one dim": (dict(positions=torch.zeros(3)), ValueError, r"positions must have shape \[.., N, D\], got \[3\]"),
    "D = 0": (dict(positions=torch.zeros(3, 0)), ValueError, "got D = 0"),
    "k = 0": (dict(k=0), ValueError, "k must be between 1 and 1024, got 0"),
    "k = 1025": (dict(k=1025), ValueError, "k must be between 1 and 1024, got 1025"),
    "k = 2.0": (dict(k=2.0), TypeError, "k must be an integer, got float"),
    "k = True": (dict(k=True), TypeError, "k must be an integer, got bool"),
    "queries: D": (dict(queries=torch.zeros(2, 5, 3)), ValueError, r"queries must have shape \[.., M, D\]"),
    "queries: dims": (dict(queries=torch.zeros(5, 2)), ValueError, "queries must have shape"),
    "queries: causal": (dict(queries=torch.zeros(2, 5, 2), causal=True), ValueError, "causal must be False with"),
    "queries: self": (dict(queries=torch.zeros(2, 5, 2), include_self=False), ValueError, "include_self must be True"),
    "queries: NaN": (dict(queries=torch.full((2, 5, 2), float("nan"))), ValueError, "queries must be finite"),
    "lengths: dtype": (dict(lengths=torch.zeros(2)), TypeError, "lengths must be int64"),
    "lengths: shape": (dict(lengths=torch.zeros(3, dtype=torch.int64)), ValueError, "lengths must have shape"),
    "lengths: high": (dict(lengths=torch.tensor([1, 18])), ValueError, r"between 0 and 17, got \[1, 18\]"),
    "lengths: low": (dict(lengths=torch.tensor([-1, 1])), ValueError, "lengths must be between 0 and 17"),
    "query_lengths": (dict(query_lengths=torch.zeros(2, dtype=torch.int64)), ValueError, "query_lengths must be None"),
    "device": (dict(queries=torch.zeros(2, 5, 2, device="meta")), ValueError, "queries must be on cpu"),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match="^knn: .*" + message):
        knn(**{"positions": torch.randn(2, 17, 2), "k": 3, **change})
