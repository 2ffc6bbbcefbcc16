import re
from dataclasses import replace

import torch

from dfn_kernels.triton.knn import boxes, brute, grid, strips, warm

from . import POINTER, Case

FLOAT, INT, LONG = POINTER[torch.float32], POINTER[torch.int32], POINTER[torch.int64]
GRID = {
    **dict.fromkeys(("X", "Q", "BOUND", "POINTS", "SORTED", "SLABS", "STRIPS", "EDGES"), FLOAT),
    **dict.fromkeys(("AXES", "STRIDE", "NEW", "PLACE", "IDS", "ROWS", "STARTS", "FIRST", "LIST", "COUNT"), INT),
    **dict.fromkeys(("LX", "LQ", "KEYS", "ORDER", "MARKS", "BEFORE"), LONG),
}


FAST = (  # what `make test` compiles of it
    "lane_kernel.*HAS_LP1.*CAUSAL1.*K16-|row_kernel-fp32.*HAS_LP0.*CAUSAL1.*K128|finish_kernel.*K16-|mark_kernel|"
    "(cell_kernel.*HAS_L1|place_kernel|pack_kernel|box_kernel|warm_kernel).*D3(-BM|-BOX64|$)|"
    "strip_kernel.*(MASKED0-D2|MASKED1-D3)-K16-|nearest_kernel.*D3-K64-"
)


def cases():
    for case in (*brute_cases(), *grid_cases(), *search_cases()):
        yield replace(case, slow=not re.search(FAST, str(case)))


def brute_cases():
    for dtype in (torch.float32, torch.float64):
        types = {"P": POINTER[dtype], "Q": POINTER[dtype], "OUT_D": POINTER[dtype],
                 **dict.fromkeys(("LP", "LQ", "OUT_I", "KEYS"), LONG)}  # fmt: skip
        for causal, include_self, ragged in ((False, True, True), (False, False, False), (True, True, False),
                                             (True, False, True)):  # fmt: skip
            flags = {"HAS_LP": ragged, "HAS_LQ": ragged, "CAUSAL": causal, "INCLUDE_SELF": include_self}
            if dtype == torch.float32:
                for K in (4, 8, 16, 32, 64):
                    yield Case(brute.lane_kernel, types, {**flags, "K": K, "BM": 128}, options=brute.EXACT)
            lists = (64, 128) if dtype == torch.float64 else (128,)
            for K in (*lists, 1024) if ragged and not causal else lists:  # the longest takes half a minute to compile
                yield Case(brute.row_kernel, types, {**flags, "K": K}, options=brute.EXACT)
    for K in (4, 8, 16, 32, 64):
        yield Case(brute.finish_kernel, {"KEYS": LONG, "DISTS": FLOAT}, {"SORT": True, "K": K, "BM": 2048 // K})
    for K in (128, 1024):
        yield Case(brute.finish_kernel, {"KEYS": LONG, "DISTS": FLOAT}, {"SORT": False, "K": K, "BM": 2048 // K})


def grid_cases():
    size = {"BM": grid.BM}
    yield Case(grid.mark_kernel, GRID, size)
    for D in (1, 2, 3):
        for ragged in (False, True):
            for queries in (False, True):
                yield Case(grid.cell_kernel, GRID, {"HAS_L": ragged, "QUERIES": queries, "D": D, **size})
        yield Case(grid.place_kernel, GRID, {"D": D, **size})
        yield Case(grid.pack_kernel, GRID, {"D": D, **size})
        for box in (64, 128, 256, 512, 1024):
            yield Case(grid.box_kernel, GRID, {"D": D, "BOX": box}, num_warps=grid.box_warps(box))
        types = {"P": FLOAT, "Q": FLOAT, "BOUND": FLOAT, "WARM": LONG}
        yield Case(warm.warm_kernel, types, {"D": D, "BM": 128}, options=brute.EXACT)


def search_cases():
    for D in (1, 2, 3):
        for masked in (False, True):
            for K in (4, 8, 16, 32, 64):
                tunable = {"W": strips.around(K), "VISIT": strips.VISIT, "BM": 32}
                constants = {"HAS_LQ": masked, "MASKED": masked, "D": D, "K": K, **tunable}
                yield Case(strips.strip_kernel, GRID, constants, 1, brute.EXACT, amd={"BM": 64})
        for K in (64, 128, 256, 512, 1024):
            constants = {"HAS_LQ": D == 2, "D": D, "K": K, "SUPER": grid.SUPER}
            yield Case(boxes.nearest_kernel, GRID, constants, max(1, K // 256), brute.EXACT)
