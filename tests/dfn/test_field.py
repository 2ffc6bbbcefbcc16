"""Fields and densities: values at positions against the formulas, files, errors."""

import itertools
import math
import wave

import pytest
import torch

from dfn.fields.density import LearnedDensity, box_mean, curve, gradient_magnitude, local_entropy, occupancy, surprise
from dfn.fields.field import GridField, ImageField, PointField, SpectrogramField, TextField, WaveField


@pytest.mark.parametrize("grid", [(7,), (5, 11), (3, 5, 2)])
def test_interpolation_is_exact_for_linear_functions_and_at_centres(grid):
    field = GridField(torch.randn(2, *grid, 3))
    centers = field.centers().expand(2, -1, -1)
    torch.testing.assert_close(field.at(centers), field.values.flatten(1, -2), rtol=1e-4, atol=1e-5)
    slope = torch.randn(len(grid), 2)
    linear = GridField((field.centers() @ slope).unflatten(1, grid))
    low, high = field.centers().amin(1), field.centers().amax(1)
    positions = low + (high - low) * torch.rand(1, 13, len(grid))
    torch.testing.assert_close(linear.at(positions), positions @ slope, rtol=1e-4, atol=1e-5)


def test_interpolation_has_gradients_to_values_and_positions():
    values, positions = torch.randn(1, 4, 5, 2).double(), 0.2 + 0.6 * torch.rand(1, 3, 2).double()
    check = lambda v, p: GridField(v).at(p)  # noqa: E731
    assert torch.autograd.gradcheck(check, (values.requires_grad_(), positions.requires_grad_()))


def test_a_patch_is_the_cells_around():
    field = GridField(torch.arange(35.0).view(1, 5, 7, 1))
    middle = torch.tensor([[[2.5 / 5, 3.5 / 7]]])
    want = field.values[0, 1:4, 2:5, 0].flatten()
    torch.testing.assert_close(field.patch(middle, 3)[0, 0], want)


def test_text_takes_the_byte_of_the_cell():
    table = torch.randn(256, 5, requires_grad=True)
    field = TextField(b"hello", table)
    positions = torch.tensor([[[0.0], [0.39], [0.41], [0.999]]])
    assert bytes(field.ids_at(positions)[0].tolist()) == b"helo"
    states = field.at(positions)
    assert torch.equal(states[0], table[torch.tensor(list(b"helo"))])
    states.sum().backward()
    assert table.grad[ord("h")].eq(1).all() and table.grad[ord("x")].eq(0).all()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(tmp_path, width):
    want = torch.stack([torch.linspace(-1, 0.99, 101), torch.zeros(101)], -1)
    unit = 256**width / 2
    raw = bytearray()
    for x in want.flatten().tolist():
        level = int(x * unit)
        raw += (level + 128).to_bytes(1, "little") if width == 1 else level.to_bytes(width, "little", signed=True)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, 8000, 0, "NONE", ""))
        file.writeframes(bytes(raw))
    field = WaveField.load(tmp_path / "a.wav")
    assert field.rate == 8000 and field.grid == (101,)
    torch.testing.assert_close(field.values[0], want, rtol=0, atol=1 / unit + 1e-6)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="WAV file"):
        WaveField.load(tmp_path / "b.wav")


def test_a_spectrogram_shows_a_tone_where_it_is():
    time = torch.arange(8000) / 8000
    tone = torch.where(time < 0.5, torch.sin(2 * math.pi * 1000 * time), torch.sin(2 * math.pi * 3000 * time))
    field = SpectrogramField.of(WaveField(tone.view(1, -1, 1), 8000), window=256, hop=64)
    T, F = field.grid
    assert F == 129 and field.values.min() >= 0 and field.values.max() == 1
    loudest = field.values[0, :, :, 0].argmax(1).float() / (F - 1) * 4000
    assert (loudest[5 : T // 2 - 5] - 1000).abs().max() < 40 and (loudest[T // 2 + 5 : -5] - 3000).abs().max() < 40


def test_an_image_from_a_file(tmp_path):
    plt = pytest.importorskip("matplotlib.image")
    pixels = torch.rand(6, 9, 3)
    plt.imsave(tmp_path / "a.png", pixels.numpy())
    field = ImageField.load(tmp_path / "a.png")
    assert field.grid == (6, 9) and field.channels == 3
    torch.testing.assert_close(field.values[0], pixels, rtol=0, atol=1 / 255)


def test_points_between_points():
    points, values = torch.rand(2, 200, 2) * 7 - 3, torch.randn(2, 200, 1)
    field = PointField(points, values, (16, 16), k=5)
    torch.testing.assert_close(PointField(points, values, k=1).at(field.points), values)
    assert occupancy(field).shape == (2, 16, 16) and field.counts().sum() == 400
    assert field.values.shape == (2, 16, 16, 1) and field.at(torch.rand(2, 9, 2)).shape == (2, 9, 1)


def test_gradient_magnitude_of_a_plane():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    density = gradient_magnitude(GridField((3 * x + 4 * y)[None, ..., None]), smooth=1)
    torch.testing.assert_close(density[0, 1:-1, 1:-1], torch.full((6, 7), 5.0))


def test_entropy_is_high_where_values_vary():
    values = torch.zeros(1, 40, 40, 1)
    values[:, :, 20:] = torch.rand(1, 40, 20, 1)
    entropy = local_entropy(GridField(values))
    assert entropy[0, :, :16].max() < 1e-4 and entropy[0, :, 24:].min() > 2


def test_surprise_is_the_bigrams_and_causal():
    text = bytes(torch.randint(97, 101, (60,)).tolist())
    want = []
    for i, b in enumerate(text):
        pair = sum(text[j - 1 : j + 1] == text[i - 1 : i + 1] for j in range(1, i)) if i else 0
        before = sum(text[j] == text[i - 1] for j in range(i - 1)) if i else 0
        unigram = (sum(c == b for c in text[:i]) + 1) / (i + 256)
        want.append(-math.log2((pair + 2 * unigram) / (before + 2)))
    found = surprise(TextField(text))
    torch.testing.assert_close(found[0], torch.tensor(want), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(surprise(TextField(text[:30]))[0], found[0, :30])


def test_box_mean():
    x = torch.rand(2, 7, 5)
    found = box_mean(x, 3)
    for i, j in itertools.product(range(7), range(5)):
        want = x[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].flatten(1).mean(1)
        torch.testing.assert_close(found[:, i, j], want)


@pytest.mark.parametrize("grid", [(8, 8), (5, 13), (4, 4, 4), (17,)])
def test_the_curve_visits_every_cell_and_never_jumps_far(grid):
    order = curve(grid)
    assert order.sort().values.tolist() == list(range(math.prod(grid)))
    cell = torch.stack(torch.unravel_index(order, grid), -1)
    steps = (cell[1:] - cell[:-1]).abs().sum(1)
    if len(set(grid)) == 1 and grid[0] & (grid[0] - 1) == 0:
        assert steps.eq(1).all()
    else:
        assert steps.float().mean() < 2


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"values must have shape \[B, \*grid, c\]"):
        GridField(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="values must be a float tensor, got torch.int64"):
        GridField(torch.zeros(3, 4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions must have shape \[1, n, 2\], got \[1, 5, 3\]"):
        ImageField(torch.zeros(1, 4, 4, 1)).at(torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="ids must be between 0 and 255"):
        TextField(torch.tensor([[300]]))
    with pytest.raises(ValueError, match="window must be at most the 100 samples"):
        SpectrogramField.of(WaveField(torch.zeros(1, 100, 1), 8000))
    with pytest.raises(TypeError, match="field must be a TextField, got ImageField"):
        surprise(ImageField(torch.zeros(1, 4, 4, 1)))
    with pytest.raises(ValueError, match="field must have 2 axes and 3 channels, got 2 and 1"):
        LearnedDensity(3, 2)(ImageField(torch.zeros(1, 4, 4, 1)))
