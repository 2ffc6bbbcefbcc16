import re
from dataclasses import replace

import torch

from dfn_kernels.triton.knn import brute, lists, tree, walk, warm

from . import POINTER, Case

FLOAT, INT, LONG = POINTER[torch.float32], POINTER[torch.int32], POINTER[torch.int64]
TYPES = {
    **dict.fromkeys(("X", "P", "Q", "FRAME", "BOUND", "OUT_D"), FLOAT),
    **dict.fromkeys(("RESTS", "ASKS", "ASKED", "POINTS", "FIRSTS", "ROWS", "SEATS", "BOXES"), INT),
    **dict.fromkeys(("LX", "LP", "LQ", "WARM", "KEYS", "ORDER", "MEMORY", "BEST", "OUT_I"), LONG),
}
LISTS = tuple({lists.sizes(k)[0]: lists.sizes(k) for k in (1, 8, 16)}.values()) + (lists.sizes(17),)  # (K, kept)
FAST = (  # what `make test` compiles of it
    "slice_kernel.*CAUSAL1.*(SLICED1-ONE1-K16|SLICED0-ONE0)|merge_kernel.*ONE0|row_kernel.*HAS_LP0.*CAUSAL1.*K128|"
    "(frame_kernel|key_kernel|pack_kernel).*_L1.*D3|asks_kernel|branch_kernel.*D3|warm_kernel.*D3|"
    "walk_kernel.*MASKED0.*(D2-ONE1-K16|D3-ONE0)"
)


def cases():
    for case in (*brute_cases(), *tree_cases(), *walk_cases()):
        yield replace(case, slow=not re.search(FAST, str(case)))


def of_lists(K: int, kept: int) -> dict[str, object]:
    return {"ONE": kept == K, "K": K, "LOG": K.bit_length() - 1}


def on_lists(kernel: object, constants: dict) -> Case:
    options = lists.options(walk.registers(constants["D"]) if "D" in constants else brute.REGISTERS)
    return Case(kernel, TYPES, {**constants, "LANES": 32}, options.pop("num_warps"), options, amd={"LANES": 64})


def brute_cases():
    flags = [
        {"HAS_LP": ragged, "HAS_LQ": ragged, "SETS": sets, "CAUSAL": causal, "INCLUDE_SELF": include_self}
        for causal, include_self, ragged, sets in (
            (False, True, True, False), (False, False, False, False), (True, True, False, False),
            (True, False, True, False), (False, True, False, True), (True, True, False, True),
        )
    ]  # fmt: skip
    sizes = {"GROUP": brute.GROUP, "CAP": 32 + brute.GROUP}
    for size in LISTS:
        for sliced, flag in zip((False, True, True, False, False, True), flags, strict=True):
            yield on_lists(brute.slice_kernel, {**flag, "SLICED": sliced, **of_lists(*size), **sizes})
        yield on_lists(brute.merge_kernel, of_lists(*size))
    double = {**TYPES, **dict.fromkeys(("P", "Q", "OUT_D"), POINTER[torch.float64])}
    for flag in flags:
        # The longest list takes half a minute to compile.
        for K in (64, 128, 1024) if flag["HAS_LP"] and not flag["CAUSAL"] else (64, 128):
            yield Case(brute.row_kernel, double, {**flag, "K": K}, options=brute.EXACT)


def tree_cases():
    frame, shape = {"MIDDLE": tree.MIDDLE, "REACH": tree.REACH}, {"LEAF": tree.LEAF, "FAN": tree.FAN}
    yield Case(tree.asks_kernel, TYPES, {"BM": tree.BM})
    for D in (1, 2, 3, 8):
        for ragged in (False, True):
            yield Case(tree.frame_kernel, TYPES, {"HAS_L": ragged, "D": D, "SAMPLE": tree.SAMPLE})
            for queries in (False, True):
                constants = {**frame, "HAS_L": ragged, "QUERIES": queries, "D": D, "BM": tree.BM}
                yield Case(tree.key_kernel, TYPES, constants)
            yield Case(tree.pack_kernel, TYPES, {"HAS_L": ragged, "HAS_ASKED": not ragged, "D": D, **shape})
        yield Case(tree.branch_kernel, TYPES, {"D": D, "FAN": tree.FAN}, num_warps=1)


def walk_cases():
    sizes = {"LEAF": tree.LEAF, "FAN": tree.FAN, "CAP": 3 * tree.LEAF}
    for D in (1, 2, 3, 8):
        for size in LISTS:
            for masked in (False, True):
                flags = {"HAS_LQ": masked, "HAS_BOUND": masked, "MASKED": masked}
                yield on_lists(walk.walk_kernel, {**flags, "D": D, **of_lists(*size), **sizes, "GROUP": walk.group(D)})
        yield Case(warm.warm_kernel, TYPES, {"D": D, "BM": 128}, options=brute.EXACT)
