"""Losses: language modelling per position and from the mean state, field reconstruction, contrast."""

import torch
from torch import Tensor, nn

from dfn_kernels._checks import are_sizes


def wide(x: Tensor) -> Tensor:
    """float32 for what is narrower; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def language_modelling(logits: Tensor, targets: Tensor, confidence_penalty: float = 0.0) -> Tensor:
    """Mean of ``-log softmax(logits_i)[target_i]`` over the positions, in nats.

    ``logits [B, N, V]``, ``targets`` int64 ``[B, N]``; a target of -100 does not count. 0-d, at least float32.

    ``confidence_penalty``: b. The gradient is then that of the loss less b times the mean entropy of the softmax, so
    that a prediction gets no surer than it must; the value stays the loss. Source: Pereyra et al., Regularizing neural
    networks by penalizing confident output distributions (2017), equation (3).
    """
    _shape("language_modelling", "targets", targets, tuple(logits.shape[:-1]))
    logits, targets = wide(logits).flatten(0, -2), targets.flatten()
    loss = nn.functional.cross_entropy(logits, targets)
    if not confidence_penalty:
        return loss
    log_p, counts = logits.log_softmax(-1).clamp_min(torch.finfo(logits.dtype).min), targets != -100  # 0 * -inf
    entropy = -(log_p.exp() * log_p).sum(-1)
    penalty = -confidence_penalty * torch.where(counts, entropy, 0.0).sum() / counts.sum()
    return loss + (penalty - penalty.detach())


class MeanStateHead(nn.Module):
    """``logits = W_o mean(s) + b``: what the entities of a sequence say together, as published.

    ``(states [B, N, d], influence [B, N] = 1, lengths int64 [B] = N)`` gives ``[B, V]``. The mean is weighted by
    influence, so that with sampled entities it estimates the mean over the field; padding does not count.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        are_sizes("MeanStateHead", dim=dim, classes=classes)
        self.out = nn.Linear(dim, classes)

    def forward(self, states: Tensor, influence: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        return self.out(mean_state(states, influence, lengths))


def mean_state(states: Tensor, influence: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """``sum_i w_i s_i / sum_i w_i`` over the entities: ``[B, N, d] -> [B, d]``."""
    real = torch.promote_types(states.dtype, torch.float32)  # a sum of many weights overflows in half precision
    weight = torch.ones_like(states[..., 0], dtype=real) if influence is None else influence.to(real)
    _shape("mean_state", "influence", weight, tuple(states.shape[:2]))
    if lengths is not None:
        _shape("mean_state", "lengths", lengths, tuple(states.shape[:1]))
        weight = weight * (torch.arange(states.shape[1], device=states.device) < lengths[:, None])
    total = weight.sum(1, keepdim=True)
    return (states * (weight / total.where(total > 0, 1)).to(states.dtype)[..., None]).sum(1)


def mean_state_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of ``softmax(W_o mean(s))``, in nats: ``logits [B, V]`` of a `MeanStateHead`, ``targets [B]``."""
    _shape("mean_state_loss", "targets", targets, tuple(logits.shape[:1]))
    return nn.functional.cross_entropy(wide(logits), targets)


def field_reconstruction(
    found: Tensor, wanted: Tensor, hidden: Tensor | None = None, influence: Tensor | None = None
) -> Tensor:
    """Mean of ``w_i |found_i - wanted_i|^2 / c`` over the hidden entities, with weights of mean 1 among them.

    ``found`` and ``wanted [B, N, c]``; ``hidden`` bool ``[B, N]``, True where the value was masked (all without it);
    ``influence [B, N]`` as a sampler gives it. 0 where nothing is hidden.
    """
    _shape("field_reconstruction", "wanted", wanted, tuple(found.shape))
    weight = wide(found).new_ones(found.shape[:2]) if influence is None else wide(influence)
    if hidden is not None:
        if hidden.dtype != torch.bool:
            raise TypeError(f"field_reconstruction: hidden must be bool, got {hidden.dtype}")
        _shape("field_reconstruction", "hidden", hidden, tuple(found.shape[:2]))
        weight = weight * hidden
    error = (wide(found) - wide(wanted)).square().mean(-1)
    total = weight.sum()
    return (weight * error).sum() / total.where(total > 0, 1)


def contrastive(left: Tensor, right: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of two views: row i of ``left [B, d]`` and of ``right [B, d]`` are two samplings of the same field.

    ``mean_i -log(exp(c_ii / t) / sum_j exp(c_ij / t))``, with c the cosine, in both directions. In nats; log B for
    views that tell nothing.

    Source: van den Oord et al., Representation learning with contrastive predictive coding (2018), equation (4).
    """
    if left.ndim != 2:
        raise ValueError(f"contrastive: left must have shape [B, d], got {list(left.shape)}")
    _shape("contrastive", "right", right, tuple(left.shape))
    if not temperature > 0:
        raise ValueError(f"contrastive: temperature must be positive, got {temperature}")
    left, right = (nn.functional.normalize(wide(x), dim=-1) for x in (left, right))
    with torch.autocast(left.device.type, enabled=False):  # a cosine that is rounded to 8 bits, times ten, is none
        cosines = left @ right.T / temperature
    same = torch.arange(len(left), device=left.device)
    loss = nn.functional.cross_entropy
    return (loss(cosines, same) + loss(cosines.T, same)) / 2


def _shape(loss: str, name: str, x: Tensor, shape: tuple) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{loss}: {name} must have shape {list(shape)}, got {list(x.shape)}")
