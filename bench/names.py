"""What a case is called in tables: in words, from its key in JSON and after ``--only``, which is `Case.name`."""

import re

WORDS = {
    "flow_drift": "drift, {N} entities {space}, {d} channels",
    "flow_norm": "causal norm, {N} entities, {d} channels",
    "short_convolution": "short convolution, {N} entities, {d} channels, {W} taps",
    "knn": "search, {N} points {space}, {k} nearest",
    "gaussian_gather": "gather, {N} points, {k} neighbours, {c} channels",
    "flow_attention": "causal attention, {N} entities, {k} neighbours, {H} heads, {d} channels",
    "pattern_route": "routing, {T} tokens, {P} patterns of {O} x {I}",
    "low_rank_route": "low-rank routing, {T} tokens, {P} patterns of {O} x {I}, rank {r}",
    "field_sample": "sampling, {n} points of {G} cells",
    "DFNBlock": "DFN layer, {N} entities, {H} heads, {d} channels",
    "FlowLayer": "FlowNetwork layer, {T} tokens, {P} patterns of {O} x {I}",
}
SPACE = {1: "on a line", 2: "in the plane", 3: "in space"}


def amount(n: int) -> str:
    """A size as one says it: exact below ten thousand.

    >>> amount(8192), amount(262_144), amount(1_000_000)
    ('8,192', '262k', '1M')
    """
    if n < 10_000:
        return f"{n:,}"
    return f"{n / 1e3:.0f}k" if n < 999_500 else f"{n / 1e6:.3g}M"


def readable(case: str) -> str:
    """The words of a key; one that is none of `WORDS` stays as it is, and so does the letter N where no size is given.

    >>> readable("gaussian_gather-B1-H1-N262144-D3-c256-k16")
    'gather, 262k points, 16 neighbours, 256 channels'
    >>> readable("knn-B1-D3-k16")
    'search, N points in space, 16 nearest'
    """
    kind, *parts = case.split("-")
    variant = [part for part in parts if not re.fullmatch(r"[A-Za-z]\d+", part)]
    sizes = {part[0]: int(part[1:]) for part in parts if part not in variant}
    D = sizes.get("D")
    space = SPACE.get(D, f"of {D} dimensions")
    said = {"N": "N"} | {letter: amount(n) for letter, n in sizes.items()} | {"space": space}
    if sizes.get("B", 1) > 1:  # so many rows, each of
        said |= {letter: f"{sizes['B']} x {said[letter]}" for letter in "Nn" if letter in said}
    try:
        return ", ".join([WORDS[kind].format(**said), *(f"with a {word}" for word in variant)])
    except KeyError:
        return case
