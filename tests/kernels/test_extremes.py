"""The ends of the range: widths, densities and weights so small or large that their squares or sums are not numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends

import dfn_kernels
from dfn_kernels import field_sample, flow_attention, flow_norm, gather_plan, gaussian_gather, use_backend

BACKENDS = ["reference", *backends("gaussian_gather")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
WIDTHS = {torch.float32: (1e-300, 1e-39, 1e-30, 1e-20, 3e-4, 1.0, 1e10, 1e20, 1e38, 1e300),
          torch.float64: (5e-324, 1e-300, 1e-160, 1e-20, 1.0, 1e20, 1e160, 1e300)}  # fmt: skip


def points(dtype, scale, N=23, M=19, D=3, c=5, k=7):
    """Distances of 0 and of about ``scale``; the first query stands on an entity, and on its double."""
    positions = (scale * torch.randn(N, D, dtype=torch.float64)).to(dtype)
    positions[1] = positions[0]
    queries = (scale * torch.randn(M, D, dtype=torch.float64)).to(dtype)
    indices = torch.stack([torch.randperm(N)[:k] for _ in range(M)])
    queries[0], indices[0, :2] = positions[0], torch.tensor([0, 1])
    indices[0, 2:] = torch.arange(2, k)
    indices[3, 4:] = -1
    values = torch.randn(N, c, dtype=dtype)
    return [x.to(DEVICE) for x in (positions, queries, values, indices)]


def exact(positions, queries, values, indices, sigma, normalize):
    """In float64, without the square of sigma: (d / sigma) (d / sigma) / 2 of the distances themselves."""
    p, q, v = positions.double(), queries.double(), values.double()
    d = (q[:, None] - p[indices.clamp(min=0)]).norm(dim=-1)
    d = d.masked_fill(indices < 0, torch.inf)
    least = d.amin(1, keepdim=True) if normalize else 0
    exponent = ((d - least) / sigma * 0.5) * ((d + least) / sigma)
    exponent = exponent.where(d != least, 0).where(indices >= 0, torch.inf)
    w = (-exponent).exp()
    w = w / w.sum(1, keepdim=True) if normalize else w
    return (w[..., None] * v[indices.clamp(min=0)]).sum(1), exponent


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gather_of_any_width(backend, dtype, normalize):
    limits = torch.finfo(dtype)
    for sigma in WIDTHS[dtype]:
        representable = 1e-16 < sigma < 1e18 or dtype == torch.float64 and 1e-145 < sigma < 1e150  # with its distances
        for scale in (1.0, sigma) if representable else (1.0,):
            p, q, v, indices = points(dtype, scale)
            want, exponent = exact(p, q, v, indices, sigma, normalize)
            relevant = exponent[exponent < 80].max().item() if (exponent < 80).any() else 0.0
            inputs = [x.clone().requires_grad_() for x in (p, v, q)]
            one = torch.tensor(sigma, dtype=torch.float64, device=DEVICE).requires_grad_()
            for width in (one,) if INTERPRETED else (sigma, one):
                with use_backend(backend):
                    got = gaussian_gather(
                        inputs[0], inputs[1], indices, width, query_positions=inputs[2], normalize=normalize
                    )
                # An exponent x has four roundings besides those of the distance, and D + 2 of those; exp has two.
                tolerance = (relevant * 10 + 12) * limits.eps
                error = (got.double() - want).abs().max().item() / v.abs().max().item()
                assert error <= tolerance * indices.shape[1], (sigma, scale, error, tolerance)
                wanted = [*inputs, width] if isinstance(width, torch.Tensor) else inputs
                grads = torch.autograd.grad(got.square().sum(), wanted)
                assert all(g.isfinite().all() for g in grads), (sigma, scale)
                if sigma >= 1e20 and scale == 1:
                    assert all((g.abs() < 1e-15).all() for g in (grads[0], grads[2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_distance_that_overflows_weighs_nothing(backend):
    p = torch.tensor([[0.0], [2e38], [1.0]], device=DEVICE).requires_grad_()
    v = torch.tensor([[1.0], [10.0], [100.0]], device=DEVICE).requires_grad_()
    q = torch.tensor([[0.0], [-1e38]], device=DEVICE)
    indices = torch.tensor([[0, 1, 2], [0, 1, 2]], device=DEVICE)
    for normalize, first in ((False, 101.0), (True, 50.5)):
        sigma = torch.tensor(1e15, device=DEVICE).requires_grad_()
        with use_backend(backend):
            y = gaussian_gather(p, v, indices, sigma, query_positions=q, normalize=normalize)
        assert y.tolist() == [[first], [0.0]]
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (p, v, sigma)))


@pytest.mark.parametrize("backend", ["reference", *backends("flow_attention")])
def test_attention_of_any_width(backend):
    """The nearest one alone, or the mean of all: what normalised weights come to at both ends."""
    states, positions = torch.randn(1, 9, 4, device=DEVICE), torch.randn(1, 9, 2, device=DEVICE)
    weight, values = torch.zeros(2, 4, device=DEVICE), torch.randn(1, 9, 3, device=DEVICE)
    for sigma, want in ((1e-30, values), (1e30, values.mean(1, keepdim=True).expand_as(values))):
        with use_backend(backend):
            y = flow_attention(states, positions, weight, values, sigma, 9, normalize=True)[0]
        torch.testing.assert_close(y, want)


def test_densities_at_both_ends_of_the_range():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        for scale in (limits.smallest_normal, limits.max / 4):
            density = torch.tensor([[1, 2, 0, 4]], dtype=torch.float64).to(dtype) * scale
            positions, influence = field_sample(density, 70)
            cell = (positions[0, :, 0] * 4).long()
            assert cell.bincount(minlength=4).tolist() == [10, 20, 0, 40]
            torch.testing.assert_close(
                influence[0] * torch.tensor([1.0, 2, 0, 4])[cell].to(influence), influence.new_full((70,), 70 / 30)
            )


def test_norm_at_both_ends_of_the_range():
    states = torch.ones(1, 3, 2)
    for energy in (0.0, 1e-45, 3e38, float("inf")):
        found = flow_norm(states, torch.full((1, 3), energy), eps=1e-6)
        want = (torch.tensor(energy, dtype=torch.float64) + 1e-6).rsqrt().float().expand_as(states)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("backend", backends("gaussian_gather"))
def test_a_plan_is_refused_where_the_sizes_are_others(backend):
    p, q, v, indices = points(torch.float32, 1.0)
    with use_backend(backend):
        plan = gather_plan(indices, p, q)
        for positions, values, queries in ((p[:-1], v[:-1], q), (torch.cat([p, p]), torch.cat([v, v]), q)):
            with pytest.raises(ValueError, match=r"gaussian_gather: plan was made for N = 23 entities, got \d+"):
                gaussian_gather(positions, values, plan, 1.0, query_positions=queries)
        with pytest.raises(ValueError, match="query_positions must have shape"):
            gaussian_gather(p, v, plan, 1.0, query_positions=q[:-1])
        wrong = plan._replace(indices=indices[:, :-1])
        with pytest.raises(
            ValueError, match=r"gaussian_gather: plan was made for indices of shape \[.., M, k\] = \[.., 19, 7\]"
        ):
            gaussian_gather(p, v, wrong, 1.0, query_positions=q)
        three = points(torch.float32, 1.0)[0].expand(2, 3, -1, -1)
        with pytest.raises(ValueError, match="gaussian_gather: indices must have shape"):
            gaussian_gather(three, three, plan, 1.0)


OUT_OF_MEMORY = """
import resource, sys, torch, dfn_kernels as dk
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, resource.RLIM_INFINITY))
one = torch.rand(1, 8)
for call in (
    lambda: dk.knn(torch.rand(400_000, 3), 256),
    lambda: dk.pattern_route(one.expand(10**7, 8), one[:, :2].expand(10**7, 2), torch.rand(2, 64, 8)),
):
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        print(error)
"""


@pytest.mark.skipif("native" not in BACKENDS or sys.platform != "linux", reason="about the C++, with a limit of Linux")
def test_missing_memory_is_said_with_its_size_and_without_a_path():
    out = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, env=ENVIRONMENT).stdout
    assert out.splitlines() == [
        f"out of memory: {size} bytes could not be had" for size in (400_000 * 256 * 8, 10**7 * 64 * 4)
    ]


def test_no_path_of_the_build_machine_is_in_the_library():
    """The CUDA library holds those of line tables, for profilers; its messages have none either."""
    path = Path(dfn_kernels.__file__).parent / "_C_cpu.so"
    if not path.exists():
        pytest.skip("it is not built")
    raw = path.read_bytes()
    for where in (Path(__file__).parents[2] / "csrc", Path(torch.__file__).parent / "include"):
        assert str(where).encode() not in raw
