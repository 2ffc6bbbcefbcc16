"""Exact k nearest neighbours in Triton. Where the work is done:

- brute.py: every query against every point; few points, more than three dimensions, float64.
- cuts.py, grid.py: the points sorted into strips of equal depth.
- strips.py: one query per lane walks over strips; k to 64.
- warm.py: what neighbours of the last step tell about this one.
- boxes.py: one query per program searches bounding boxes; longer lists, and what strips leave.

Nothing waits for the device and every shape depends on sizes alone, so a CUDA graph can capture a search. Compiled
without fused multiply-add: distances are the same to the bit on every backend.
"""

import itertools

import torch
from torch import Tensor

from . import boxes, brute, strips
from .brute import MOST_IN_REGISTERS, finish, list_length
from .cuts import Layout
from .grid import Grid, build, in_order
from .warm import bound_by

# Below, every query is compared with every point. Derived, not measured: the instructions of a comparison, 2 K to pass
# a candidate through the list and about 20 more, against 0.1 ms, which building a grid takes, at 3e13 a second.
FEW_POINTS = 1024
FEW_STEPS = 3e9
BOX = 64  # points in a bounding box, at least


def use_grid(B: int, N: int, M: int, D: int, k: int, dtype: torch.dtype) -> bool:
    if D > 3 or dtype != torch.float32 or B * N >= 2**28 or B * M >= 2**31:
        return False
    return N >= FEW_POINTS and B * N * M * (2 * list_length(k) + 20) >= FEW_STEPS


def knn(
    points: Tensor, queries: Tensor | None, lengths: Tensor | None, query_lengths: Tensor | None, k: int, causal: bool,
    include_self: bool, warm: Tensor | None = None, index: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and squared distances [B, M, k]. `index`: the number of these points' grid, if they have one."""
    B, N, D = points.shape
    M = N if queries is None else queries.shape[1]
    grid = None if causal or k > MOST_IN_REGISTERS else _grids.get(index)
    if B * M == 0 or N == 0 or grid is None and not use_grid(B, N, M, D, k, points.dtype):
        return brute.search(points, queries, lengths, query_lengths, k, causal, include_self)
    K = list_length(k)
    if grid is None:
        layout = Layout.of(B, N, D, k, max(K, BOX), causal)
        grid = build(points, lengths, layout, k + 1 - include_self)
    own = queries is None
    if own:
        queries, query_lengths, rows = points, lengths, grid.rows
    else:
        rows = in_order(queries, query_lengths, grid)
    if k > MOST_IN_REGISTERS:
        keys = torch.empty(B, M, k, dtype=torch.int64, device=points.device)
        boxes.search(queries, rows, torch.full_like(rows[:1], B * M), query_lengths, grid, causal, include_self, keys)
        return finish(keys, ordered=True)
    bound = None if warm is None else bound_by(warm, points, queries)
    keys, left, count = strips.search(queries, rows, query_lengths, bound, grid, k, K, causal, include_self)
    boxes.search(queries, left, count, query_lengths, grid, causal, include_self, keys)
    return finish(keys, ordered=False)


# ---- grids that are kept: KNNIndex ----------------------------------------------------------------------------------
INDEX_NEIGHBORS = 16  # for which the strips of an index are cut
_grids: dict[int, Grid] = {}
_numbers = itertools.count(1)


def index(points: Tensor, lengths: Tensor | None) -> int:
    """Sorts the points once, for any k to 64, not causal; the number by which `knn` finds their grid. 0: no grid."""
    B, N, D = points.shape
    if not use_grid(B, N, N, D, INDEX_NEIGHBORS, points.dtype):
        return 0
    number = next(_numbers)
    _grids[number] = build(
        points, lengths, Layout.of(B, N, D, INDEX_NEIGHBORS, max(BOX, MOST_IN_REGISTERS), False), MOST_IN_REGISTERS + 1
    )
    return number


def forget(number: int) -> None:
    _grids.pop(number, None)
