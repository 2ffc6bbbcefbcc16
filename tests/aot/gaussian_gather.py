import torch

from dfn_kernels.triton import gaussian_gather as op

from . import POINTER, Case


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value = POINTER[dtype]
        real = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
        index = POINTER[torch.int64]
        types = {**dict.fromkeys(("P", "Q", "S", "W", "A", "EW", "ES", "EI", "GP", "GQ", "GS", "GI"), real),
                 **dict.fromkeys(("V", "Y", "G", "GV"), value),
                 **dict.fromkeys(("I", "STARTS", "EDGES"), index)}  # fmt: skip
        flags = [{"HAS_INFLUENCE": has, "NORMALIZE": normalize} for has in (True, False) for normalize in (True, False)]
        for rows, channels in {tuple(op.tiles(c, dtype).values()) for c in range(1, 257)}:
            for flag in flags:
                yield Case(op.forward_kernel, types, {**flag, "BM": rows, "BC": channels})
            yield Case(op.backward_along_kernel, types, {"BM": rows, "BC": channels})
            yield Case(op.backward_values_kernel, types, {"BN": rows, "BC": channels})
        if real == value:  # the kernels below do not touch values
            for flag in flags:
                yield Case(op.backward_edges_kernel, types, {**flag, "BM": 128})
            for has in (True, False):
                yield Case(op.backward_positions_kernel, types, {"HAS_INFLUENCE": has, "BN": 128})
