import functools
import itertools

import torch
from helpers import pairs

from dfn_kernels.flow_norm import MODES
from dfn_kernels.triton import flow_norm as op

WIDTHS = (256, 512, 64, 128)  # every padded width
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def run(dtype, d, mode, lengths, aligned, N) -> None:
    B, N, d = (2, N, d) if aligned else (3, N + 5, d - 3)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    states = empty(B, N, d, dtype=dtype)
    energy = empty(B, N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = energy, empty(B, dtype=torch.int64) if lengths else None, 1e-6, mode
    op.flow_norm_backward(op.flow_norm(states, *rest), states, *rest)


def calls():
    for dtype in DTYPES:
        for mode in MODES:
            yield functools.partial(run, dtype, 256, mode, True, True, 4096), False
    options = {
        "shape": list(itertools.product(DTYPES, WIDTHS, MODES)),
        "lengths": (True, False),
        "aligned": (True, False),
        "N": (4096, 2 * op.DIRECT),
    }
    for row in pairs(options):
        yield functools.partial(run, *row.pop("shape"), **row), True
