import torch

from dfn_kernels.triton import gaussian_gather as forward
from dfn_kernels.triton import gaussian_gather_backward as backward

from . import POINTER, Case


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value = POINTER[dtype]
        real = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
        numbers = ("P", "Q", "S", "W", "A", "EW", "ES", "EI", "GP", "GQ", "GS", "GI", "PARTS", "PARTS_I")
        types = {**dict.fromkeys(numbers, real), **dict.fromkeys(("V", "Y", "G", "GV", "OUT"), value),
                 **dict.fromkeys(("I", "STARTS", "EDGES", "PIECES", "NUMBERS"), POINTER[torch.int64]),
                 "ORDER": POINTER[torch.int32]}  # fmt: skip
        flags = [{"HAS_INFLUENCE": has, "NORMALIZE": normalize} for has in (True, False) for normalize in (True, False)]
        hub = {"HUB": backward.HUB}
        for rows, channels in {tuple(forward.tiles(c, dtype).values()) for c in range(1, 257)}:
            for flag in flags:
                yield Case(forward.forward_kernel, types, {**flag, "BM": rows, "BC": channels})
            yield Case(backward.backward_along_kernel, types, {"BM": rows, "BC": channels})
            yield Case(backward.backward_values_kernel, types, {"BN": rows, "BC": channels, **hub})
        yield Case(backward.hub_kernel, types, {"BC": 128})
        if real == value:  # the kernels below do not touch values
            for flag in flags:
                yield Case(backward.backward_edges_kernel, types, {**flag, "BM": 128})
            for has in (True, False):
                yield Case(backward.backward_positions_kernel, types, {"HAS_INFLUENCE": has, "BN": 128, **hub})
