import functools

import torch
from helpers import pairs

from dfn_kernels.triton import short_convolution as op

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def run(dtype, W, packed, d, N) -> None:
    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(2, N, d, dtype=dtype)
    weight = empty(W, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    place = empty(N, dtype=torch.int64) if packed else None
    op.short_convolution_backward(op.short_convolution(x, weight, place), x, weight, place)


def calls():
    for dtype in DTYPES:
        yield functools.partial(run, dtype, 4, False, 256, 4096), False
    options = {"dtype": DTYPES, "W": (4, 1, 17), "packed": (True, False), "d": (256, 253, 1), "N": (4096, 4099, 1)}
    for row in pairs(options):
        yield functools.partial(run, **row), True
