import copy
import importlib
import itertools

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    backends,
    check_against_reference,
    check_compiled,
    leaves,
    pairs,
    same_bits,
)

import dfn_kernels
from dfn_kernels import GaussianGatherFunction, gather_plan, gaussian_gather

BACKENDS = backends("gaussian_gather")
OPTIONS = {
    "dtype": DTYPES,
    "influence": (None, "shared", "head", "zero and negative"),
    "queries": (False, True),
    "sigma": ("float", "one", "head", "tiny", "huge"),
    "normalize": (False, True),
    "points": ("normal", "all in one place", "two places"),
    "neighbors": ("some missing", "all there", "none for some", "shared by heads"),
    "plan": (False, True),
    "memory": ("dense", "strided", "heads inside"),
    "c": (1, 37, 64),
}
PAIRS = pairs(OPTIONS)


def make(B=2, H=3, N=17, M=11, D=2, c=37, k=5, *, dtype=torch.float32, influence="head", queries=True, sigma="head"):
    """Inputs with every size different; about one index in N + 1 is padding."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    M = M if queries else N
    inputs = {
        "positions": torch.randn(B, H, N, D, dtype=real, device=DEVICE),
        "values": torch.randn(B, H, N, c, device=DEVICE).to(dtype),
        "indices": torch.randint(-1, N, (B, H, M, k), device=DEVICE),
        "sigma": {"head": torch.rand(H, dtype=real, device=DEVICE) + 0.5,
                  "one": torch.tensor(0.8, dtype=real, device=DEVICE), "float": 0.7}[sigma],
    }  # fmt: skip
    if influence:
        shape = (B, H, N) if influence == "head" else (B, N)
        inputs["influence"] = torch.rand(shape, dtype=real, device=DEVICE) + 0.1
    if queries:
        inputs["query_positions"] = torch.randn(B, H, M, D, dtype=real, device=DEVICE)
    return inputs


def chosen(row: dict) -> dict:
    """Inputs with a row's options."""
    sigma = row["sigma"] if row["sigma"] in ("float", "one", "head") else "float"
    influence = "head" if row["influence"] == "zero and negative" else row["influence"]
    inputs = make(dtype=row["dtype"], influence=influence, queries=row["queries"], sigma=sigma, c=row["c"])
    if row["sigma"] in ("tiny", "huge"):
        inputs["sigma"] = {"tiny": 1e-3, "huge": 1e10}[row["sigma"]]
    if row["influence"] == "zero and negative":
        inputs["influence"] -= 0.6
        inputs["influence"][..., ::3] = 0
    points = [inputs[name] for name in ("positions", "query_positions") if name in inputs]
    for x in points:
        if row["points"] == "all in one place":
            x.fill_(0.3)
        elif row["points"] == "two places":
            x.copy_((x > 0).to(x.dtype))
    indices = inputs["indices"]
    if row["neighbors"] == "all there":
        indices.clamp_(min=0)
    elif row["neighbors"] == "none for some":
        indices[:, :, ::4] = -1
    elif row["neighbors"] == "shared by heads":
        inputs["indices"] = indices[:, :1].expand(indices.shape)
    for name, x in inputs.items():
        if torch.is_tensor(x) and x.ndim > 2 and name != "indices":
            if row["memory"] == "strided":
                inputs[name] = x.transpose(0, -1).contiguous().transpose(0, -1)
            elif row["memory"] == "heads inside":
                inputs[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
    return {**inputs, "normalize": row["normalize"]}


def with_plan(**inputs):
    """The indices through a plan, as several calls would share it."""
    plan = gather_plan(inputs["indices"], inputs["positions"], inputs.get("query_positions"))
    return gaussian_gather(**{**inputs, "indices": plan})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", PAIRS[:: 5 if INTERPRETED else 1], ids=str)
def test_every_pair_of_options(backend, row):
    inputs = chosen(row)
    if row["sigma"] == "tiny" and row["points"] == "normal" and not row["normalize"]:
        own = inputs["query_positions" if row["queries"] else "positions"]
        own.copy_(inputs["positions"][:, :, :1])  # else all is 0
    op = with_plan if row["plan"] else gaussian_gather
    check_against_reference(op, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(c=1, D=1, k=1),
        dict(c=64, D=3, k=16, B=1, H=1, N=61, M=29),
        dict(c=67, D=5, k=7, H=1),
        dict(c=131, D=7, k=3, B=1, N=2, M=5),
        dict(c=300, D=3, k=19, B=1, H=2, N=23, M=7),
        dict(c=48, D=18, k=70, B=1, H=1, N=13, M=3),
        dict(c=16, D=2, k=257, B=1, H=1, N=211, M=2),
    ],
)
def test_sizes(backend, sizes):
    for dtype in (torch.float32, torch.bfloat16):
        check_against_reference(gaussian_gather, make(**sizes, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(backend, normalize):
    inputs = make(B=1, H=2, N=5, M=3, D=2, c=3, k=4, dtype=torch.float64)
    indices = inputs.pop("indices")
    names = list(inputs)
    tensors = [inputs[name].requires_grad_() for name in names]

    def op(*values):
        return gaussian_gather(indices=indices, normalize=normalize, **dict(zip(names, values, strict=True)))

    with dfn_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(op, tensors, nondet_tol=0.0, fast_mode=INTERPRETED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_distances_of_a_search(backend, normalize):
    """With the squared distances that a search knows the result is the same, and so are the gradients."""
    inputs = make(B=1, H=2, N=23, M=7, D=3, c=5, k=6)
    names = ("positions", "query_positions", "values", "indices", "sigma", "influence")
    indices = inputs["indices"]

    def run(known):
        copies = leaves(inputs)
        p, q = copies["positions"].detach(), copies["query_positions"].detach()
        steps = q.unsqueeze(3) - p.unsqueeze(2).expand(-1, -1, 7, -1, -1).gather(
            3, indices.clamp(min=0).unsqueeze(4).expand(*indices.shape, 3)
        )
        sq_dists = steps.square().sum(4).where(indices >= 0, torch.inf) if known else None
        out = torch.ops.dfn.gaussian_gather(*(copies[n] for n in names), normalize, backend, sq_dists)
        out.square().sum().backward()
        return [out.detach(), *(copies[n].grad for n in names if n != "indices")]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dims(backend):
    """[N, ..] and [B, N, ..] give what [B, H, N, ..] gives."""
    full = make(B=1, H=1, sigma="float")
    with dfn_kernels.use_backend(backend):
        want = gaussian_gather(**full)
        for squeeze in (lambda x: x[:, 0], lambda x: x[0, 0]):
            got = gaussian_gather(**{n: squeeze(x) if isinstance(x, torch.Tensor) else x for n, x in full.items()})
            assert same_bits(got, squeeze(want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    inputs = make()
    strided = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(x, torch.Tensor) and x.ndim > 1 else x
        for name, x in inputs.items()
    }
    interleaved = {**inputs, "values": inputs["values"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert not strided["values"].is_contiguous() and not interleaved["values"].is_contiguous()
    with dfn_kernels.use_backend(backend):
        want = gaussian_gather(**inputs)
        assert same_bits(gaussian_gather(**strided), want)
        assert same_bits(gaussian_gather(**interleaved), want)
    check_against_reference(gaussian_gather, strided, backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("empty", [dict(B=0), dict(M=0), dict(k=0), dict(c=0), dict(N=0), dict(N=0, M=0)])
def test_empty(backend, empty):
    inputs = make(**{**dict(N=3, M=4), **empty})
    if empty.get("N") == 0:
        inputs["indices"].fill_(-1)
    inputs["values"].requires_grad_()
    inputs["positions"].requires_grad_()
    with dfn_kernels.use_backend(backend):
        for normalize in (False, True):
            out = gaussian_gather(**inputs, normalize=normalize)
            assert out.shape == (*inputs["indices"].shape[:3], inputs["values"].shape[3])
            assert out.eq(0).all()
            out.sum().backward()
    assert inputs["values"].grad.eq(0).all() and inputs["positions"].grad.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("normalize", [False, True])
def test_padding_is_nobody(backend, normalize):
    """A query without neighbours gets 0; entity 0, whom nobody lists, may hold NaN without anybody noticing."""
    inputs = make(influence=None)
    inputs["indices"] = torch.where(inputs["indices"] == 0, -1, inputs["indices"])
    inputs["indices"][:, :, 3] = -1
    for name in ("values", "positions"):
        inputs[name][:, :, 0] = float("nan")
        inputs[name].requires_grad_()
    with dfn_kernels.use_backend(backend):
        out = gaussian_gather(**inputs, normalize=normalize)
        out.square().sum().backward()
    assert out.isfinite().all() and out[:, :, 3].eq(0).all() and out[:, :, 4].ne(0).any()
    for name in ("values", "positions"):
        assert inputs[name].grad.isfinite().all() and inputs[name].grad[:, :, 0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_a_number_stays_with_its_neighbors(backend, normalize):
    """A query that stands nowhere spoils its own output and the gradients of those it lists, and nobody else's."""
    inputs = make(B=1, H=1, N=29, M=11, k=3, c=16)
    inputs["indices"][0, 0, 4] = torch.tensor([7, 28, -1], device=DEVICE)
    inputs["query_positions"][0, 0, 4] = float("nan")
    names = ("positions", "values", "influence")
    for name in names:
        inputs[name].requires_grad_()
    with dfn_kernels.use_backend(backend):
        out = gaussian_gather(**inputs, normalize=normalize)
        out.sum().backward()
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [4]
    for name in names:
        grad = inputs[name].grad.view(29, -1)
        assert grad.isnan().any(-1).nonzero().flatten().tolist() == [7, 28], name


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_extreme_weights(backend):
    positions = torch.tensor([[0.0], [1.0], [3.0], [3.0]], device=DEVICE)
    values = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], device=DEVICE)
    indices = torch.tensor([[1, 2], [0, 2], [2, 3], [0, 1]], device=DEVICE)
    with dfn_kernels.use_backend(backend):
        # tiny sigma: normalised weights pick the nearest, ties share; plain ones vanish unless the distance is 0
        near = gaussian_gather(positions, values, indices, 1e-3, normalize=True).flatten().tolist()
        assert near == [10.0, 1.0, 550.0, 10.0]
        assert gaussian_gather(positions, values, indices, 1e-3).flatten().tolist() == [0, 0, 1100, 0]
        # huge sigma: a plain sum, a plain mean
        assert gaussian_gather(positions, values, indices, 1e10).flatten().tolist() == [110, 101, 1100, 11]
        assert gaussian_gather(positions, values, indices, 1e10, normalize=True).flatten().tolist() == [
            55,
            50.5,
            550,
            5.5,
        ]
        # influence: zero and negative; weights that sum to zero give 0
        w = torch.tensor([[1.0, 0.0, 1.0, -1.0]], device=DEVICE)
        one = dict(positions=positions[None], values=values[None], indices=indices[None], sigma=1e10, influence=w)
        assert gaussian_gather(**one).flatten().tolist() == [100, 101, -900, 1]
        assert gaussian_gather(**one, normalize=True).flatten().tolist() == [100, 50.5, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_points_make_a_hub(backend):
    inputs = make(B=1, H=1, N=50, D=2, c=9, k=4, queries=False)
    inputs["positions"] = torch.zeros_like(inputs["positions"])
    inputs["indices"] = torch.arange(4, device=DEVICE).expand(1, 1, 50, 4)
    check_against_reference(gaussian_gather, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_overflow_is_infinite(backend):
    values = torch.full((3, 5), 6e4, dtype=torch.float16, device=DEVICE)
    out = gaussian_gather(
        torch.zeros(3, 1, device=DEVICE), values, torch.tensor([[0, 1], [1, -1], [2, 0]], device=DEVICE), 1.0
    )
    assert out[0].isinf().all() and out[1].eq(6e4).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU counts a bad index as padding")
@pytest.mark.parametrize("bad", [17, 2**40, -2, -(2**62)])
def test_bad_index(bad):
    inputs = make()
    inputs["indices"][1, 2, 3, 4] = bad
    if "native" in BACKENDS:
        with pytest.raises(IndexError, match="indices must be -1 or between 0 and 16"):
            gaussian_gather(**inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    inputs = make(c=64)
    before = copy.deepcopy(inputs)

    def run():
        mine = leaves(inputs)
        with dfn_kernels.use_backend(backend):
            out = gaussian_gather(**mine, normalize=True)
        out.square().sum().backward()
        return [out.detach()] + [x.grad for x in mine.values() if torch.is_tensor(x) and x.requires_grad]

    first = run()
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        for ours, theirs in zip(run(), first, strict=True):
            assert same_bits(ours, theirs)
    torch.set_num_threads(threads)
    for name in inputs:
        assert inputs[name] is before[name] or torch.equal(inputs[name], before[name]), f"{name} was changed"


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ kernels serve large inputs in another order")
@pytest.mark.parametrize("case", ["uniform", "queries", "heads", "clusters", "hubs", "all equal", "outlier"])
def test_large_inputs_on_the_cpu(case):
    """Large enough for the spatial order, for blocks of edges and, with hubs, for lists that are split."""
    N, k, c = 5003, 7, 40
    M = 4001 if case == "queries" else N
    inputs = make(B=1, H=2 if case == "heads" else 1, N=N, M=M, D=3, c=c, k=k, queries=case == "queries")
    positions = inputs["positions"]
    if case == "clusters":
        positions.copy_(torch.randint(0, 3, positions.shape) + 1e-3 * positions)
    elif case == "hubs":
        inputs["indices"][..., :2] = torch.tensor([5, 4000])
    elif case == "all equal":
        positions.zero_()
        inputs["indices"].copy_(torch.arange(k).expand(1, 1, N, k))
    elif case == "outlier":
        positions[0, 0, 17] = 1e10
    elif case == "heads":  # one list of neighbours for both
        inputs["indices"] = inputs["indices"][:, :1].expand(1, 2, N, k)
    check_against_reference(gaussian_gather, {**inputs, "normalize": case != "all equal"}, "native")
    grads = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        copies = leaves(inputs)
        out = gaussian_gather(**copies)
        out.square().sum().backward()
        grads.append([out.detach()] + [x.grad for x in copies.values() if torch.is_tensor(x) and x.requires_grad])
    torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    inputs = make()
    names = [n for n, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()]

    def grads(asked):
        copies = {n: x.clone().requires_grad_(n in asked) if n in names else x for n, x in inputs.items()}
        with dfn_kernels.use_backend(backend):
            gaussian_gather(**copies, normalize=True).square().sum().backward()
        return {n: copies[n].grad for n in names}

    every = grads(names)
    for size in (1, 2):
        for asked in itertools.combinations(names, size):
            for name, grad in grads(asked).items():
                assert (grad is None) == (name not in asked)
                assert grad is None or same_bits(grad, every[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_function(backend):
    inputs = make(B=1, H=1, N=4, M=4, c=3, k=2, queries=False, influence=None)
    p = inputs["positions"]
    out = GaussianGatherFunction.apply(p, p, inputs["values"], inputs["indices"], inputs["sigma"], None, False, backend)
    with dfn_kernels.use_backend(backend):
        assert same_bits(out, gaussian_gather(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", ["one", "a query each"])
@pytest.mark.parametrize("normalize", [False, True])
def test_second_derivative(backend, pieces, normalize, monkeypatch):
    """Everything by everything."""
    inputs = make(B=1, H=2, N=5, M=3, D=2, c=3, k=4, dtype=torch.float64)
    indices = inputs.pop("indices")
    names = list(inputs)
    if pieces != "one":
        monkeypatch.setattr(importlib.import_module("dfn_kernels.gaussian_gather"), "MOST_ROWS", 1)

    def op(*values):
        return gaussian_gather(indices=indices, normalize=normalize, **dict(zip(names, values, strict=True)))

    with dfn_kernels.use_backend(backend):
        tensors = [inputs[name].requires_grad_() for name in names]
        assert torch.autograd.gradgradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_by_every_route(backend):
    """As forces and their training, Hessians and torch.func ask for it."""
    inputs = make(B=1, H=1, N=5, c=3, k=3, queries=False, dtype=torch.float64)
    positions = inputs.pop("positions")

    def loss(x):
        return gaussian_gather(positions=x, **inputs, normalize=True).square().sum()

    with dfn_kernels.use_backend("reference"):
        want = torch.autograd.functional.hessian(loss, positions)
    assert want.abs().sum() > 0
    size = positions.numel()
    with dfn_kernels.use_backend(backend):
        x = positions.clone().requires_grad_()
        (force,) = torch.autograd.grad(loss(x), x, create_graph=True)
        force.square().sum().backward()
        torch.testing.assert_close(x.grad.flatten(), 2 * want.view(size, size) @ force.detach().flatten())
        torch.testing.assert_close(torch.autograd.functional.hessian(loss, positions), want)
        torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(positions), want)
        v = torch.randn_like(positions)
        _, product = torch.autograd.functional.vhp(loss, positions, v)
        torch.testing.assert_close(product.flatten(), want.view(size, size) @ v.flatten())
        grad = torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(positions)
        torch.testing.assert_close(grad, product)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for normalize in (False, True):
        i = make(dtype=torch.float64 if normalize else torch.float32)
        floats = [x.requires_grad_() for x in (i["positions"], i["query_positions"], i["values"])]
        arguments = (
            *floats,
            i["indices"],
            i["sigma"].requires_grad_(),
            i["influence"].requires_grad_(),
            normalize,
            backend,
        )
        torch.library.opcheck(torch.ops.dfn.gaussian_gather, arguments)
        with dfn_kernels.use_backend(backend):
            plan = gather_plan(i["indices"], i["positions"], i["query_positions"])
        torch.library.opcheck(torch.ops.dfn.gaussian_gather, (*arguments, None, *plan[1:5]))
        torch.library.opcheck(torch.ops.dfn.spatial_order, (i["positions"].detach(), backend))
        torch.library.opcheck(torch.ops.dfn.transpose_neighbors, (i["indices"], *plan[1:3], backend))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if DEVICE != "cpu" or b != "triton"])
def test_compile(backend):
    def layer(x, positions, indices):
        plan = gather_plan(indices, positions)
        x = gaussian_gather(positions, x.tanh(), plan, 0.9)
        y = gaussian_gather(positions, x.tanh(), plan, 0.7, normalize=True)
        return y.transpose(1, 2).flatten(2).relu()

    def plain(x, positions, indices):
        x = gaussian_gather(positions, x.tanh(), indices, 0.9)
        y = gaussian_gather(positions, x.tanh(), indices, 0.7, normalize=True)
        return y.transpose(1, 2).flatten(2).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for N in (13, 29):
        i = make(N=N, queries=False)
        check_compiled(plain, compiled, [i[n] for n in ("values", "positions", "indices")], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    inputs = make()
    with dfn_kernels.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        out = gaussian_gather(**inputs)
    assert out.dtype == torch.bfloat16
    with dfn_kernels.use_backend(backend):
        assert same_bits(out, gaussian_gather(**{**inputs, "values": inputs["values"].bfloat16()}))


def _change(**changes):
    return lambda inputs: {**inputs, **changes}


# ruff: noqa: E501
BAD = {
    "positions: not a tensor": (_change(positions=[[0.0]]), TypeError, "positions must be a tensor, got list"),
    "positions: integers": (_change(positions=torch.zeros(2, 3, 17, 2, dtype=torch.int64)), TypeError, "positions must be float"),
    "positions: shape": (_change(positions=torch.zeros(2, 3, 16, 2)), ValueError, r"positions must have shape \[B, H, N, D\]"),
    "positions: dims": (_change(positions=torch.zeros(2, 17, 2)), ValueError, "positions must have shape"),
    "values: dims": (_change(values=torch.zeros(5)), ValueError, r"values must have shape .* got \[5\]"),
    "values: dtype": (_change(values=torch.zeros(2, 3, 17, 37, dtype=torch.complex64)), TypeError, "values must be float"),
    "indices: dtype": (_change(indices=torch.zeros(2, 3, 11, 5, dtype=torch.int32)), TypeError, "indices must be int64, got torch.int32"),
    "indices: shape": (_change(indices=torch.zeros(2, 2, 11, 5, dtype=torch.int64)), ValueError, "indices must have shape"),
    "indices: rows": (_change(query_positions=None), ValueError, "one row per position"),
    "query_positions: D": (_change(query_positions=torch.zeros(2, 3, 11, 3)), ValueError, "query_positions must have shape"),
    "influence: shape": (_change(influence=torch.zeros(2, 16)), ValueError, "influence must have shape"),
    "influence: dtype": (_change(influence=torch.zeros(2, 17, dtype=torch.bool)), TypeError, "influence must be float"),
    "sigma: zero": (_change(sigma=0.0), ValueError, "sigma must be positive and finite, got 0.0"),
    "sigma: NaN": (_change(sigma=float("nan")), ValueError, "sigma must be positive"),
    "sigma: text": (_change(sigma="1"), TypeError, "sigma must be a number, got str"),
    "sigma: shape": (_change(sigma=torch.ones(2)), ValueError, r"sigma must have shape \[H\] = \[3\], got \[2\]"),
    "device": (_change(influence=torch.zeros(2, 17, device="meta")), ValueError, "influence must be on cpu"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are the same on every device")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match="^gaussian_gather: .*" + message):
        gaussian_gather(**change(make()))


@pytest.mark.slow
@pytest.mark.skipif("native" not in BACKENDS, reason="what is measured is the resident set of the process")
@pytest.mark.parametrize("attention", [False, True], ids=["gather", "attention"])
def test_memory_grows_with_entities_and_edges_not_with_their_product(attention):
    """Forward and backward: O(N (c + k)). The reference, which builds [N, k, c], breaks the same bound."""
    from bench.timing import peak_growth_mib

    N, D, c, k = 50_021, 3, 96, 32
    positions = torch.rand(1, 1, N, D).requires_grad_()
    values = torch.randn(1, 1, N, c).requires_grad_()
    weight = torch.zeros(1, D, c)
    indices = dfn_kernels.knn(positions.detach(), k).indices
    grad = torch.randn(1, 1, N, c)

    def run():
        if attention:
            out = dfn_kernels.flow_attention(values[:, 0], positions, weight, values, 0.1, k)[0]
        else:
            out = gaussian_gather(positions, values, indices, 0.1)
        torch.autograd.grad(out, [positions, values], grad)

    torch.utils.deterministic.fill_uninitialized_memory = False  # it reads and writes copies of its own
    grown = peak_growth_mib(run, "cpu")
    if grown is None:
        pytest.skip("this system does not let a process reset its peak")
    # out, its sum of gradients, and some numbers for each edge and each entity
    bound = N * (4 * c * 4 + (60 if attention else 28) * k + 400) / 2**20
    assert grown < bound, f"{grown:.0f} MiB, expected at most {bound:.0f}"
    if not attention:
        with dfn_kernels.use_backend("reference"):
            assert peak_growth_mib(run, "cpu") > 2 * bound
