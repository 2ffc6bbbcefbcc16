"""Means within packed sets in Triton: one program walks over a set, with its sum in float64.

Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def means_kernel(
    X, PTR,  # inputs: values or their gradients [B, N], offsets [S + 1]
    Y,  # output [B, N]
    N, S,  # shapes
    CAUSAL: tl.constexpr,
    BACKWARD: tl.constexpr,  # the gradient of the means to the values
    BN: tl.constexpr,  # tunable
):  # fmt: skip
    pid = tl.program_id(0)
    b, s = (pid // S).to(tl.int64), pid % S
    first = tl.minimum(tl.maximum(tl.load(PTR + s), 0), N)
    end = tl.minimum(tl.maximum(tl.load(PTR + s + 1), first), N)
    X += b * N
    Y += b * N
    before = tl.zeros((), tl.float64)
    for start in range(0, end - first, BN):
        # Backward the walk is from the last row to the first: place t is row end - 1 - t.
        t = start + tl.arange(0, BN)
        inside = t < end - first
        i = first + t
        if BACKWARD:
            i = end - 1 - t
        x = tl.load(X + i, mask=inside, other=0.0).to(tl.float64)
        if CAUSAL:
            rank = (i - first + 1).to(tl.float64)
            if BACKWARD:
                x = tl.where(inside, x / rank, 0.0)
            running = before + tl.associative_scan(x, 0, _plus)
            if not BACKWARD:
                running = running / rank
            tl.store(Y + i, running.to(Y.dtype.element_ty), mask=inside)
        before += tl.sum(x, axis=0)
    if not CAUSAL:
        mean = before / (end - first).to(tl.float64)
        for start in range(0, end - first, BN):
            i = first + start + tl.arange(0, BN)
            tl.store(Y + i, (tl.zeros((BN,), tl.float64) + mean).to(Y.dtype.element_ty), mask=i < end)


# ---- launchers ------------------------------------------------------------------------------------------------------
def _launch(x: Tensor, ptr: Tensor, causal: bool, backward: bool) -> Tensor:
    out = torch.empty_like(x)
    S = len(ptr) - 1
    if out.numel() and S:
        means_kernel[(x.shape[0] * S,)](
            x, ptr, out, x.shape[1], S, CAUSAL=causal, BACKWARD=backward, BN=1024, num_warps=4
        )
    return out


def set_means(values: Tensor, ptr: Tensor, causal: bool) -> Tensor:
    return _launch(values, ptr, causal, False)


def set_means_backward(grad: Tensor, ptr: Tensor, causal: bool) -> Tensor:
    return _launch(grad, ptr, causal, True)
