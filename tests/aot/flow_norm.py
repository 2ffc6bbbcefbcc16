import torch

from dfn_kernels.flow_norm import MODES
from dfn_kernels.triton import flow_norm as op

from . import POINTER, Case

WIDTHS = (64, 128, 256, 512)


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value, double = POINTER[dtype], POINTER[torch.float64]
        real = double if dtype == torch.float64 else POINTER[torch.float32]
        for has in (True, False):
            types = {"S": value, "R": real, "Y": value, "G": value, "GS": value, "A": real, "P": double, "E": real,
                     "GE": real, "eps": "fp64", "L": POINTER[torch.int64] if has else real}  # fmt: skip
            for d in WIDTHS:
                constants = {"HAS_LENGTHS": has, **op.row_tile(d)}
                rare = d not in (256, 512)
                yield Case(op.forward_kernel, types, constants, slow=rare)
                for mode in MODES:
                    slow = rare or mode == "mean"
                    warps = op.backward_warps(constants)
                    yield Case(op.backward_kernel, types, {"MODE": mode, **constants}, warps, slow=slow)
            if dtype not in (torch.float32, torch.float64):
                continue  # the means are not taken of the states
            constants = {"HAS_LENGTHS": has, "BLOCK": op.BLOCK}
            yield Case(op.sums_kernel, types, constants, options={})
            for mode in MODES:
                yield Case(op.energy_kernel, types, {"MODE": mode, **constants}, options={})
                for direct in (True, False) if mode != "entity" else (True,):
                    own = {"P": real if direct else double}
                    yield Case(op.scale_kernel, types | own, {"MODE": mode, "DIRECT": direct, **constants}, options={})
