"""Text, image and audio in one model and one run."""

import pytest
import torch

from dfn.models.field_models import DFNFieldModel
from dfn.runs.joint import CHANNELS, KINDS, common_space, hide, joint_losses, match_rate, sample_world, small_world
from dfn.runs.options import Options
from dfn.runs.tasks import Joint
from dfn.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    torch.manual_seed(0)
    return DFNFieldModel(CHANNELS, dim=32, layers=2, pos_dim=2, k=8)


def train(model, steps, **options):
    """As `dfn train joint`; the losses of every step by name."""
    task, history = Joint(Options.of("joint", steps=steps, **options)), {}

    def loss(model, batch):
        losses = joint_losses(model, *batch)
        for name, x in losses.items():
            history.setdefault(name, []).append(x.item())
        return sum(losses.values())

    generator = torch.Generator().manual_seed(0)
    trainer = Trainer(model, loss=loss, steps=steps, lr=6e-3, warmup=20)
    trainer.fit((task.batch(generator) for _ in range(steps)), progress=False)
    return history


def scenes(batch=3):
    generator = torch.Generator().manual_seed(0)
    fields, label = small_world(batch, generator)
    return sample_world(fields, generator=generator), label


def test_entities_of_all_kinds_read_from_each_other():
    entities, _ = scenes()
    assert {kind: e.states.shape for kind, e in entities.items()} == {k: (3, 24, c) for k, c in CHANNELS.items()}
    m = model().eval()
    states = m(entities)
    assert states.shape == (3, 72, 32) and common_space(m, entities).shape == (3, 32)
    changed = {**entities, "audio": entities["audio"]._replace(states=entities["audio"].states + 1)}
    moved = (m(changed) - states).abs().sum(-1).split(24, 1)
    for kind, difference in zip(KINDS, moved, strict=True):
        assert (difference > 0).any(), f"{kind} does not read audio"


def test_one_step_trains_the_whole_model():
    entities, _ = scenes(6)
    m = model()
    losses = joint_losses(m, entities, hide(entities, torch.Generator().manual_seed(0)))
    assert set(losses) == {"text", "image", "audio", "contrast"}
    sum(losses.values()).backward()
    without = {name for name, p in m.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    assert not without, without


def test_all_losses_fall_in_one_run():
    history = train(model(), 30, batch=12)
    for name in ("contrast", "text", "image", "audio"):
        losses = history[name]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), (name, losses)


@pytest.mark.slow
def test_pictures_and_sounds_find_the_line_that_names_them():
    m = model()
    history = train(m, 200)
    for name in ("image", "audio"):
        assert sum(history[name][-10:]) / 10 < 0.92  # 1 is saying the mean
    assert match_rate(m, "image") > 0.38 and match_rate(m, "audio") > 0.5  # chance: 0.25
