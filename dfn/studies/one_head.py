"""One head alone, which is to find the symbol so many places back: what its width and offset must do, and how fast.

The head of a causal block without all else: place j back from the reader weighs ``exp(-(scale j + offset)^2 / (2
sigma^2))``, the k nearest count, what is read is the weighted mean of one-hot symbols, and ``beta`` times that are the
logits. scale, sigma, offset and beta learn by Adam. All settings are trained side by side, on the same random symbols.
"""

import itertools
import math

import torch
from torch.nn.functional import cross_entropy, one_hot

STARTS = {"1/8": 0.125, "1/2": 0.5}  # the time scales of the two heads that see a stretch; both have sigma 2, offset 0
SETTINGS = dict(scale=tuple(STARTS), distance=(8, 15, 16, 24), k=(16, 32), lr=(1e-3, 3e-3, 6e-3),
                geometry_rate=(1, 3, 10))  # fmt: skip
SYMBOLS, PLACES, BATCH, WARMUP, FINAL, BETAS = 16, 48, 64, 50, 0.02, (0.9, 0.99)
SOLVED = 0.1  # nats
QUICK = 30.0  # beta stands for weights that many others move, so it is no obstacle


def one_head(steps: int, seed: int = 0) -> list[dict]:
    """A dict for each setting: the loss at the end in nats, how far back the head looks, its width in places."""
    chosen = [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]
    column = lambda name: torch.tensor([float(s[name]) for s in chosen])  # noqa: E731
    scale = torch.tensor([STARTS[s["scale"]] for s in chosen])
    distance, k, lr, rate = column("distance").long(), column("k"), column("lr"), column("geometry_rate")
    n, generator = len(chosen), torch.Generator().manual_seed(seed)
    learned = [scale.log(), torch.full((n,), math.log(2.0)), torch.zeros(n), torch.full((n,), 2.0)]
    for p in learned:
        p.requires_grad_()
    rates = [rate, rate, rate, torch.full((n,), QUICK)]
    means, squares = ([torch.zeros(n) for _ in learned] for _ in range(2))
    back, smooth = torch.arange(PLACES), torch.full((n,), math.log(SYMBOLS))
    for step in range(1, steps + 1):
        said = torch.randint(SYMBOLS, (BATCH, PLACES), generator=generator)
        log_scale, log_sigma, offset, beta = learned
        off = (log_scale.exp()[:, None] * back + offset[:, None]).square()
        beyond = off.argsort(dim=1, stable=True).argsort(1) >= k[:, None]
        weights = (-off / (2 * log_sigma.exp()[:, None].square())).masked_fill(beyond, -torch.inf).softmax(1)
        read = torch.einsum("nl,blv->nbv", weights, one_hot(said, SYMBOLS).float())
        wanted = said[:, distance].T
        logits = beta[:, None, None] * read
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(n, BATCH).mean(1)
        gradients = torch.autograd.grad(loss.sum(), learned)
        cosine = FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * step / steps))
        length = lr * min(1.0, step / WARMUP) * cosine
        with torch.no_grad():
            for p, g, m, v, times in zip(learned, gradients, means, squares, rates, strict=True):
                m.lerp_(g, 1 - BETAS[0])
                v.lerp_(g * g, 1 - BETAS[1])
                p -= length * times * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
            smooth.lerp_(loss, 0.1)
    scale, sigma = (p.detach().exp() for p in learned[:2])
    looks, width = -learned[2].detach() / scale, sigma / scale
    return [dict(**s, loss=round(float(a), 3), back=round(float(b), 2), width=round(float(c), 2))
            for s, a, b, c in zip(chosen, smooth, looks, width, strict=True)]  # fmt: skip
