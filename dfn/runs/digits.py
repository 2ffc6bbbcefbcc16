"""Scikit-learn's digits, as pictures and as entities. ``dfn train digits`` learns them in about half a minute."""

import torch
from torch import Tensor

from ..fields.field import ImageField
from ..fields.sampler import AdaptiveSampler, Entities


def digits(held_out: int = 360, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pictures ``[n, 8, 8, 1]`` in [0, 1] and what they show, to train on and held out; split at random by ``seed``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("digits: needs scikit-learn, which the extra dfn-kernels[models] installs") from error
    data = load_digits()
    pictures, labels = torch.tensor(data.images).float()[..., None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    test, train = order[:held_out], order[held_out:]
    return (pictures[train], labels[train]), (pictures[test], labels[test])


def sample_digits(pictures: Tensor, n: int = 24, generator: torch.Generator | None = None) -> Entities:
    """n of the 64 pixels as entities, most where the picture changes; their states are patches of 3 x 3."""
    sampler = AdaptiveSampler(distinct=True, floor=0.1, encode=lambda field, p: field.patch(p, 3))
    return sampler(ImageField(pictures), n, generator)
