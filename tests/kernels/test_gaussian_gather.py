"""Values and gradients against the reference.

test_gaussian_gather_inputs.py asks what the op takes and refuses, test_gaussian_gather_promises.py what else
it promises.
"""

import itertools

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    backends,
    check_against_reference,
    check_same_bits,
    leaves,
    pairs,
    same_bits,
    value_and_grads,
)

import dfn_kernels
from dfn_kernels import gather_plan, gaussian_gather

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
def test_more_than_1024_neighbors(backend):
    inputs = {**make(B=1, H=1, N=37, M=1, D=1, c=3, k=1027), "normalize": True}
    runs = (value_and_grads(gaussian_gather, inputs, torch.ones(1, 1, 1, 3, device=DEVICE), name)
            for name in (backend, "reference"))  # fmt: skip
    terms = 1027 * 2**-23  # as many roundings
    torch.testing.assert_close(*runs, rtol=terms, atol=terms)


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


@pytest.mark.skipif("triton" not in BACKENDS, reason="of the Triton kernels")
def test_rows_that_are_not_there_by_a_mask(monkeypatch):
    """What AMD's compiler is given in place of a row of zeros: the same bits, also of the gradients (triton)."""
    kernels = pytest.importorskip("dfn_kernels.triton.gaussian_gather")
    inputs = make(B=1, H=2, N=23, M=7, D=3, c=5, k=6)
    runs = []
    for row_of_zeros in (True, False):
        monkeypatch.setattr(kernels, "ROW_OF_ZEROS", row_of_zeros)
        copies = leaves(inputs)
        with dfn_kernels.use_backend("triton"):
            out = gaussian_gather(**copies)
        out.square().sum().backward()
        runs.append([out.detach(), *(x.grad for x in copies.values() if x.requires_grad)])
    assert (inputs["indices"] < 0).any()
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_points_make_a_hub(backend):
    inputs = make(B=1, H=1, N=50, D=2, c=9, k=4, queries=False)
    inputs["positions"] = torch.zeros_like(inputs["positions"])
    inputs["indices"] = torch.arange(4, device=DEVICE).expand(1, 1, 50, 4)
    check_against_reference(gaussian_gather, inputs, backend)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native kernels serve large inputs in another order")
@pytest.mark.parametrize("case", ["uniform", "queries", "heads", "clusters", "hubs", "all equal", "outlier"])
def test_large_inputs(case):
    """Large enough for the spatial order, for blocks of edges and, with hubs, for lists that are split."""
    N, k, c = 5003, 7, 40
    M = 4001 if case == "queries" else N
    inputs = make(B=1, H=2 if case == "heads" else 1, N=N, M=M, D=3, c=c, k=k, queries=case == "queries")
    positions = inputs["positions"]
    if case == "clusters":
        positions.copy_(torch.randint(0, 3, positions.shape, device=DEVICE) + 1e-3 * positions)
    elif case == "hubs":
        inputs["indices"][..., :2] = torch.tensor([5, 4000], device=DEVICE)
    elif case == "all equal":
        positions.zero_()
        inputs["indices"].copy_(torch.arange(k, device=DEVICE).expand(1, 1, N, k))
    elif case == "outlier":
        positions[0, 0, 17] = 1e10
    elif case == "heads":  # one list of neighbours for both
        inputs["indices"] = inputs["indices"][:, :1].expand(1, 2, N, k)
    check_against_reference(gaussian_gather, {**inputs, "normalize": case != "all equal"}, "native")
    check_same_bits(gaussian_gather, inputs, "native")


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
