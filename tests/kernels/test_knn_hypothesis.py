"""Any search there is, against the reference, to the bit. The same examples in every run."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfn_kernels
from dfn_kernels import KNNIndex, knn

SETTINGS = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
KINDS = {
    "spread": lambda *shape: torch.randn(shape),
    "lattice": lambda *shape: torch.randint(-3, 4, shape).float(),
    "few places": lambda *shape: torch.rand(5, shape[-1])[torch.randint(5, shape[:-1])],
    "flat": lambda *shape: torch.rand(shape) * torch.logspace(0, -12, shape[-1]),
    "huge": lambda *shape: 1e19 * torch.randn(shape),
    "tiny": lambda *shape: 1e-23 * torch.randn(shape),
    "signed zeros": lambda *shape: torch.where(torch.rand(shape) < 0.5, 0.0, -0.0) * torch.randint(2, shape),
    "not finite": lambda *shape: torch.randn(shape).masked_fill(torch.rand(shape) < 0.1, torch.nan),
}


@st.composite
def searches(draw, sizes, most_neighbors, most_dims):
    """Positions and options of `knn`."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, N, D = draw(st.integers(1, 3)), draw(sizes), draw(st.integers(1, most_dims))
    make = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    options = dict(k=draw(st.integers(1, most_neighbors)), check=False)
    if draw(st.booleans()):
        options["lengths"] = torch.randint(N + 1, (B,), device=DEVICE)
    if draw(st.sampled_from((False, False, True))):
        M = draw(sizes)
        options["queries"] = make(B, M, D).to(DEVICE)
        if draw(st.booleans()):
            options["query_lengths"] = torch.randint(M + 1, (B,), device=DEVICE)
    else:
        options.update(causal=draw(st.booleans()), include_self=draw(st.booleans()))
    return make(B, N, D).to(DEVICE), options


def check(backend, positions, options):
    with dfn_kernels.use_backend("reference"):
        want = knn(positions, **options)
    with dfn_kernels.use_backend(backend):
        got = knn(positions, **options)
    assert same_bits(got.indices, want.indices)
    assert same_bits(got.sq_dists, want.sq_dists)
    return want


@pytest.mark.skipif("native" not in backends("knn"), reason="about the C++ kernels")
@settings(max_examples=80, **SETTINGS)
@given(searches(st.integers(0, 60) | st.integers(760, 1100), 70, 9))
def test_native(search):
    positions, options = search
    want = check("native", positions, options)
    if "query_lengths" not in options:
        again = {n: x for n, x in options.items() if n in ("k", "queries", "causal", "include_self")}
        if positions.isfinite().all() and again.get("queries", positions).isfinite().all():
            got = KNNIndex(positions, options.get("lengths")).query(**again, warm=want)
            assert same_bits(got.indices, want.indices) and same_bits(got.sq_dists, want.sq_dists)


@pytest.mark.skipif("triton" not in backends("knn"), reason="no Triton for tensors of this device")
@settings(max_examples=6 if INTERPRETED else 100, **SETTINGS)
@given(searches(*((st.integers(0, 20), 5, 3) if INTERPRETED else (st.integers(0, 2000), 70, 9))), st.booleans())
def test_triton(search, a_tree):
    from test_knn_triton import small_trees

    with pytest.MonkeyPatch.context() as monkeypatch:
        if a_tree:
            small_trees(monkeypatch)
        check("triton", *search)
