"""Made-up results for the tests of pictures: shaped like those of studies and benchmarks, true of nothing."""

import math
import random

from dfn.studies.parts import LINES
from dfn.training.trainer import History

KINDS = ("dfn", "transformer++", "window", "convolved", "transformer", "flownetwork")


def history(steps: int, end: float, start: float = 8.0, evaluations: int = 6, scale: float = math.log(2)) -> History:
    """A loss that falls from ``start`` to ``end``, in nats with the scale of bits."""
    draw, made = random.Random(0), History()
    for i in range(steps):
        loss = end + (start - end) * math.exp(-6 * i / steps)
        made.steps.append(i + 1)
        made.losses.append(scale * (loss + 0.1 * draw.random()))
        made.seconds.append(0.2 * (i + 1))
        made.tokens.append(2048 * (i + 1))
        if evaluations and (i + 1) % (steps // evaluations) == 0:
            made.evaluated.append((i + 1, made.seconds[-1], scale * (loss + 0.08)) if scale == 1 else
                                  (i + 1, made.seconds[-1], loss + 0.08))  # fmt: skip
    return made


def language_study(seeds: int = 3) -> dict:
    draw, cells = random.Random(1), {}
    for i, kind in enumerate(KINDS):
        for seed in range(seeds):
            end = 2.1 + 0.09 * i + 0.02 * draw.random()
            curve = [dict(step=300 * n, bytes=1_200_000 * n, seconds=(20 + 9 * i + seed) * n,
                          value=end + 2.5 * math.exp(-0.7 * n)) for n in range(1, 13)]  # fmt: skip
            cells[f"{kind}/0.006/{seed}"] = dict(value=curve[-1]["value"], curve=curve)
    return dict(study="language", options=dict(parameters="1M", seed=0), cells=cells,
                beside=dict(gzip=2.31, bzip2=2.16, xz=2.13, bigram=3.5))  # fmt: skip


def recall_study(seeds: int = 3, shapes=((1, 64), (1, 128), (2, 64), (2, 128))) -> dict:
    draw, cells = random.Random(2), {}
    for layers, dim in shapes:
        for i, kind in enumerate(KINDS[:4]):
            for pairs in (4, 8, 16, 32, 64):
                for seed in range(seeds):
                    share = 1 - (i + 2 - layers) * (pairs / 64) ** 0.5 * 0.24 - 0.05 * draw.random() * (i + 2 - layers)
                    cells[f"{kind}/{layers}/{dim}/{pairs}/0.003/{seed}"] = dict(value=max(0.02, min(1, share)))
    return dict(study="recall", options=dict(seed=0, steps=1500), cells=cells)


def length_study(seeds: int = 3) -> dict:
    draw, cells = random.Random(3), {}
    ends = [512 * 2**n for n in range(8)]
    for seed in range(seeds):
        for i, kind in enumerate(("dfn", "transformer++", "window")):
            by = {str(end): 2.2 + 0.1 * i * n + 0.03 * draw.random() for n, end in enumerate(ends)}
            cells[f"text/{kind}/0.006/{seed}"] = dict(value=2.2 + 0.1 * i, by_stretch=by, by_length=by)
        for i, kind in enumerate(("dfn", "transformer++", "window", "dfn, memory", "semantic", "semantic, memory")):
            share = {str(e - 2): max(0, min(1, 1 - 0.12 * i * n)) for n, e in enumerate([64, *ends])}
            cells[f"needle/{kind}/0.006/{seed}"] = dict(value=1.0, by_distance=share)
    return dict(study="length", options=dict(seed=0, length=512), cells=cells)


def parts_study(seeds: int = 3, lines=tuple(LINES)) -> dict:
    draw, cells = random.Random(4), {}
    for seed in range(seeds):
        for n, line in enumerate(lines):
            cells[f"text/{line}/{seed}"] = dict(value=2.4 + 0.02 * n + 0.03 * draw.random())
            cells[f"segments/{line}/{seed}"] = dict(value=0.99 - 0.04 * n * draw.random())
            if line != "memory":
                cells[f"recall/{line}/{seed}"] = dict(value=0.98 - 0.03 * n * draw.random())
    return dict(study="parts", options=dict(seed=0, steps=2000), cells=cells,
                lines={line: said for line, (said, _) in LINES.items()})  # fmt: skip
