"""Pictures: entities that lie on a grid, in `EntityPositions` and `FlowMixer`."""

import pytest
import torch
from helpers import check_compiled_module, same_bits
from torch import nn

from dfn.models.layers import EntityPositions, FlowMixer

pytestmark = pytest.mark.usefixtures("one_thread")
DIM, GRID = 12, (5, 7)


def test_where_cells_lie():
    places, x = EntityPositions(DIM, 4, 4, grid=(5, 7, 2)), torch.randn(3, 70, DIM)
    p = places(x)
    axes = [torch.arange(n) for n in (5, 7, 2)]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(70, 3)
    for head, scale in enumerate(places.log_scale.exp(), 1):
        assert same_bits(p[:, head, :, :3], (scale * cells).expand(3, -1, -1))
    free = places.place(x).view(3, 70, 4, 4).transpose(1, 2)
    torch.testing.assert_close(p[:, 0], free[:, 0])  # a semantic head does not know where
    torch.testing.assert_close(p[..., 3], free[..., 3])


def test_one_axis_is_time():
    line, time, x = EntityPositions(DIM, grid=(9,)), EntityPositions(DIM), torch.randn(2, 9, DIM)
    line.load_state_dict(time.state_dict())
    assert same_bits(line(x), time(x)) and same_bits(line(x, 4), time(x, 4))


def test_neighbours_are_those_in_the_picture():
    """With nothing but the cell to go by, five neighbours are a cell and those above, below, left and right of it."""
    mixer = FlowMixer(DIM, 1, k=5, causal=False, grid=GRID)
    for p in (mixer.attention.flow.weight, mixer.attention.flow.bias, mixer.positions.place.weight):
        nn.init.zeros_(p)
    x = torch.randn(1, 35, DIM)
    other = x.clone()
    other[0, 2 * 7 + 3] += 1  # row 2, column 3
    with torch.no_grad():
        changed = (mixer(x) != mixer(other)).any(-1).view(GRID)
    want = torch.zeros(GRID, dtype=torch.bool)
    want[1:4, 3], want[2, 2:5] = True, True
    assert changed.equal(want)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_and_shapes(causal):
    mixer, x = FlowMixer(DIM, 3, 6, causal, grid=GRID), torch.randn(2, 35, DIM, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in [*mixer.named_parameters(), ("x", x)]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("causal", [False, True])
def test_padding_moves_nobody(causal):
    mixer = FlowMixer(DIM, 4, 6, causal, grid=GRID)
    x, mask = torch.randn(2, 35, DIM), torch.zeros(2, 35, dtype=torch.bool)
    mask[0, [0, 1, 8, 20, 34]], mask[1, 3:30] = True, True
    noise = torch.where(mask[..., None], torch.full_like(x, float("nan")), x)
    with torch.no_grad():
        y = mixer(x, mask)
        assert same_bits(y, mixer(noise, mask)) and y[mask].eq(0).all()
        for b in range(2):
            kept, number = x[b : b + 1, ~mask[b]], torch.arange(35)[None, ~mask[b]]
            alone = mixer.out(mixer.attention(kept, mixer.positions(kept, number=number))[0])
            torch.testing.assert_close(y[b, ~mask[b]], alone[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mixer(x, torch.zeros_like(mask)), mixer(x))


def test_packed_pictures():
    """Every picture as it would be alone; the last one ends early."""
    mixer = FlowMixer(DIM, 4, 6, False, grid=GRID).double()
    x, ptr = torch.randn(2, 35 + 35 + 11, DIM).double(), torch.tensor([0, 35, 70, 81])
    packed = mixer(x, ptr=ptr)
    for a, b in ((0, 35), (35, 70)):
        torch.testing.assert_close(packed[:, a:b], mixer(x[:, a:b]))
    last = x[:, 70:]
    torch.testing.assert_close(packed[:, 70:], mixer.out(mixer.attention(last, mixer.positions(last))[0]))


def test_in_a_transformer():
    layer = nn.TransformerEncoderLayer(DIM, 3, 24, dropout=0.0, batch_first=True)
    layer.self_attn = FlowMixer(DIM, 3, causal=False, grid=GRID)
    mask = torch.zeros(2, 35, dtype=torch.bool)
    mask[1, 4:9] = True
    assert layer(torch.randn(2, 35, DIM), src_key_padding_mask=mask).shape == (2, 35, DIM)


def test_compiles():
    check_compiled_module(FlowMixer(DIM, k=4, causal=False, grid=GRID), lambda y: y, torch.randn(2, 35, DIM))


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"x must have the 35 cells of grid \(5, 7\), got 36"):
        FlowMixer(DIM, grid=GRID)(torch.randn(1, 36, DIM))
    with pytest.raises(ValueError, match="grid must have 1 to pos_dim = 2 axes, got 3"):
        FlowMixer(DIM, pos_dim=2, grid=(2, 3, 4))
    with pytest.raises(ValueError, match=r"grid\[1\] must be at least 1, got 0"):
        EntityPositions(DIM, grid=(4, 0))
