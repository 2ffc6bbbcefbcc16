"""A picture of entities: where a sampler puts them on a photograph, a spectrogram and a line of text."""

import math
from pathlib import Path

import torch

from ..fields.density import surprise
from ..fields.field import ImageField, SpectrogramField, TextField, WaveField
from ..fields.sampler import AdaptiveSampler, UniformSampler, psnr, reconstruct
from ..runs.crops import photographs
from .style import INK, ORANGE, SOFT, pyplot

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
    plt = pyplot()
    if photograph is None:
        photograph = photographs()["flower"]
    generator = torch.Generator().manual_seed(seed)
    n = max(16, math.prod(photograph.grid) // share)
    adaptive, uniform = AdaptiveSampler()(photograph, n, generator), UniformSampler()(photograph, n, generator)

    H, W = photograph.grid
    fig = plt.figure(figsize=(15, 15 * (0.5 * H / W) + 6.2), dpi=110, facecolor="white")
    rows = fig.add_gridspec(3, 1, height_ratios=[15 * 0.5 * H / W, 3.1, 1.5], left=0.035, right=0.985, top=0.935,
                            bottom=0.03, hspace=0.2)  # fmt: skip
    top = rows[0].subgridspec(1, 2, wspace=0.025)
    pixels = photograph.values[0].expand(H, W, 3).clamp(0, 1).numpy()
    left = fig.add_subplot(top[0])
    left.imshow(0.45 * pixels, extent=(0, 1, 1, 0), aspect="auto")
    down, right = adaptive.positions[0].unbind(-1)
    colors = adaptive.states[0].expand(n, 3).clamp(0, 1).numpy()
    size = 26 * (adaptive.influence[0].clamp(0.02, 4) ** 0.7).numpy()
    left.scatter(right, down, s=size * 4000 / n, c=(0.25 + 0.75 * colors), linewidths=0)
    _title(left, f"{n:,} entities, most of them where the picture changes",
           "size: how much an entity weighs")  # fmt: skip
    mixed = fig.add_subplot(top[1])
    built = [reconstruct(e, photograph).clamp(0, 1) for e in (uniform, adaptive)]
    figures = {name: psnr(b, photograph.values) for name, b in zip(("uniform", "adaptive"), built, strict=True)}
    half = W // 2
    mixed.imshow(torch.cat([built[0][0, :, :half], built[1][0, :, half:]], 1).expand(H, W, 3).numpy(),
                 extent=(0, 1, 1, 0), aspect="auto")  # fmt: skip
    mixed.axvline(half / W, color="white", linewidth=2)
    for x, name, align in ((0.02, "uniform", "left"), (0.98, "adaptive", "right")):
        mixed.text(x, 0.97, f"{name}, {figures[name]:.1f} dB", ha=align, color="white", fontsize=13, fontweight="bold")
    _title(mixed, "rebuilt from as many entities, placed evenly and adaptively", "figures: the whole photograph")

    sound = example_sound() if sound is None else sound
    spectrum = SpectrogramField.of(sound)
    T, F = spectrum.grid
    heard = AdaptiveSampler()(spectrum, max(16, T * F // share), generator)
    ax = fig.add_subplot(rows[1])
    seconds, kilohertz = sound.grid[0] / sound.rate, sound.rate / 2000
    ax.imshow(spectrum.values[0, :, :, 0].T.numpy(), origin="lower", aspect="auto", cmap="magma",
              extent=(0, seconds, 0, kilohertz))  # fmt: skip
    when, pitch = heard.positions[0].unbind(-1)
    ax.scatter(when * seconds, pitch * kilohertz, s=5, color=CREAM, alpha=0.85, linewidths=0)
    _title(ax, f"a spectrogram and its {heard.positions.shape[1]:,} entities", "time in s, frequency in kHz", True)

    ax = fig.add_subplot(rows[2])
    field = TextField(line)
    bits = surprise(field)[0]
    chosen = AdaptiveSampler()(field, max(1, len(line) // 2), generator)
    taken = set((chosen.positions[0, :, 0] * len(line)).long().tolist())
    for i, byte in enumerate(line):
        color = ORANGE if i in taken else "#c9cfdb"
        ax.bar(i, float(bits[i]), color=color, width=0.72)
        char = chr(byte) if 32 < byte < 127 else "\u2423"
        ax.text(i, -1.1, r"\$" if char == "$" else char, ha="center", va="top", family="monospace", fontsize=13,
                color=ORANGE if i in taken else SOFT, fontweight="bold" if i in taken else "normal")  # fmt: skip
    ax.set(xlim=(-0.7, len(line) - 0.3), ylim=(-4.2, float(bits.max()) * 1.05))
    _title(ax, f"{len(line)} bytes, {len(taken)} entities: repetition needs few",
           "bars: bits of surprise, for a byte bigram that learns as it reads")  # fmt: skip
    fig.text(0.035, 0.975, "Entities where there is something to know", fontsize=20, color=INK, fontweight="bold",
             va="center")  # fmt: skip
    fig.savefig(path)
    plt.close(fig)
    return figures


def _title(ax, title: str, note: str, ticks: bool = False) -> None:
    for side in ax.spines.values():
        side.set_visible(False)
    if ticks:
        ax.tick_params(colors=SOFT, labelsize=8, length=0)
    else:
        ax.set_xticks([])
        ax.set_yticks([])
    ax.set_title(title, loc="left", fontsize=12, color=INK, pad=7)
    ax.set_title(note, loc="right", fontsize=9.5, color=SOFT, pad=7)
