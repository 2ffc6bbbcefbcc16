"""Losses against their formulas."""

import math

import pytest
import torch

from dfn.training.losses import (
    MeanStateHead,
    contrastive,
    field_reconstruction,
    language_modelling,
    mean_state,
    mean_state_loss,
)


def test_language_modelling_counts_what_is_scored():
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    targets[0, :3] = -100
    want = [-logits[b, i].log_softmax(-1)[targets[b, i]] for b in range(2) for i in range(5) if targets[b, i] >= 0]
    torch.testing.assert_close(language_modelling(logits, targets), torch.stack(want).mean())


def test_confidence_penalty():
    """The value is the loss; the gradient that of the loss less b times the mean entropy, of what is scored."""
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (2, 5))
    targets[0, :3] = -100
    loss = language_modelling(logits, targets, 0.3)
    assert torch.equal(loss, language_modelling(logits, targets))
    (got,) = torch.autograd.grad(loss, logits)
    scored = logits[targets >= 0].softmax(-1)
    want = -scored[range(7), targets[targets >= 0]].log().mean() + 0.3 * (scored * scored.log()).sum(-1).mean()
    torch.testing.assert_close(got, torch.autograd.grad(want, logits)[0])
    sure = torch.tensor([[[400.0, -400.0, -torch.inf]]], requires_grad=True)  # a probability of 0 has no part in it
    language_modelling(sure, torch.tensor([[0]]), 0.3).backward()
    assert sure.grad.isfinite().all()


def test_mean_state_weighs_and_leaves_padding_out():
    states, influence, lengths = torch.randn(2, 5, 3), torch.rand(2, 5), torch.tensor([5, 2])
    found = mean_state(states, influence, lengths)
    for b, n in enumerate(lengths.tolist()):
        w = influence[b, :n, None]
        torch.testing.assert_close(found[b], (w * states[b, :n]).sum(0) / w.sum())
    torch.testing.assert_close(mean_state(states), states.mean(1))
    head = MeanStateHead(3, 4)
    logits = head(states, influence, lengths)
    torch.testing.assert_close(logits, found @ head.out.weight.T + head.out.bias)
    targets = torch.tensor([3, 0])
    want = -(logits.softmax(-1)[torch.arange(2), targets]).log().mean()
    torch.testing.assert_close(mean_state_loss(logits, targets), want)


def test_field_reconstruction_scores_the_hidden():
    found, wanted = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    hidden = torch.tensor([[True, False, True, False, False], [False, False, False, True, False]])
    error = (found - wanted).square().mean(-1)
    torch.testing.assert_close(field_reconstruction(found, wanted), error.mean())
    torch.testing.assert_close(field_reconstruction(found, wanted, hidden), error[hidden].mean())
    w = torch.rand(2, 5)
    want = (w * error)[hidden].sum() / w[hidden].sum()
    torch.testing.assert_close(field_reconstruction(found, wanted, hidden, w), want)
    assert field_reconstruction(found, wanted, torch.zeros_like(hidden)) == 0


def test_contrastive_is_info_nce():
    left, right, t = torch.randn(6, 4), torch.randn(6, 4), 0.2
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()  # noqa: E731
    total = 0.0
    for i in range(6):
        rows = sum(math.exp(cosine(left[i], right[j]) / t) for j in range(6))
        columns = sum(math.exp(cosine(left[j], right[i]) / t) for j in range(6))
        total += math.log(rows * columns) - 2 * cosine(left[i], right[i]) / t
    assert abs(contrastive(left, right, t).item() - total / 12) < 1e-5
    assert contrastive(torch.eye(6), torch.eye(6)) < 1e-3
    torch.testing.assert_close(contrastive(torch.ones(6, 4), torch.ones(6, 4)), torch.tensor(math.log(6)))


def test_contrastive_is_in_float32_under_autocast():
    left, right = torch.randn(2, 7, 33)
    want = contrastive(left, right)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive(left, right), want)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"right must have shape \[3, 4\], got \[2, 4\]"):
        contrastive(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        contrastive(torch.ones(3, 4), torch.ones(3, 4), 0)
    with pytest.raises(TypeError, match="hidden must be bool, got torch.float32"):
        field_reconstruction(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"targets must have shape \[2, 3\], got \[2, 4\]"):
        language_modelling(torch.ones(2, 3, 5), torch.zeros(2, 4).long())


def test_weights_at_both_ends_of_the_range():
    """Only their ratios count, however small they are and however many."""
    states, wanted = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    influence = torch.rand(2, 9) + 0.5
    for scale in (1e-37, 1e-20, 1e30):
        torch.testing.assert_close(mean_state(states, scale * influence), mean_state(states, influence))
        torch.testing.assert_close(
            field_reconstruction(states, wanted, influence=scale * influence),
            field_reconstruction(states, wanted, influence=influence),
        )
    many = torch.ones(1, 70000, 1, dtype=torch.float16)  # their sum is beyond float16
    assert mean_state(many).item() == pytest.approx(1, abs=2e-2)
