"""Exact k nearest neighbours in Triton. Where the work is done:

- lists.py: what every lane keeps, the k best keys; networks that sort and merge them.
- brute.py: every query against every point; few points, many dimensions, float64.
- tree.py: the points in boxes, in the order of a Hilbert curve; rows.py: how they are read.
- walk.py: packets of neighbouring queries walk over the boxes.
- warm.py: what neighbours of the last step tell about this one.

Nothing waits for the device and every shape depends on sizes alone, so a CUDA graph can capture a search. Compiled
without fused multiply-add: distances are the same to the bit on every backend.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import brute, walk
from .tree import Tree, build, in_order
from .warm import bound_by

# Where comparing every query with every point ends and the tree begins: counted, and about right on an H200
# (docs/search.md).
FEW_POINTS = 1024
MOST_DIMENSIONS = 8
BUILD = 1.2e9  # instructions of a lane that a GPU would do while a tree is built


def use_tree(B: int, N: int, M: int, D: int, dtype: torch.dtype) -> bool:
    if D > MOST_DIMENSIONS or dtype != torch.float32 or N < FEW_POINTS or B * N >= 2**29 or B * M >= 2**31:
        return False
    pair, query = 3 * D + 8, 12_000 * 2.2 ** (D - 2)  # instructions: compare two points, walk
    return B * M * (N * pair - query) > BUILD


def knn(
    points: Tensor, queries: Tensor | None, lengths: Tensor | None, query_lengths: Tensor | None, k: int, causal: bool,
    include_self: bool, warm: Tensor | None = None, index: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and squared distances [B, M, k]. `index`: the number of these points' trees, if they have any."""
    B, N, D = points.shape
    M = N if queries is None else queries.shape[1]
    kept = _kept.get(index)
    if B * M == 0 or N == 0 or kept is None and not use_tree(B, N, M, D, points.dtype):
        return brute.search(points, queries, lengths, query_lengths, k, causal, include_self)
    tree = build(points, lengths, causal) if kept is None else kept.tree(causal)
    if queries is None:
        queries, query_lengths, rows, seats = points, lengths, tree.rows, tree.seats
    else:
        rows, seats = in_order(queries, query_lengths, tree)
    bound = None if warm is None else bound_by(warm, points, queries)
    return walk.search(queries, rows, seats, query_lengths, bound, tree, k, causal, include_self)


# ---- trees that are kept: KNNIndex ----------------------------------------------------------------------------------
@dataclass
class Kept:
    points: Tensor
    lengths: Tensor | None
    trees: dict[bool, Tree]  # causal: the tree

    def tree(self, causal: bool) -> Tree:
        if causal in self.trees:
            return self.trees[causal]
        tree = build(self.points, self.lengths, causal)
        if not (self.points.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph makes it anew
            self.trees[causal] = tree
        return tree


_kept: dict[int, Kept] = {}
_numbers = itertools.count(1)


def index(points: Tensor, lengths: Tensor | None) -> int:
    """Sorts the points once, for any k; the number by which `knn` finds their trees. 0: searches do without."""
    B, N, D = points.shape
    if not use_tree(B, N, N, D, points.dtype):
        return 0
    number = next(_numbers)
    _kept[number] = Kept(points, lengths, {False: build(points, lengths, False)})
    return number


def forget(number: int) -> None:
    _kept.pop(number, None)
