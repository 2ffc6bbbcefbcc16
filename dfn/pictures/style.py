"""What all pictures share: colours, axes, and a matplotlib that needs no screen."""

INK, SOFT, GRID = "#1f2430", "#7a8194", "#e6e8ee"
BLUE, ORANGE, GREEN = "#2f6fde", "#e4572e", "#2a9d6f"
PURPLE, SAND = "#8457b8", "#c08a2b"


def style_axes(ax, title: str = "") -> None:
    ax.set_facecolor("white")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GRID)
    ax.tick_params(colors=SOFT, labelsize=8, length=0)
    if title:
        ax.set_title(title, loc="left", fontsize=10, color=INK, pad=8)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
