import torch

from dfn_kernels.flow_drift import WIDE
from dfn_kernels.triton import flow_drift as op

from . import POINTER, Case


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value = POINTER[dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        types = dict.fromkeys(("P", "W", "B", "A", "PN", "F", "E", "GP", "GF", "GE", "PW", "PB", "PA"), POINTER[wide])
        types |= {"S": value, "GS": value}
        for tile in {tuple(op.tiles(n, wide).items()): op.tiles(n, wide) for n in range(1, WIDE[wide] + 1)}.values():
            for has in (True, False):
                yield Case(op.forward_kernel, types, {"HAS_BIAS": has, **tile}, options={})
            yield Case(op.backward_kernel, types, tile, op.backward_warps(tile), {})
