"""pattern_route in CUDA C++: what the kernels do, what PyTorch's products (cuBLAS) do, tokens grouped by patterns.

The launcher beside csrc/cuda/pattern_route*.cu. Nothing here is larger than the op's own inputs and
results, or than SCRATCH_BYTES: neither [T, P, O] nor [T, P * I] exists.
"""

import torch
from torch import Tensor

ROWS = 128  # of a tile: so many tokens share a list of patterns (kTileRows in csrc/cuda/pattern_route.h)
SCRATCH_BYTES = 32 << 20


# ---- the rule -------------------------------------------------------------------------------------------------------
def by_products(T: int, K: int, N: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether y = sum_p w_p * (left @ right_p) is left to PyTorch: one product [T, K] x [K, N] per pattern.

    float32, float64: the kernel has no tensor cores and no pipeline, cuBLAS a multiple of its rate; but P products are
    2 P launches, and the kernel is one. In the 10 us of two launches the kernel does about 5e7 multiply-adds.

    float16, bfloat16: the weights multiply float32 sums, so PyTorch writes those, reads them back and adds them up: 16
    bytes per sum and pattern. At b bytes and c multiply-adds per second that costs as much as 16 c / b more columns of
    K. The kernel, at a share s of cuBLAS's rate, loses K (1 - s) / s. So PyTorch wins from K = 16 c / b * s / (1 - s)
    on. An A100 (c / b = 156e12 / 2.0e12, s = 0.9): 11,000. Hopper (395e12 / 4.8e12, s = 0.85): 7,400. That deep is the
    backward pass of a vocabulary layer. And its launches must not matter: 4e9 multiply-adds take cuBLAS 10 us.

    A rule of arithmetic, not yet run on a GPU: `python -m bench.route_rule` measures both sides of it there.
    """
    if dtype in (torch.float32, torch.float64):
        return T * K * N >= 50_000_000
    return K >= (7_400 if capability >= (9, 0) else 11_000) and T * K * N >= 4_000_000_000


def grouping_pays(T: int, P: int, K: int, N: int, k: int, dtype: torch.dtype) -> bool:
    """Whether top_k is worth `grouped`: some 12 launches, 60 us, against the products of the other patterns.

    In that time Hopper's tensor cores do 2e10 multiply-adds, the float32 kernel about 3e8. Not yet run on a GPU.
    """
    return (P - k) * T * K * N >= (20_000_000_000 if dtype in (torch.float16, torch.bfloat16) else 300_000_000)


def _left_to_products(left: Tensor, N: int) -> bool:
    return by_products(*left.shape, N, left.dtype, torch.cuda.get_device_capability(left.device))


# ---- tokens grouped by pattern set ----------------------------------------------------------------------------------
def grouped(chosen: Tensor, P: int) -> tuple[Tensor, Tensor, Tensor]:
    """An order of the tokens that brings equal sets together, and each tile's patterns; no synchronisation.

    chosen ``[T, k]``: each token's patterns, ascending. Returns ``order [T]``, ``patterns [ceil(T / 128), P]`` int32,
    of which the first ``counts [ceil(T / 128)]`` are those of a tile, ascending.
    """
    T, k = chosen.shape
    digits = min(k, 62 // max(1, (P - 1).bit_length()))  # a set as a number, its first patterns if that is too long
    key = chosen.new_zeros(T)
    for place in range(digits):
        key = key * P + chosen[:, place]
    order = torch.sort(key, stable=True).indices
    tiles = -(-T // ROWS)
    used = torch.zeros(tiles, P, dtype=torch.bool, device=chosen.device)
    tile = torch.arange(T, device=chosen.device).div(ROWS, rounding_mode="floor")
    used[tile[:, None].expand(T, k), chosen[order]] = True
    patterns = torch.sort(used.logical_not(), dim=1, stable=True).indices
    return order, patterns.int(), used.sum(1, dtype=torch.int32)


# ---- PyTorch's products ---------------------------------------------------------------------------------------------
def _product(left: Tensor, right: Tensor, real: torch.dtype) -> Tensor:
    """left @ right in `real`, without rounding to the operands' dtype in between."""
    if left.dtype == real:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=real)
    return left.to(real) @ right.to(real)


def _products(left, weights, patterns, bias, x, wide) -> tuple[Tensor, Tensor]:
    """As `_kernel`: rows in pieces, so that a piece's sums stay within SCRATCH_BYTES."""
    backward = x is not None
    (T, P), N = weights.shape, patterns.shape[2 if backward else 1]
    y = left.new_empty(T, N, dtype=weights.dtype if wide else left.dtype)
    grad_weights = weights.new_empty(T if backward else 0, P)
    step = max(1, SCRATCH_BYTES // (2 * max(1, N) * weights.element_size()))
    for start in range(0, T, step):
        rows = slice(start, start + step)
        total = weights.new_zeros(y[rows].shape) if bias is None else bias.repeat(y[rows].shape[0], 1)
        for p in range(P):
            sums = _product(left[rows], patterns[p] if backward else patterns[p].t(), weights.dtype)
            total.addcmul_(sums, weights[rows, p : p + 1])
            if backward:
                grad_weights[rows, p] = sums.mul_(x[rows]).sum(1)
        y[rows] = total
    return y, grad_weights


def gradient_of_patterns(grad: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """dP[p] = (w_p * grad)^T x, as many patterns at once as the scaled gradients have room for."""
    (T, O), I, P = grad.shape, x.shape[1], weights.shape[1]
    out = x.new_empty(P, O, I)
    group = max(1, SCRATCH_BYTES // max(1, T * O * x.element_size()))
    for p in range(0, P, group):
        some = weights[:, p : p + group]
        scaled = x.new_empty(T, some.shape[1], O)
        torch.mul(grad[:, None, :], some[:, :, None], out=scaled)  # in half precision, rounded here
        out[p : p + group] = (scaled.flatten(1).t() @ x).view(some.shape[1], O, I)
    return out


# ---- launchers ------------------------------------------------------------------------------------------------------
def _kernel(left, weights, patterns, bias, x, groups, wide) -> tuple[Tensor, Tensor]:
    """y and, where x is given (the backward pass), the gradient of the weights."""
    return torch.ops.dfn_cuda.route_tokens(left, weights, patterns, bias, x, *(groups or (None, None, None)), wide)


def _tokens(left, weights, patterns, bias, x, chosen, wide) -> tuple[Tensor, Tensor]:
    (T, K), P, N = left.shape, patterns.shape[0], patterns.shape[2 if x is not None else 1]
    if _left_to_products(left, N):
        return _products(left, weights, patterns, bias, x, wide)
    listed = chosen is not None and grouping_pays(T, P, K, N, chosen.shape[1], left.dtype)
    return _kernel(left, weights, patterns, bias, x, grouped(chosen, P) if listed else None, wide)


def pattern_route(
    x: Tensor, weights: Tensor, patterns: Tensor, bias: Tensor | None, chosen: Tensor | None, wide: bool
) -> Tensor:
    return _tokens(x, weights, patterns, bias, None, chosen, wide)[0]


def pattern_route_backward(
    grad: Tensor, x: Tensor, weights: Tensor, patterns: Tensor, chosen: Tensor | None,
    need_tokens: bool, need_patterns: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_bias = grad.sum(0, dtype=weights.dtype) if need_bias else weights.new_empty(0)
    dtype = x.dtype
    if grad.dtype != dtype:  # float32 behind half-precision operands: the sums are float32's, slow and not rounded
        x, patterns = x.to(grad.dtype), patterns.to(grad.dtype)
    grad_x, grad_weights, grad_patterns = x.new_empty(0), weights.new_empty(0), patterns.new_empty(0)
    if need_tokens:
        grad_x, grad_weights = _tokens(grad, weights, patterns, None, x, chosen, False)
    if need_patterns:
        grad_patterns = gradient_of_patterns(grad, x, weights)
    return grad_x.to(dtype), grad_weights, grad_patterns.to(dtype), grad_bias
