import functools
import itertools

import torch

from dfn_kernels.triton import pattern_route as op


def run(dtype, tf32, bias, wide, aligned) -> None:
    """`wide`: the output, and so its gradient, has the dtype of the weights."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    T, P, O, I = (4096, 16, 64, 256) if aligned else (61, 5, 37, 203)

    def empty(*shape: int, dtype: torch.dtype = real) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weights, patterns = empty(T, I, dtype=dtype), empty(T, P), empty(P, O, I, dtype=dtype)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    out = op.pattern_route(x, weights, patterns, empty(O) if bias else None, None, wide)
    op.pattern_route_backward(out, x, weights, patterns, None, True, True, True)
    torch.backends.cuda.matmul.allow_tf32 = before


def calls():
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        for tf32, wide in itertools.product((False, True) if dtype == torch.float32 else (False,), (False, True)):
            for bias, aligned in ((True, True), (False, False), (False, True), (True, False)):
                yield functools.partial(run, dtype, tf32, bias, wide, aligned), not (bias and aligned)
