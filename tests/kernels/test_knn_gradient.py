"""The gradient of knn's distances: one C++ pass, or a formula in PyTorch where a derivative of it is wanted."""

import dataclasses
import importlib
from unittest import mock

import pytest
import torch
from helpers import assert_accurate, distance, on_threads, same_bits
from torch import Tensor

from dfn_kernels import _native, knn, use_backend
from dfn_kernels.compat.pytorch3d import knn_points

module = importlib.import_module("dfn_kernels.knn")
pytestmark = pytest.mark.skipif(_native.CPU_MISSING is not None, reason="C++ is not built")


@dataclasses.dataclass
class Case:
    """What a search leaves behind, with a gradient of its distances."""

    points: Tensor
    queries: Tensor | None
    indices: Tensor
    grad: Tensor
    absolute: bool = False

    def gradients(self, way, dtype: torch.dtype) -> list[Tensor]:
        points, grad = self.points.to(dtype), self.grad.to(dtype)
        queries = None if self.queries is None else self.queries.to(dtype)
        return [x for x in way(grad, points, queries, self.indices, self.absolute) if x is not None]

    def check(self) -> None:
        exact = self.gradients(by_loops, torch.float64)
        for dtype in (torch.float32, torch.float64):
            unit = 2 * torch.finfo(dtype).eps
            plain, ours = (self.gradients(way, dtype) for way in (module._gradient, in_one_pass))
            for want, theirs, got in zip(exact, plain, ours, strict=True):
                assert got.dtype == dtype and got.is_contiguous()
                assert_accurate(got, want, max(distance(theirs, want), unit * want.norm().item()))


def by_loops(grad, points, queries, indices, absolute) -> tuple[Tensor, Tensor | None]:
    """Entry by entry, as the formula stands."""
    B, M, k = indices.shape
    to_points = torch.zeros_like(points)
    to_queries = to_points if queries is None else torch.zeros_like(queries)
    for b, i, s in (indices >= 0).nonzero().tolist():
        j = indices[b, i, s]
        away = points[b, j] - (points if queries is None else queries)[b, i]
        push = grad[b, i, s] * (away.sign() if absolute else 2 * away)
        to_points[b, j] += push
        to_queries[b, i] -= push
    return to_points, None if queries is None else to_queries


def in_one_pass(grad, points, queries, indices, absolute) -> tuple[Tensor, Tensor | None]:
    to_points, to_queries = torch.ops.dfn.knn_backward(
        grad, points, queries, indices, absolute, True, queries is not None
    )
    return to_points, None if queries is None else to_queries


def case(B, N, M, D, k, own=False, **options) -> Case:
    points, queries = torch.randn(B, N, D), None if own else torch.randn(B, M, D)
    return Case(points, queries, torch.randint(-1, N, (B, M, k)), torch.randn(B, M, k), **options)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("D", [1, 2, 3, 5, 17])
def test_any_lists(D, own, absolute):
    case(2, 11, 11 if own else 7, D, 4, own, absolute=absolute).check()
    case(1, 13, 13 if own else 1, D, 1, own, absolute=absolute).check()


def test_strange_lists():
    some = case(2, 11, 7, 3, 4)
    dataclasses.replace(
        some, indices=torch.full_like(some.indices, 4)
    ).check()  # a hub, and the same one twice in a row
    missing = dataclasses.replace(some, indices=torch.full_like(some.indices, -1))
    assert all((x == 0).all() for x in missing.gradients(in_one_pass, torch.float32))
    holes = some.grad.masked_fill(some.indices < 0, float("nan"))  # of what is missing, whatever it is
    for got, want in zip(dataclasses.replace(some, grad=holes).gradients(in_one_pass, torch.float32),
                         some.gradients(in_one_pass, torch.float32), strict=True):  # fmt: skip
        assert same_bits(got, want)
    one_place = dataclasses.replace(
        some, points=some.points[:, :1].expand(2, 11, 3), queries=some.points[:, :1].expand(2, 7, 3)
    )
    for absolute in (False, True):
        at_rest = dataclasses.replace(one_place, absolute=absolute).gradients(in_one_pass, torch.float32)
        assert all((x == 0).all() for x in at_rest)


@pytest.mark.parametrize("B, N, M, k", [(0, 5, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)])
def test_empty(B, N, M, k):
    to_points, to_queries = in_one_pass(torch.ones(B, M, k), torch.ones(B, N, 3), torch.ones(B, M, 3),
                                        torch.zeros(B, M, k, dtype=torch.int64), False)  # fmt: skip
    assert to_points.shape == (B, N, 3) and to_queries.shape == (B, M, 3)
    assert (to_points == 0).all() and (to_queries == 0).all()


@pytest.mark.parametrize("own", [False, True])
def test_any_strides(own):
    some = case(2, 11, 11 if own else 7, 3, 4, own)
    want = some.gradients(in_one_pass, torch.float32)

    def scattered(x: Tensor) -> Tensor:
        out = torch.full((*reversed(x.shape), 2), float("nan") if x.is_floating_point() else 99, dtype=x.dtype)[..., 0]
        return out.permute(*reversed(range(x.ndim))).copy_(x)

    other = Case(*(None if x is None else scattered(x) for x in (some.points, some.queries, some.indices, some.grad)))
    assert not other.grad.is_contiguous() and other.grad.stride(2) > 1
    for got, expected in zip(other.gradients(in_one_pass, torch.float32), want, strict=True):
        assert same_bits(got, expected)
    ones = dataclasses.replace(some, grad=torch.ones(()).expand_as(some.grad))  # what `sum` sends back
    dense = dataclasses.replace(some, grad=torch.ones_like(some.grad))
    for got, expected in zip(*(x.gradients(in_one_pass, torch.float32) for x in (ones, dense)), strict=True):
        assert same_bits(got, expected)


@pytest.mark.parametrize("own", [False, True])
def test_blocks_of_queries(own):
    """So many edges that they are added up in several arrays: right, and the same bits with any number of threads."""
    N, k = 33_000, 5  # 5 blocks
    some = case(2, N, N, 2, k, own)
    exact, plain = (some.gradients(module._gradient, dtype) for dtype in (torch.float64, torch.float32))
    found = on_threads(lambda: some.gradients(in_one_pass, torch.float32))
    for want, theirs, one, *others in zip(exact, plain, *found, strict=True):
        assert_accurate(one, want, distance(theirs, want))
        assert all(same_bits(one, other) for other in others)


SEARCHES = {
    "own": dict(),
    "causal": dict(causal=True),
    "without self": dict(causal=True, include_self=False),
    "lengths": dict(lengths=torch.tensor([3, 11])),
    "queries": dict(queries=(2, 7, 3), query_lengths=torch.tensor([7, 2])),
    "packed": dict(ptr=torch.tensor([0, 3, 3, 11])),
    "packed queries": dict(queries=(2, 7, 3), ptr=torch.tensor([0, 3, 3, 11]), query_ptr=torch.tensor([0, 5, 6, 7])),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_and_back(search, dtype):
    """With ties and repeated points: the gradient is that of the reference; through `create_graph` it is the same one,
    and its own derivative is right."""
    options = dict(SEARCHES[search])
    positions = torch.randint(3, (2, 11, 3)).to(dtype) / 4
    inputs = [positions, *([torch.randint(3, options.pop("queries")).to(dtype) / 4] if "queries" in options else [])]
    weight = torch.randn(2, inputs[-1].shape[1], 4, dtype=torch.promote_types(dtype, torch.float32))

    def gradients(backend, create_graph=False):
        mine = [x.clone().requires_grad_() for x in inputs]
        with use_backend(backend):
            found = knn(mine[0], 4, queries=mine[1] if len(mine) > 1 else None, **options)
        assert (found.indices < 0).any() or search in ("own", "queries")
        loss = (weight * found.sq_dists.where(found.indices >= 0, 0)).sum()
        grads = torch.autograd.grad(loss, mine, create_graph=create_graph)
        if not create_graph:
            return grads
        return (*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), mine))

    first, both, want = gradients("native"), gradients("native", True), gradients("reference", True)
    assert any(x.abs().sum() > 0 for x in first)
    loose = dict(rtol=8 * torch.finfo(dtype).eps, atol=64 * torch.finfo(weight.dtype).eps)
    for got, theirs in zip((*first, *both), (*want[: len(first)], *want), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, theirs, **loose)


def test_sums_of_absolute_differences():
    for dtype in (torch.float32, torch.float64):
        p, q = (torch.randint(4, (2, n, 3)).to(dtype).requires_grad_() for n in (11, 7))
        found = []
        for backend in ("native", "reference"):
            with use_backend(backend):
                dists = knn_points(q, p, K=3, norm=1).dists
            found.append(torch.autograd.grad(dists, (q, p), torch.arange(42).view(2, 7, 3).to(dtype)))
        for got, want in zip(*found, strict=True):  # whole numbers: exact
            assert got.abs().sum() > 0 and torch.equal(got, want)


def test_which_way_is_taken():
    p, q = torch.rand(11, 3, requires_grad=True), torch.rand(7, 3, requires_grad=True)
    formula = mock.Mock(wraps=module._gradient)
    one_pass = mock.Mock(wraps=_native.cpu.knn_backward)
    with mock.patch.object(module, "_gradient", formula), mock.patch.object(_native.cpu, "knn_backward", one_pass):
        torch.autograd.grad(knn(p, 4, queries=q).sq_dists.sum(), (p, q))
        assert (one_pass.call_count, formula.call_count) == (1, 0)
        torch.autograd.grad(knn(p.detach(), 4, queries=q).sq_dists.sum(), q)  # the points' is not computed
        assert one_pass.call_args.args[-2:] == (False, True)
        torch.autograd.grad(knn(p, 4, queries=q.detach()).sq_dists.sum(), p)
        assert one_pass.call_args.args[-2:] == (True, False)
        torch.autograd.grad(knn(p, 4, queries=q).sq_dists.sum(), (p, q), create_graph=True)
        torch.func.grad(lambda p: knn(p, 4).sq_dists.sum())(p.detach())
        assert (one_pass.call_count, formula.call_count) == (3, 2)


def test_one_gradient_without_the_other():
    some = case(2, 11, 7, 3, 4)
    arguments = some.grad, some.points, some.queries, some.indices, False
    both = torch.ops.dfn.knn_backward(*arguments, True, True)
    points, nothing = torch.ops.dfn.knn_backward(*arguments, True, False)
    assert same_bits(points, both[0]) and nothing.numel() == 0
    nothing, queries = torch.ops.dfn.knn_backward(*arguments, False, True)
    assert same_bits(queries, both[1]) and nothing.numel() == 0


def test_as_a_registered_op():
    some = case(2, 11, 7, 3, 4)
    arguments = some.grad, some.points, some.queries, some.indices, False
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.dfn.knn_backward, (*arguments, *wanted))
    own = case(2, 11, 11, 3, 4, own=True)
    torch.library.opcheck(torch.ops.dfn.knn_backward, (own.grad, own.points, None, own.indices, True, True, False))


def test_batched_gradients():
    p = torch.rand(11, 3, requires_grad=True)
    dists, grads = knn(p, 4).sq_dists, torch.randn(5, 11, 4)
    (got,) = torch.autograd.grad(dists, p, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(got, grads, strict=True):
        assert same_bits(one, torch.autograd.grad(dists, p, grad, retain_graph=True)[0])


def test_bad_input():
    some = case(1, 11, 7, 3, 4)
    some.indices[0, 3, 2] = 11
    with pytest.raises(IndexError, match="indices must be -1 or between 0 and 10"):
        some.gradients(in_one_pass, torch.float32)
