import functools
import itertools

import torch
from helpers import pairs

from dfn_kernels.flow_drift import WIDE
from dfn_kernels.triton import flow_drift as op

AMD = {"PRECISION": "ieee"}
OUTPUTS = ((1, 3), (1, 1), (1, 2), (2, 5), (3, 7))  # heads and dimensions
WIDTHS = (256, 64, 128, 512, 1024)  # every padded width that goes by rows
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def run(dtype, outputs, d, bias, aligned) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    (H, D), (B, N) = outputs, (2, 4096) if aligned else (3, 61)
    d = d if aligned else d - 3

    def empty(*shape: int, dtype: torch.dtype = real) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    states, weight, alpha = empty(B, N, d, dtype=dtype), empty(H, D, d), empty(H)
    moved, flow, energy = op.flow_drift(states, empty(B, H, N, D), weight, empty(H, D) if bias else None, alpha)
    op.flow_drift_backward(moved, flow, energy, states, weight, alpha, flow)


def calls():
    for dtype in DTYPES:
        for outputs, d in (((1, 3), 256), ((1, 2), 1024), ((2, 5), 256)):
            yield functools.partial(run, dtype, outputs, d, True, True), False
    shapes = [(dtype, outputs, d) for dtype, outputs, d in itertools.product(DTYPES, OUTPUTS, WIDTHS)
              if dtype != torch.float64 or outputs[0] * outputs[1] <= WIDE[dtype]]  # fmt: skip
    for row in pairs({"shape": shapes, "bias": (True, False), "aligned": (True, False)}):
        yield functools.partial(run, *row.pop("shape"), **row), True
