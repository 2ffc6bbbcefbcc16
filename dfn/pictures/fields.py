"""A picture of entities: where a sampler puts them on a photograph, a spectrogram and a line of text."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..fields.density import surprise
from ..fields.field import ImageField, SpectrogramField, TextField, WaveField
from ..fields.sampler import AdaptiveSampler, Entities, UniformSampler, psnr, reconstruct
from ..runs.crops import photographs
from ..style import INK, PALE, SMALL, SOFT, VERMILLION, bare, picture

CREAM = "#fff3d6"
LINE = b"the cat sat on the mat, the cat sat on the hat, the cat sat on the xylophone."


def example_sound(seconds: float = 1.6, rate: int = 16000) -> WaveField:
    """Three plucked strings and a rising whistle, made of sines."""
    t = torch.arange(int(seconds * rate)) / rate
    sound = 0.25 * torch.sin(2 * math.pi * (1800 * t + 1100 * t * t)) * torch.exp(-(((t - 1.05) / 0.35) ** 2))
    for start, pitch in ((0.1, 220.0), (0.5, 330.0), (0.9, 277.0)):
        age = (t - start).clamp(min=0)
        for harmonic in range(1, 13):
            fade = torch.exp(-age * (2.5 + 1.2 * harmonic)) * (t >= start) / harmonic
            sound = sound + fade * torch.sin(2 * math.pi * pitch * harmonic * age)
    return WaveField((sound / sound.abs().max()).view(1, -1, 1), rate)


def entities_picture(
    path: str | Path, *, photograph: ImageField | None = None, sound: WaveField | None = None, line: bytes = LINE,
    share: int = 40, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Draws the picture to ``path`` (PNG) and returns the PSNR, in dB, of the photograph rebuilt both ways.

    Args:
        photograph: a flower without it (scikit-learn's). sound: `example_sound` without it. line: one line of text.
        share: the photograph and the spectrogram get one entity for so many cells, the text one for two bytes.
        seed: of the samples.
    """
    if photograph is None:
        photograph = photographs()["flower"]
    generator = torch.Generator().manual_seed(seed)
    n = max(16, math.prod(photograph.grid) // share)
    adaptive, uniform = AdaptiveSampler()(photograph, n, generator), UniformSampler()(photograph, n, generator)

    H, W = photograph.grid
    built = [reconstruct(e, photograph).clamp(0, 1) for e in (uniform, adaptive)]
    figures = {name: psnr(b, photograph.values) for name, b in zip(("uniform", "adaptive"), built, strict=True)}
    sound = example_sound() if sound is None else sound
    tall = 11 * 0.5 * H / W
    with picture(path, 11, tall + 5.7, "Entities where there is something to know", colors=256) as fig:
        rows = fig.add_gridspec(3, 2, height_ratios=(tall, 2.4, 1.3))
        _photograph(fig.add_subplot(rows[0, 0]), photograph, adaptive)
        _halves(fig.add_subplot(rows[0, 1]), photograph, built, figures)
        _spectrogram(fig.add_subplot(rows[1, :]), sound, share, generator)
        _line(fig.add_subplot(rows[2, :]), line, generator)
    return figures


def _photograph(ax, photograph: ImageField, entities: Entities) -> None:
    H, W = photograph.grid
    n = entities.influence.shape[1]
    ax.set_title(f"{n:,} entities; the larger, the more it stands for")
    bare(ax)
    pixels = photograph.values[0].expand(H, W, 3).clamp(0, 1).numpy()
    ax.imshow(0.45 * pixels, extent=(0, 1, 1, 0), aspect="auto")
    down, right = entities.positions[0].unbind(-1)
    colors = entities.states[0].expand(n, 3).clamp(0, 1).numpy()
    size = 14 * (entities.influence[0].clamp(0.02, 4) ** 0.7).numpy()
    ax.scatter(right, down, s=size * 4000 / n, c=(0.25 + 0.75 * colors), linewidths=0)


def _halves(ax, photograph: ImageField, built: list[Tensor], figures: dict[str, float]) -> None:
    H, W = photograph.grid
    half = W // 2
    ax.set_title("rebuilt from as many, placed evenly and adaptively")
    bare(ax)
    both = torch.cat([built[0][0, :, :half], built[1][0, :, half:]], 1).expand(H, W, 3)
    ax.imshow(both.numpy(), extent=(0, 1, 1, 0), aspect="auto")
    ax.axvline(half / W, color="white", lw=2)
    for x, name, said, align in ((0.03, "uniform", "evenly", "left"), (0.97, "adaptive", "adaptively", "right")):
        ax.text(x, 0.96, f"{said}: {figures[name]:.1f} dB", ha=align, color="white", weight="bold", gid="mark")


def _spectrogram(ax, sound: WaveField, share: int, generator: torch.Generator) -> None:
    spectrum = SpectrogramField.of(sound)
    T, F = spectrum.grid
    entities = AdaptiveSampler()(spectrum, max(16, T * F // share), generator)
    seconds, kilohertz = sound.grid[0] / sound.rate, sound.rate / 2000
    ax.imshow(spectrum.values[0, :, :, 0].T.numpy(), origin="lower", aspect="auto", cmap="magma",
              extent=(0, seconds, 0, kilohertz))  # fmt: skip
    when, pitch = entities.positions[0].unbind(-1)
    ax.scatter(when * seconds, pitch * kilohertz, s=7, color=CREAM, alpha=0.85, linewidths=0)
    ax.set_title(f"a sound (three plucked strings, a whistle) and its {entities.positions.shape[1]:,} entities")
    ax.set(xlabel="seconds", ylabel="kilohertz")
    ax.tick_params(axis="x", pad=9)  # the corner has a 0 of each axis


def _line(ax, line: bytes, generator: torch.Generator) -> None:
    field = TextField(line)
    bits = surprise(field)[0]
    chosen = AdaptiveSampler()(field, max(1, len(line) // 2), generator)
    taken = set((chosen.positions[0, :, 0] * len(line)).long().tolist())
    for i, byte in enumerate(line):
        here = i in taken
        ax.bar(i, float(bits[i]), color=VERMILLION if here else PALE, width=0.72)
        char = chr(byte) if 32 < byte < 127 else "\u2423"
        ax.text(i, -0.8, r"\$" if char == "$" else char, ha="center", va="top", family="monospace", size=SMALL,
                color=VERMILLION if here else SOFT, weight="bold" if here else "normal", gid="mark")  # fmt: skip
    ax.set(xlim=(-0.7, len(line) - 0.3), ylim=(-4, float(bits.max()) * 1.05), xticks=[], yticks=[0, 4, 8])
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.set_ylabel("bits of surprise", size=SMALL)
    ax.set_title(f"{len(line)} bytes, {len(taken)} entities (in colour): what repeats needs few", color=INK)
