"""Models of fields: shapes, that hidden values stay hidden, gradients, digits, and text, image and audio together."""

import pytest
import torch

from dfn.fields.field import ImageField
from dfn.fields.sampler import AdaptiveSampler, Entities, UniformSampler
from dfn.models.field_models import (
    DFNClassifier,
    DFNFieldModel,
    masked_reconstruction_loss,
    some_of,
    two_samplings_loss,
)
from dfn.runs.digits import sample_digits
from dfn.training.losses import mean_state_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def entities(B=2, n=11, D=2, d=5):
    return Entities(torch.rand(B, n, D), torch.randn(B, n, d), torch.rand(B, n) + 0.5)


def bumps(batch, generator):
    """One smooth bump each, somewhere."""
    at = 0.2 + 0.6 * torch.rand(batch, 1, 1, 2, generator=generator)
    axis = (torch.arange(12) + 0.5) / 12
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    return ImageField(torch.exp(-20 * (grid - at).square().sum(-1))[..., None])


def test_hidden_values_do_not_matter_and_the_others_do():
    model, e = DFNFieldModel({"x": 5}, 24, pos_dim=2).eval(), entities()
    hidden = torch.zeros(2, 11, dtype=torch.bool)
    hidden[:, ::3] = True
    other = e._replace(states=torch.where(hidden[..., None], 99.0, e.states))
    found = model.reconstruct(e, hidden)
    assert found.shape == (2, 11, 5)
    torch.testing.assert_close(model.reconstruct(other, hidden), found)
    assert not torch.allclose(model.reconstruct(e, ~hidden), found)


def test_the_order_of_entities_does_not_matter():
    model, e = DFNFieldModel({"x": 5}, 24, pos_dim=3).eval(), entities()
    order = torch.randperm(11)
    shuffled = Entities(*(x[:, order] for x in e))
    torch.testing.assert_close(model(shuffled), model(e)[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.represent(shuffled), model.represent(e), rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = DFNFieldModel({"a": 5, "b": 3}, 24, pos_dim=2)
    e = {"a": entities(), "b": entities(n=7, D=1, d=3)}
    hidden = {"a": torch.rand(2, 11) < 0.5, "b": torch.rand(2, 7) < 0.5}
    states = model(e, hidden)
    assert states.shape == (2, 18, 24)
    loss = sum(model.values[k](x).square().sum() for k, x in zip("ab", states.split([11, 7], 1), strict=True))
    (loss + sum(model.represent(x, kind=k).square().sum() for k, x in e.items())).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    assert without <= {"masked.a", "masked.b"}, without  # unless nothing was hidden


def test_masked_reconstruction_learns():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, sampler = DFNFieldModel({"image": 1}, 32, pos_dim=2, k=8), UniformSampler()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 4e-3), []
    for _ in range(80):
        loss = masked_reconstruction_loss(model, sampler(bumps(24, generator), 40, generator), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    blind = bumps(200, generator).values.var().item()  # what saying the mean would leave
    assert sum(losses[-10:]) / 10 < 0.4 * blind, (losses[-10:], blind)


def test_something_is_always_hidden():
    few = torch.ones(2, 3)
    assert all(some_of(few, 1e-9, torch.Generator().manual_seed(i)).sum() == 1 for i in range(50))
    many = some_of(torch.ones(300, 100), 0.3, torch.Generator().manual_seed(0)).double().mean()
    assert abs(many - 0.3) < 5 * (0.3 * 0.7 / 30_000) ** 0.5
    assert some_of(few, 1.0).all()


def test_two_samplings_of_a_field_find_each_other():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = DFNFieldModel({"image": 1}, 32, layers=1, pos_dim=2, k=8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 4e-3), []
    for _ in range(60):
        loss = two_samplings_loss(model, bumps(24, generator), 30, AdaptiveSampler(), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.6 * 3.178, losses[::10]  # log 24: views that tell nothing


def test_the_classifier_learns_a_few_digits():
    pytest.importorskip("sklearn")
    from dfn.runs.digits import digits

    torch.manual_seed(0)
    (pictures, labels), _ = digits()
    e, wanted = sample_digits(pictures[:20], generator=torch.Generator().manual_seed(0)), labels[:20]
    model = DFNClassifier(9, 10, dim=32, pos_dim=2, k=8)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        loss = mean_state_loss(model(e), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 and (model(e).argmax(1) == wanted).float().mean() > 0.9


def test_errors_name_the_argument():
    model = DFNFieldModel({"a": 5, "b": 3}, 24)
    with pytest.raises(ValueError, match=r"kind must be one of \['a', 'b'\], got None"):
        model(entities())
    with pytest.raises(ValueError, match=r"states of 'a' must have shape \[B, n, 5\], got \[2, 11, 4\]"):
        model({"a": entities(d=4)})
    with pytest.raises(ValueError, match="at least one kind"):
        DFNFieldModel({})
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        masked_reconstruction_loss(model, entities(), kind="a", share=0)
