import pytest
import torch
from helpers import DEVICE, INTERPRETED

from dfn_kernels import field_sample

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no Triton kernel here")


def cells(positions, grid):
    """[B, n, D] -> [B, n] flat cell numbers."""
    flat = torch.zeros(positions.shape[:2], dtype=torch.int64, device=positions.device)
    for axis, size in enumerate(grid):
        index = (positions[..., axis].double() * size).floor().long()
        assert ((index >= 0) & (index < size)).all()
        flat = flat * size + index
    return flat


@pytest.mark.parametrize("method", ["stratified", "random"])
@pytest.mark.parametrize("grid", [(17,), (5, 7), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_follows_the_density(method, grid, dtype):
    B, n = 3, 20_011
    density = torch.rand(B, *grid, device=DEVICE).to(dtype)
    density = density * (density > 0.3)
    density[2] = 0  # counts as uniform
    positions, influence = field_sample(density, n, method=method)
    assert positions.shape == (B, n, len(grid)) and influence.shape == (B, n)
    assert positions.dtype == influence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (positions >= 0).all() and (positions < 1).all()
    where = cells(positions, grid)
    for b in range(B):
        mass = density[b].flatten().double()
        mass = mass if mass.sum() > 0 else torch.ones_like(mass)
        share = mass / mass.sum()
        count = torch.bincount(where[b], minlength=len(share)).double()
        assert count[mass == 0].eq(0).all(), "a cell without density received samples"
        if method == "stratified":  # positions in float32 may fall on the other side of a cell's edge, hence the 3
            assert (count - n * share).abs().max() <= 3
        else:
            assert ((count - n * share).abs() <= 6 * (n * share * (1 - share)).sqrt() + 1).all()
        expected = 1 / mass[where[b]]
        off = (influence[b].double() / (expected / expected.mean()) - 1).abs()
        assert (off < 1e-6).double().mean() > 0.999  # the rest are positions that rounded over an edge
        assert abs(influence[b].double().mean().item() - 1) < 1e-5


def test_generator_and_gradient():
    density = torch.rand(2, 6, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def draw(seed):
        return field_sample(density, 50, generator=torch.Generator(DEVICE).manual_seed(seed))

    (p1, w1), (p2, w2), (p3, _) = draw(1), draw(1), draw(2)
    assert torch.equal(p1, p2) and torch.equal(w1, w2) and not torch.equal(p1, p3)
    assert not p1.requires_grad
    grad = torch.randn_like(w1)
    (got,) = torch.autograd.grad(w1, density, grad)
    with torch.no_grad():
        flat, where = density.flatten(1).clone().requires_grad_(), cells(p1, (6, 5))
    with torch.enable_grad():
        w = 1 / flat.gather(1, where)
        (want,) = torch.autograd.grad(w / w.mean(1, keepdim=True), flat, grad)
    torch.testing.assert_close(got.flatten(1), want)


def test_uneven_grid_and_edges():
    one = torch.zeros(1, 1000, device=DEVICE)
    one[0, 999] = 1e-30  # the last cell alone, and a tiny mass
    positions, influence = field_sample(one, 100)
    assert (positions >= 0.999).all() and influence.eq(1).all()
    positions, influence = field_sample(torch.ones(2, 4, device=DEVICE), 0)
    assert positions.shape == (2, 0, 1) and influence.shape == (2, 0)
    positions, _ = field_sample(torch.ones(0, 4, device=DEVICE), 3)
    assert positions.shape == (0, 3, 1)
    even, _ = field_sample(torch.ones(1, 64, device=DEVICE), 64)
    assert torch.equal((even[0, :, 0] * 64).long(), torch.arange(64, device=DEVICE))


def test_compile():
    sample = torch.compile(lambda d: field_sample(d, 31), fullgraph=True, dynamic=True)
    for size in (7, 12):
        positions, influence = sample(torch.rand(2, size, 3, device=DEVICE))
        assert positions.shape == (2, 31, 2) and influence.isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], 3), TypeError, "density must be a tensor, got list"),
        ((torch.ones(2, 3, dtype=torch.int64), 3), TypeError, "density must be float"),
        ((torch.ones(3), 3), ValueError, r"density must have shape \[B, \*grid\] .* got \[3\]"),
        ((torch.ones(2, 0), 3), ValueError, "a grid that is not empty"),
        ((torch.ones(2, 3), -1), ValueError, "n must be between 0"),
        ((torch.ones(2, 3), 1.5), TypeError, "n must be an integer, got float"),
        ((-torch.ones(2, 3), 1), ValueError, "density must be finite and not negative"),
        ((torch.full((2, 3), float("nan")), 1), ValueError, "density must be finite"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match="^field_sample: .*" + message):
        field_sample(*arguments)
    with pytest.raises(ValueError, match="method must be 'stratified' or 'random', got 'sobol'"):
        field_sample(torch.ones(1, 2), 1, method="sobol")
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got int"):
        field_sample(torch.ones(1, 2), 1, generator=0)
