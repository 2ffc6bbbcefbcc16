"""Figures as a person reads them: named in words, with their unit."""

Words = dict[str, tuple[str, str]]  # a figure's name: in words, and its unit


def figures_in_words(figures: dict[str, float], words: Words) -> str:
    """A line for each figure; one that ``words`` do not know keeps its name."""
    lines = [(*words.get(name, (name, "")), number(value)) for name, value in figures.items()]
    widest = max(len(name) for name, _, _ in lines)
    return "\n".join(f"  {name:{widest}}  {value:>10}  {unit}".rstrip() for name, unit, value in lines)


def table(rows: list[dict]) -> str:
    """A line for each row, under the names of its columns."""
    lines = [list(rows[0]), *([f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(["", *(x.rjust(w) for x, w in zip(line, widths, strict=True))]) for line in lines)


def number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"
