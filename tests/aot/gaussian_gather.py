import functools

import torch
from helpers import pairs

from dfn_kernels.triton import gather_plan as plan
from dfn_kernels.triton import gaussian_gather as forward
from dfn_kernels.triton import gaussian_gather_backward as backward

AMD = {"ZEROS": None}
CHANNELS = range(2, 1025)
EDGES = range(1, 1025)  # of a query
HALF, SINGLE = torch.bfloat16, torch.float32
SIZES = {  # batches, heads, entities, queries; whether 16 divides the channels
    "odd": (2, 3, 61, 53, False),
    "rows": (2, 3, 61, 53, True),
    "round": (1, 1, 4096, 4096, True),
    "vast": (1, 1, 2**26, 2**26 + 1, True),  # 64-bit edges; arrays beyond 2 GiB
}


def channels(dtype: torch.dtype) -> list[tuple[int, int]]:
    """For every tile of rows a number of channels that 16 does not divide, and one that it does."""
    found = {}
    for c in reversed(CHANNELS):
        found.setdefault(tuple(forward.tiles(c, dtype).values()), {})[c % 16 == 0] = c
    return [(c[False], c[True]) for c in found.values()]


OPTIONS = {
    "rows": [(dtype, *c) for dtype in (HALF, SINGLE, torch.float16, torch.float64) for c in channels(dtype)],
    "sizes": tuple(SIZES),
    "wanted": (31, 4, 1, 16, 7),  # bits: all gradients; of values, positions, influence alone; with queries
    "k": (16, 3, 64, 129, 1000),  # every tile of edges, and few enough to walk four at a time
    "D": (3, 16, 1),
    "given": ((), ("influence",), ("sq_dists",), ("influence", "sq_dists")),
    "normalize": (True, False),
    "orders": (True, False),
}


def run(rows, sizes, wanted, k, D, given, normalize, orders) -> None:
    (dtype, *c), (B, H, N, M, aligned) = rows, SIZES[sizes]
    c = c[aligned]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    LH = 1 if orders else H  # heads that share their neighbours share their order

    def empty(*shape: int, dtype: torch.dtype = real) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    values, indices = empty(B, H, N, c, dtype=dtype), empty(B, LH, M, k, dtype=torch.int64)
    inputs = empty(B, H, N, D), empty(B, H, M, D), values, indices, empty(H)
    influence = empty(B, H, N) if "influence" in given else None
    sq_dists = empty(B, H, M, k) if "sq_dists" in given else None
    of_queries, of_entities = (empty(B, LH, n, dtype=torch.int32) if orders else None for n in (M, N))
    out = forward.gaussian_gather(*inputs, influence, sq_dists, of_queries, normalize)
    backward.gaussian_gather_backward(
        out, *inputs, influence, sq_dists, of_queries, of_entities, None, None, normalize, wanted
    )


def transpose(N: int, M: int, k: int) -> None:
    """The keys have 32 bits or 64, and so have the edges, each for itself."""
    indices = torch.empty(2, 1, M, k, dtype=torch.int64, device="meta")
    plan.transpose_neighbors(indices, None, None, N)


def calls():
    usual = dict(sizes="rows", wanted=31, k=16, D=3, normalize=True, orders=True)
    for dtype in (HALF, SINGLE):
        for c in (64, 256):
            for given in ((), ("influence",)):
                yield functools.partial(run, rows=(dtype, c, c), given=given, **usual), False
    for N in (61, 2**30):
        for M in (53, 2**26 + 1):
            yield functools.partial(transpose, N, M, 16), False
    for row in pairs(OPTIONS):
        yield functools.partial(run, **row), True
