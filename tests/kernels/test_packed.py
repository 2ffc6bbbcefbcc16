"""Packed sets: every op with `ptr` is the op on each set alone."""

import itertools

import pytest
import torch
from helpers import DEVICE, INTERPRETED, MASKS, assert_accurate, backends, distance, same_bits

import dfn_kernels as dk
from dfn_kernels.packed import offsets_of_batch, place_in_set, set_of_rows

BACKENDS = backends("knn")
# Empty ones first, last and between; one of a single row; one that takes the grid among small ones.
SIZES = [0, 1, 5, 0, 0, 9, 2, 0] if INTERPRETED else [0, 3, 1, 0, 17, 0, 0, 40, 800, 2, 0]


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
    if INTERPRETED and dtype == torch.float64 and mask != MASKS[3]:
        pytest.skip("a minute in the interpreter")
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
        with dk.use_backend(backend):
            assert dk.knn(positions[:, :0], 3, ptr=offsets(empty)).indices.shape == (2, 0, 3)


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
    if INTERPRETED:
        pytest.skip("the same PyTorch for every backend")
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


# ---- flow_norm ------------------------------------------------------------------------------------------------------
def norm_each_set(states, energy, ptr, mode):
    parts = [
        dk.flow_norm(states[:, a:e], energy[:, a:e], 1e-3, mode) for a, e in itertools.pairwise(ptr.tolist()) if a < e
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("backend", [*backends("flow_norm"), "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mean", "causal", "entity"])
def test_norm_is_each_set_alone(backend, dtype, mode):
    ptr = offsets(SIZES)
    N = int(ptr[-1])
    states, energy = torch.randn(2, N, 7, device=DEVICE).to(dtype), torch.rand(2, N, device=DEVICE) * 9
    grad = torch.randn(2, N, 7, device=DEVICE).to(dtype)

    def each_set(states, energy):
        return norm_each_set(states, energy, ptr, mode)

    exact = _norm_and_grads(each_set, "reference", states.double(), energy.double(), grad)
    plain = _norm_and_grads(each_set, "reference", states, energy, grad)
    ours = _norm_and_grads(lambda s, e: dk.flow_norm(s, e, 1e-3, mode, ptr=ptr), backend, states, energy, grad)
    for name, a, b, c in zip(("output", "states", "energy"), ours, exact, plain, strict=True):
        eps = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
        assert_accurate(a, b, max(distance(c, b), eps * b.double().norm().item()), name)


def _norm_and_grads(op, backend, states, energy, grad):
    states, energy = states.clone().requires_grad_(), energy.clone().requires_grad_()
    with dk.use_backend(backend):
        out = op(states, energy)
    return [out.detach(), *torch.autograd.grad(out, (states, energy), grad.to(out.dtype))]


@pytest.mark.parametrize("backend", [*backends("flow_norm"), "reference"])
@pytest.mark.parametrize("mode", ["mean", "causal"])
def test_norm_keeps_sets_and_time_apart(backend, mode):
    ptr = offsets([3, 0, 9, 5])
    states, energy = torch.randn(17, 4, device=DEVICE), torch.rand(17, device=DEVICE)
    other = energy.clone()
    other[12:] = torch.nan  # the last set, and with it the sum over all
    other[8:12] += 1e6  # the end of the one before
    with dk.use_backend(backend):
        a, b = (dk.flow_norm(states, e, mode=mode, ptr=ptr) for e in (energy, other))
    untouched = 8 if mode == "causal" else 3
    assert same_bits(a[:untouched], b[:untouched]) and not torch.equal(a[8:12], b[8:12]) and not b[8:12].isnan().any()


def test_norm_gradcheck():
    ptr = offsets([2, 0, 4, 1])
    for backend in backends("flow_norm"):
        for mode in ("mean", "causal"):
            states = torch.randn(7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
            energy = torch.rand(7, dtype=torch.float64, device=DEVICE, requires_grad=True)
            with dk.use_backend(backend):
                op = lambda s, e: dk.flow_norm(s, e, 1e-2, mode, ptr=ptr)  # noqa: B023, E731
                assert torch.autograd.gradcheck(op, (states, energy))


# ---- gaussian_gather: indices that count along N are all it needs ---------------------------------------------------
@pytest.mark.skipif(INTERPRETED, reason="ops that have interpreter tests of their own")
@pytest.mark.parametrize("backend", backends("gaussian_gather"))
@pytest.mark.parametrize("plan", [False, True])
def test_gather_is_each_set_alone(backend, plan):
    ptr = offsets(SIZES)
    N = int(ptr[-1])
    positions = torch.randn(N, 3, device=DEVICE, dtype=torch.float64)
    values, influence = torch.randn(N, 5, device=DEVICE, dtype=torch.float64), torch.rand(N, device=DEVICE).double()

    def gather(p, v, w, ptr, plan=False):
        near = dk.knn(p.detach(), 4, ptr=ptr).indices
        near = dk.gather_plan(near, p) if plan else near
        return dk.gaussian_gather(p, v, near, 0.7, influence=w, normalize=True)

    grad = torch.randn(N, 5, device=DEVICE, dtype=torch.float64)
    results = []
    for packed, name in ((True, backend), (False, "reference")):
        inputs = [x.clone().requires_grad_() for x in (positions, values, influence)]
        with dk.use_backend(name):
            if packed:
                out = gather(*inputs, ptr, plan)
            else:
                sets = itertools.pairwise(ptr.tolist())
                out = torch.cat([gather(*(x[a:e] for x in inputs), None) for a, e in sets if a < e])
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ---- flow_attention -------------------------------------------------------------------------------------------------
OPTIONS = [dict(), dict(causal=True), dict(include_self=False, normalize=True), dict(causal=True, query_bias=True),
           dict(normalize=True, extra=True)]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="ops that have interpreter tests of their own")
@pytest.mark.parametrize("backend", [*backends("flow_attention"), "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_attention_is_each_set_alone(backend, options):
    options = dict(options)
    sizes = [0, 4, 1, 0, 7] if INTERPRETED else [0, 3, 1, 0, 90, 17, 0]
    ptr = offsets(sizes)
    N, H, D, d, c, E = int(ptr[-1]), 2, 2, 5, 3, 4
    real = dict(dtype=torch.float64, device=DEVICE)
    inputs = dict(states=torch.randn(N, d, **real), positions=torch.randn(H, N, D, **real),
                  values=torch.randn(H, N, c, **real), influence=torch.rand(H, N, **real))  # fmt: skip
    shared = dict(flow_weight=torch.randn(H, D, d, **real), sigma=torch.rand(H, **real) + 0.5)
    if options.pop("query_bias", False):
        shared["query_bias"] = torch.randn(H, D, **real)
    if options.pop("extra", False):
        shared.update(extra_positions=torch.randn(H, E, D, **real), extra_values=torch.randn(H, E, c, **real))

    def attention(states, positions, values, influence, ptr=None):
        """Everything with the rows along the last but one dim or, of numbers per row, along the last."""
        context, drift, near = dk.flow_attention(
            states, positions, values=values, influence=influence, **shared, k=3, ptr=ptr, **options
        )
        sq_dists = near.sq_dists.where(near.indices >= 0, 0)
        return [context, drift.positions, sq_dists, near.indices, drift.energy[..., None]]

    def each_set(states, positions, values, influence):
        parts = []
        for a, e in itertools.pairwise(ptr.tolist()):
            *floats, near, energy = attention(states[a:e], positions[:, a:e], values[:, a:e], influence[:, a:e])
            moved = torch.where(near < e - a, near + a, near - (e - a) + N)  # beyond the set there are extra entities
            parts.append([*floats, near.where(near < 0, moved), energy])
        return [torch.cat(same, 1) for same in zip(*parts, strict=True)]

    results = []
    for run, name in ((lambda *x: attention(*x, ptr), backend), (each_set, "reference")):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        with dk.use_backend(name):
            out = run(*leaves)
        torch.manual_seed(3)
        total = sum((x * torch.randn(x.shape, **real)).sum() for x in out if x.is_floating_point())
        results.append([*out, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(INTERPRETED, reason="ops that have interpreter tests of their own")
@pytest.mark.parametrize("backend", backends("flow_attention"))
def test_attention_causal_within_a_set(backend):
    ptr = offsets([6, 0, 11])
    states, positions = torch.randn(17, 5, device=DEVICE), torch.randn(17, 2, device=DEVICE)
    weight = torch.randn(2, 5, device=DEVICE)
    other = states.clone()
    other[4:6] += 1
    other[10:] -= 1
    with dk.use_backend(backend):
        a, b = (dk.flow_attention(s, positions, weight, s, 0.8, 3, causal=True, ptr=ptr)[0] for s in (states, other))
    assert same_bits(a[:4], b[:4]) and same_bits(a[6:10], b[6:10]) and not torch.equal(a[4:6], b[4:6])


# ---- what compilers ask ---------------------------------------------------------------------------------------------
@pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
def test_opcheck_and_compile():
    ptr = offsets([3, 0, 8])
    x = torch.randn(1, 11, 2, device=DEVICE, requires_grad=True)
    backend = dk._backends.choose("knn", DEVICE)
    torch.library.opcheck(torch.ops.dfn.knn, (x, None, None, None, 3, True, True, True, None, 0, backend, ptr, None))
    torch.library.opcheck(
        torch.ops.dfn.knn, (x, x.detach(), None, None, 3, False, True, True, None, 0, backend, ptr, ptr)
    )
    for causal in (False, True):
        energy = torch.rand(2, 11, device=DEVICE, requires_grad=True)
        torch.library.opcheck(torch.ops.dfn.set_means, (energy, ptr, causal, backend))

    def layer(states, positions, weight):
        context, drift, near = dk.flow_attention(states, positions, weight, states, 0.8, 3, causal=True, ptr=ptr)
        return dk.flow_norm(context, drift.energy, mode="causal", ptr=ptr), near.indices

    inputs = torch.randn(11, 5, device=DEVICE), torch.randn(11, 2, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(layer(*inputs), compiled(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_norm_and_attention_name_bad_offsets():
    x = torch.randn(5, 2, device=DEVICE)
    with pytest.raises(ValueError, match="flow_norm: lengths must be None with ptr"):
        dk.flow_norm(x, x[:, 0], lengths=torch.tensor(3, device=DEVICE), ptr=offsets([5]))
    with pytest.raises(ValueError, match="flow_attention: lengths must be None with ptr"):
        dk.flow_attention(x, x, x.new_ones(2, 2), x, 1.0, 1, lengths=torch.tensor(3, device=DEVICE), ptr=offsets([5]))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="flow_norm: ptr must go from 0 to the number of rows, 5, got 0 to 4"):
            dk.flow_norm(x, x[:, 0].square(), ptr=offsets([4]))
        with pytest.raises(ValueError, match="ptr must go from 0 to the number of rows, 5, got 0 to 4"):
            dk.flow_attention(x, x, x.new_ones(2, 2), x, 1.0, 1, ptr=offsets([4]))
