"""A classifier of scikit-learn's digits, from entities: ``python -m dfn.digits``. About half a minute."""

import argparse
import time

import torch
from torch import Tensor, nn

from .field import ImageField
from .field_models import DFNClassifier
from .losses import mean_state_loss
from .sampler import AdaptiveSampler, Entities


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


def train_digits(steps: int = 500, batch: int = 64, lr: float = 6e-3, seed: int = 0) -> tuple[DFNClassifier, float]:
    """The model and its accuracy on the held-out digits. Entities are drawn anew in every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (pictures, labels), (held_out, wanted) = digits()
    model = DFNClassifier(9, 10, dim=48, layers=2, pos_dim=2, k=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        loss = mean_state_loss(model(sample_digits(pictures[rows], generator=generator)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model(sample_digits(held_out, generator=torch.Generator().manual_seed(1))).argmax(1)
    return model, float((found == wanted).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfn.digits", description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    began = time.perf_counter()
    _, accuracy = train_digits(args.steps, seed=args.seed)
    print(f"{accuracy:.1%} of the held-out digits after {args.steps} steps, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
