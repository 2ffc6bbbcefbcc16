import torch

from dfn_kernels.triton import flow_norm as op

from . import POINTER, Case


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value = POINTER[dtype]
        real = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
        for has in (True, False):
            constants = {"HAS_LENGTHS": has, **op.TILE}
            inputs = {"S": value, "R": real, "L": POINTER[torch.int64] if has else real}
            yield Case(op.forward_kernel, {**inputs, "Y": value}, constants)
            yield Case(op.backward_kernel, {**inputs, "G": value, "GS": value, "A": real}, constants)
