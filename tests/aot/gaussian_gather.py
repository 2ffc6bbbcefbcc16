import torch

from dfn_kernels.triton import gather_plan as plan
from dfn_kernels.triton import gaussian_gather as forward
from dfn_kernels.triton import gaussian_gather_backward as backward

from . import POINTER, Case

I32, I64 = POINTER[torch.int32], POINTER[torch.int64]
ROWS = ("c", "sVb", "sVh", "sVn", "sYb", "sYh", "sYm", "sGb", "sGh", "sGm")
EDGES = range(1, 1025)  # of a query
CHANNELS = range(1, 1025)


def none(*names: str) -> dict[str, None]:
    """Arguments that are not given."""
    return dict.fromkeys(names)


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value = POINTER[dtype]
        real = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
        numbers = (
            "P",
            "Q",
            "S",
            "W",
            "SQ",
            "A",
            "EW",
            "ES",
            "EI",
            "GP",
            "GQ",
            "GS",
            "GI",
            "PARTS_V",
            "PARTS_P",
            "PARTS_I",
        )
        types = {**dict.fromkeys(numbers, real), **dict.fromkeys(("V", "Y", "G", "GV", "ZEROS"), value),
                 **dict.fromkeys(("I", "STARTS"), I64), **dict.fromkeys(("ORDER", "EDGES"), I32)}  # fmt: skip
        yield from by_rows(dtype, types)
        if real == value:  # the kernels below do not touch values
            yield from by_edges(types)
    for keys in (I32, I64):
        yield Case(plan.keys_kernel, {"I": I64, "KEYS": keys}, {"BE": 1024})
        for edges in (I32, I64):
            types = {"KEYS": keys, "PLACES": I64, "STARTS": I64, "EDGES": edges}
            yield Case(plan.lists_kernel, types, {"BE": 1024})


def by_rows(dtype, types):
    """The kernels that read rows."""
    often = dtype in (torch.float32, torch.bfloat16)
    half = dtype == torch.bfloat16
    hub, own = {"HUB": backward.HUB}, none("EI", "GI", "PARTS_I")
    for rows, channels in sorted({tuple(forward.tiles(c, dtype).values()) for c in CHANNELS}):
        tile = {"BN": rows // 4, "BC": channels, "BD": 4, "U": 8, **hub}
        for aligned, unrolled in ((ROWS, (8, 4)), ((), (2,))):
            tile["U"] = unrolled[0]
            rest = {"aligned": aligned, "slow": not (half and aligned or often and channels == 64)}
            options = backward.entities_options(channels, False)
            yield Case(backward.entities_kernel, types, {**tile, **own}, options=options, **rest)
            for edges in unrolled:
                yield Case(forward.gather_kernel, types, {"BM": rows, "BC": channels, "U": edges}, options={}, **rest)
                rest["slow"] = True
        tile_of_rows = {"BM": rows, "BC": channels, "U": 2, "ORDER": None}
        yield Case(forward.gather_kernel, types, tile_of_rows, options={}, **rest)
        values_only = none("EI", "GI", "PARTS_I", "ES", "GP", "PARTS_P")
        positions_only = none("EI", "GI", "PARTS_I", "EW", "GV", "PARTS_V")
        influence_only = none("ES", "GP", "PARTS_P", "EW", "GV", "PARTS_V")
        for without in ({}, {"ORDER": None}, values_only, positions_only, influence_only):
            options = backward.entities_options(channels, "GI" not in without)
            yield Case(backward.entities_kernel, types, {**tile, **without}, options=options, **rest)
        constants = {**tile, "BD": 16}
        yield Case(backward.entities_kernel, {**types, "EDGES": I64}, constants, options=options, **rest)
    for tile in sorted({tuple(backward.dots_tiles(c, dtype).items()) for c in CHANNELS}):
        for aligned in (ROWS, ()):
            slow = not often or not aligned
            yield Case(backward.dots_kernel, types, dict(tile), aligned=aligned, slow=slow)
        yield Case(backward.dots_kernel, types, {**dict(tile), "ORDER": None}, slow=True)
    tile = {"R": 16, "BC": 128, **hub}
    yield Case(backward.hubs_kernel, types, {**tile, "BD": 4}, slow=not often)
    for without in (own, none("PARTS_P", "GP", "PARTS_I", "GI"), none("PARTS_V", "GV", "PARTS_I", "GI")):
        yield Case(backward.hubs_kernel, {**types, "EDGES": I64}, {**tile, "BD": 16, **without}, slow=True)


def by_edges(types):
    """The kernels that hold all edges of a query."""
    types = {**types, "ZEROS": types["P"]}
    for tile in sorted({tuple(forward.edge_tiles(k).items()) for k in EDGES}):
        for normalize in (True, False):
            for without in ({}, none("SQ", "W"), none("SQ"), none("W")):
                constants = {"NORMALIZE": normalize, **dict(tile), **without}
                slow = without not in ({}, none("SQ", "W")) or not (normalize or ("K", 16) in tile)
                yield Case(forward.weights_kernel, types, constants, slow=slow)
                own = none("EI") if "W" in without else {}
                yield Case(backward.edges_kernel, types, {**constants, **own}, slow=slow or types["P"] == "*fp64")
            for outputs in (none("EW", "ES", "EI", "GQ"), none("EW", "EI", "GS"), none("GQ", "GS", "ES", "EI")):
                constants = {"NORMALIZE": normalize, **dict(tile), "W": None, **outputs}
                yield Case(backward.edges_kernel, types, constants, slow=True)
