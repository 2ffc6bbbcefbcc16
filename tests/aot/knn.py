import functools

import torch
from helpers import pairs

from dfn_kernels.triton.knn import brute, knn, use_tree

AMD = {"LANES": 64}
# Every length of a list that is merged, one that is kept in several, and all that float64 keeps.
SHORT, LONG = (4, 8, 16, 100), (64, 100, 250, 500, 1000)
BRUTE = {
    "k": SHORT,
    "N": (100, 4096),  # one slice, several
    "D": (3, 16, 1),
    "flags": ("", "lengths", "query_lengths", "lengths query_lengths", "sets"),
    "queries": (True, False),
    "masks": ((False, True), (False, False), (True, True), (True, False)),  # causal, include_self
}
TREE = {
    "D": tuple(range(1, 9)),
    "k": SHORT,
    "N": (100_003, 2**28),  # the larger ones, beyond 2 GiB, are other kernels on AMD
    "flags": BRUTE["flags"][:4],
    "queries": (True, False),
    "warm": (False, True),
    "masks": BRUTE["masks"],
}


def run(k, N, D, flags, queries, masks, dtype=torch.float32, warm=False, tree=False) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B = 1 if flags == "sets" else 2 if N < 2**28 else 1
    M = N // 2 if queries else N
    points, others = empty(B, N, D), empty(B, M, D) if queries else None
    if flags == "sets":
        ptr = empty(6, dtype=torch.int64)
        brute.search(points, others, None, None, k, *masks, ptr, ptr if queries else None)
        return
    lengths, query_lengths = (empty(B, dtype=torch.int64) if name in flags.split() else None
                              for name in ("lengths", "query_lengths"))  # fmt: skip
    assert use_tree(B, N, M, D, dtype) == tree
    known = empty(B, M, k, dtype=torch.int64) if warm else None
    knn(points, others, lengths, query_lengths if queries else None, k, *masks, known)


def calls():
    usual = dict(flags="lengths", queries=False, masks=(True, True))
    for k, N in ((16, 100), (16, 4096)):
        yield functools.partial(run, k, N, 3, **usual), False
    yield functools.partial(run, 100, 100, 3, dtype=torch.float64, **usual), False
    for D, k in ((2, 16), (3, 100)):
        yield functools.partial(run, k, 100_003, D, tree=True, warm=D == 3, **usual), False
    for row in pairs(BRUTE):
        yield functools.partial(run, **row), True
    for row in pairs({**BRUTE, "k": LONG, "N": (100,)}):
        yield functools.partial(run, dtype=torch.float64, **row), True
    for row in pairs(TREE):
        yield functools.partial(run, tree=True, **row), True
