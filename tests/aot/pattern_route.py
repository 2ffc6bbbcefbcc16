import torch

from dfn_kernels.triton import pattern_route as op

from . import POINTER, Case


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        types = {name: POINTER[real] for name in ("W", "BIAS", "DW")}
        types |= {name: POINTER[dtype] for name in ("L", "G", "R", "X", "Y", "DP")}
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            flags = {"PRECISION": precision, "WIDEN": False}
            for has in (True, False):
                constants = {"BACKWARD": False, "HAS_BIAS": has, **flags, "SPAN": op.span(dtype, "tokens"),
                             **op.tiles(dtype, "forward")}  # fmt: skip
                yield Case(op.tokens_kernel, types, constants, op.warps(dtype), op.OPTIONS)
            for grad in {dtype, real}:  # that of the output, which may be wide
                used = {**types, "L": POINTER[grad], "G": POINTER[grad]}
                constants = {"BACKWARD": True, "HAS_BIAS": False, **flags, "SPAN": op.span(grad, "tokens"),
                             **op.tiles(grad, "backward")}  # fmt: skip
                yield Case(op.tokens_kernel, used, constants, op.warps(grad), op.OPTIONS)
                constants = {**flags, "SPAN": op.span(grad, "patterns"), **op.tiles(grad, "patterns")}
                yield Case(op.patterns_kernel, used, constants, op.warps(grad), op.OPTIONS)
