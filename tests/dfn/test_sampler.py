"""Samplers: where entities go, that they are reproducible, what has gradients, what they are worth."""

import pytest
import torch

from dfn.fields.density import LearnedDensity
from dfn.fields.field import GridField, ImageField, PointField, SpectrogramField, TextField, WaveField
from dfn.fields.sampler import AdaptiveSampler, Entities, Sampler, UniformSampler, draw, psnr, reconstruct
from dfn.studies.photographs import compare, photographs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fields():
    return {
        "image": ImageField(torch.rand(2, 12, 17, 3)),
        "wave": WaveField(torch.randn(2, 900, 2), 8000),
        "spectrogram": SpectrogramField.of(WaveField(torch.randn(2, 900, 1), 8000), 64, 16),
        "text": TextField(torch.randint(97, 120, (2, 150))),
        "points": PointField(torch.randn(2, 70, 3), torch.randn(2, 70, 2), (6, 7, 8)),
    }


@pytest.mark.parametrize("kind", ["image", "wave", "spectrogram", "text", "points"])
@pytest.mark.parametrize("sampler", [UniformSampler(), AdaptiveSampler(), AdaptiveSampler("entropy")])
def test_entities_of_every_field(kind, sampler):
    field = fields()[kind]
    entities = sampler(field, 41, generator())
    assert isinstance(entities, Entities)
    assert entities.positions.shape == (2, 41, field.dim) and entities.states.shape == (2, 41, field.channels)
    assert (entities.positions >= 0).all() and (entities.positions < 1).all()
    torch.testing.assert_close(entities.influence.mean(1), torch.ones(2))
    torch.testing.assert_close(entities.states, field.at(entities.positions))
    again, other = sampler(field, 41, generator()), sampler(field, 41, generator(1))
    for a, b in zip(entities, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(entities.positions, other.positions)


def test_follows_the_density_and_weighs_it_out():
    density = torch.ones(1, 16, 16)
    density[:, :, 8:] = 9
    positions, influence = draw(density, 4000, generator=generator())
    right = positions[0, :, 1] >= 0.5
    assert abs(right.float().mean() - 0.9) < 0.01
    mean = (influence[0] * right).sum() / influence.sum()
    assert abs(mean - 0.5) < 0.03  # unbiased, in spite of the density


def test_text_gets_fewer_entities_than_bytes_where_it_is_predictable():
    dull = b"la " * 100
    varied = bytes(torch.randint(33, 127, (300,), generator=generator(3)).tolist())
    field = TextField(dull + varied)
    sampler = AdaptiveSampler()
    entities = sampler(field, 200, generator())
    byte = (entities.positions[0, :, 0] * 600).long()
    assert len(byte.unique()) == 200 and (byte.diff() > 0).all()  # all different, in order of time
    assert (byte < 300).sum() < 40 < 150 < (byte >= 300).sum()
    few, many = (sampler.budget(TextField(text), 4.0) for text in (dull, varied))
    assert few < 60 and many > 250


def test_distinct_takes_every_cell_when_there_are_as_many():
    field = TextField(b"abcdefgh" * 5)
    for n in (1, 39, 40):
        byte = (AdaptiveSampler()(field, n, generator()).positions[0, :, 0] * 40).long()
        assert len(byte.unique()) == n
    positions, _ = draw(torch.tensor([[0.0, 0, 5, 0, 0]]), 5, distinct=True)
    assert (positions[0, :, 0] * 5).long().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="n must be at most the 40 cells of the field, got 41"):
        AdaptiveSampler()(field, 41)


def test_gradients_reach_values_encoder_and_density():
    values = torch.rand(2, 9, 9, 3, requires_grad=True)
    field = ImageField(values)
    density, encoder = LearnedDensity(3, 2), torch.nn.Linear(27, 5)
    torch.nn.init.normal_(density.second.weight)
    sampler = AdaptiveSampler(density, encode=lambda f, p: encoder(f.patch(p, 3)))
    entities = sampler(field, 20, generator())
    (entities.states.square().mean() + (entities.influence * entities.states[..., 0]).mean()).backward()
    for x in (values, encoder.weight, density.first.weight, density.second.bias):
        assert x.grad is not None and x.grad.abs().sum() > 0
    assert "density.first.weight" not in dict(UniformSampler().named_parameters())
    assert any(name.startswith("measure.") for name, _ in sampler.named_parameters())


def test_a_learned_density_learns_where_it_pays():
    """Weighing by influence is unbiased for every density; its square is least where the density follows the values."""
    values = torch.zeros(1, 32, 1)
    values[:, 20:28] = 3.0
    field, density = GridField(values), LearnedDensity(1, 1)
    optimizer = torch.optim.Adam(density.parameters(), 0.1)
    for step in range(25):
        d = density(field)
        positions, _ = draw(d, 200, generator=generator(step))
        cell = (positions[0, :, 0] * 32).long()
        estimate = (values[0, cell, 0] * d.sum() / d[0, cell] / 32).square().mean()
        share = (d / d.detach()).squeeze(0)[cell].log().mean()  # keeps the scale in place
        (estimate + share).backward()
        optimizer.step()
        optimizer.zero_grad()
    d = density(field)[0]
    assert d[21:27].mean() > 2 * d[2:18].mean()


def test_a_sampler_in_one_file():
    class Centre(Sampler):
        def density(self, field):
            near = torch.exp(-8 * (field.centers() - 0.5).square().sum(-1)).view(1, *field.grid)
            return near.expand(field.batch, *field.grid)

    entities = Centre()(ImageField(torch.rand(2, 20, 20, 1)), 300, generator())
    assert ((entities.positions - 0.5).abs().amax(-1) < 0.25).float().mean() > 0.5

    class Wrong(Sampler):
        def density(self, field):
            return torch.ones(3)

    with pytest.raises(ValueError, match=r"Wrong: density must have shape \[1, 4\], got \[3\]"):
        Wrong()(GridField(torch.zeros(1, 4, 1)), 2)


def test_errors():
    with pytest.raises(ValueError, match="density must be one of"):
        AdaptiveSampler("taste")
    with pytest.raises(ValueError, match="floor must be between 0 and 1, got 2"):
        AdaptiveSampler(floor=2)
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        UniformSampler()(GridField(torch.zeros(1, 4, 1)), 0)


def test_reconstruction_is_exact_with_an_entity_in_every_cell():
    field = GridField(torch.rand(1, 9, 13, 2))
    positions = field.centers()
    entities = Entities(positions, field.at(positions), torch.ones(1, 117))
    assert psnr(reconstruct(entities, field, k=1), field.values) > 100


def test_adaptive_sampling_tells_photographs_better():
    """A ninth of the pixels, one entity for ten of them; the whole photographs are `dfn eval photographs`."""
    pytest.importorskip("sklearn")
    for name, field in photographs().items():
        small = ImageField(field.values[:, ::3, ::3].contiguous())
        n = small.grid[0] * small.grid[1] // 10
        found = compare(small, n, seeds=1)
        assert found["adaptive"] > found["uniform"] + {"temple": 0.3, "flower": 2.0}[name], found


@pytest.mark.slow
def test_adaptive_sampling_is_a_decibel_better_on_each_photograph():
    """One entity for ten pixels. A regular lattice beats random uniform positions; on average that is met, too."""
    pytest.importorskip("sklearn")
    found = [compare(field, field.grid[0] * field.grid[1] // 10) for field in photographs().values()]
    assert all(f["adaptive"] > f["uniform"] + 1 for f in found), found
    assert sum(f["adaptive"] - f["regular"] for f in found) / 2 > 1, found
