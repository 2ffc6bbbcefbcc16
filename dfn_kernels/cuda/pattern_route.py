"""pattern_route in CUDA C++: what the kernels do, what PyTorch's products (cuBLAS) do, tokens grouped by patterns.

The launcher beside csrc/cuda/pattern_route*.cu. Nothing here is larger than the op's own inputs and results, or than
SCRATCH_BYTES: of [T, P, O] and [T, P * I] there are pieces.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128  # of a tile: so many tokens share a list of patterns (kTileRows in csrc/cuda/pattern_route.h)
STRIP = 512  # columns whose products with x are summed at once (kStrip, there)
SCRATCH_BYTES = 32 << 20
FEW_CHANNELS = 16  # the product of so few leaves most of a GPU idle, so cuBLAS splits its sum


# ---- the rule -------------------------------------------------------------------------------------------------------
class Card(NamedTuple):
    """What PyTorch's products reach, a second, and the share of it that our kernels reach at the same work."""

    half: float  # multiply-adds, float16 and bfloat16
    real: float  # float32 and float64
    bytes: float
    forward: float
    backward: float
    rows: int  # tokens of a tile


# An H200, measured (commit 9075e04): bare products 720 and 51 TFLOP/s, a copy 4.29 TB/s; our kernel 0.82 to 1.01 of the
# product forward, 0.75 and 0.79 backward. An A100 by its data sheet, its shares not yet measured.
HOPPER = Card(half=3.6e14, real=2.55e13, bytes=4.29e12, forward=0.85, backward=0.77, rows=256)
AMPERE = Card(half=1.56e14, real=9.7e12, bytes=2.0e12, forward=0.9, backward=0.9, rows=128)
SIMPLE_SHARE = 0.2  # of the kernel for float32 and float64, which has no tensor cores and no pipeline; not yet measured
LAUNCH = 5e-6  # seconds of one launch more


def by_products(
    T: int, P: int, K: int, N: int, dtype: torch.dtype, capability: tuple[int, int], backward: bool
) -> bool:
    """Whether y = sum_p w_p * (left @ right_p) is left to PyTorch's batched product [T, K] x [K, N] of all patterns.

    PyTorch multiplies at its full rate, but writes a float32 sum per token, column and pattern (float64 for float64),
    which `combine_products` reads: it wins where the product is deep. These sums come in pieces of so many rows as
    SCRATCH_BYTES hold, and every piece reads all patterns. Our kernel keeps the sums and reads the patterns once, does
    not reach that rate, and works on whole tiles: it wins at the depth of hidden layers, and loses where few tokens
    meet many patterns of great depth. Both times are estimated by counted bytes and work.

    `python -m bench.route_rule` measures both sides of it on a GPU.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    card = HOPPER if capability >= (9, 0) else AMPERE
    rate, element = (card.half, 2) if half else (card.real, dtype.itemsize)
    share = (card.backward if backward else card.forward) if half else SIMPLE_SHARE
    rows, columns = (card.rows, 128) if half else (64, 64)
    reading = P * K * N * element / card.bytes
    work = P * K / rate
    kernel = max(reading, _padded(T, rows) * _padded(N, columns) * work / share)
    step = _rows_of_piece(P, N, max(4, element))
    pieces = max(1, -(-T // step))
    last = T - (pieces - 1) * step
    products = sum(
        count * max(reading, _padded(size, 64) * _padded(N, 64) * work)
        for count, size in ((pieces - 1, step), (1, last))
    )
    return products + 2 * max(4, element) * P * T * N / card.bytes + pieces * LAUNCH < kernel


def _rows_of_piece(P: int, N: int, element: int) -> int:
    """Tokens whose sums [P, rows, N], of so many bytes each, stay within SCRATCH_BYTES."""
    return max(1, SCRATCH_BYTES // max(1, P * N * element))


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def grouping_pays(T: int, P: int, K: int, N: int, k: int, dtype: torch.dtype) -> bool:
    """Whether top_k is worth `grouped`: some 12 launches, 60 us, against the products of the other patterns.

    In that time Hopper's tensor cores do 2e10 multiply-adds, the float32 kernel about 3e8. Not yet measured.
    """
    return (P - k) * T * K * N >= (20_000_000_000 if dtype in (torch.float16, torch.bfloat16) else 300_000_000)


def _left_to_products(left: Tensor, P: int, N: int, backward: bool) -> bool:
    T, K = left.shape
    return by_products(T, P, K, N, left.dtype, torch.cuda.get_device_capability(left.device), backward)


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


def _joined(parts: Tensor | None) -> Tensor | None:
    """The gradient of the weights, from what each column of tiles adds to it, [columns, T, P]."""
    return parts if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


# ---- PyTorch's products ---------------------------------------------------------------------------------------------
def _product(left: Tensor, right: Tensor, real: torch.dtype) -> Tensor:
    """left @ right in `real`, batched, without rounding to the operands' dtype in between."""
    if left.dtype == real:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=real)
    return left.to(real) @ right.to(real)


def _products(left, weights, patterns, bias, x, wide) -> tuple[Tensor, Tensor | None]:
    """As `_kernel`, in pieces of rows."""
    backward = x is not None
    right = patterns if backward else patterns.transpose(1, 2)
    (T, P), (_, K, N) = weights.shape, right.shape
    y = left.new_empty(T, N, dtype=weights.dtype if wide else left.dtype)
    parts = weights.new_empty(-(-N // STRIP), T, P) if backward else None
    step = _rows_of_piece(P, N, weights.element_size())
    for start in range(0, T, step):
        rows = slice(start, start + step)
        sums = _product(left[rows].expand(P, -1, K), right, weights.dtype)
        ends = (x[rows], y[rows], parts[:, rows]) if backward else (None, y[rows], None)
        torch.ops.dfn_cuda.combine_products(sums, weights[rows], bias, *ends)
    return y, _joined(parts)


def gradient_of_patterns(grad: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """dP[p] = (w_p * grad)^T x, as many patterns at once as the scaled rows have room for.

    The sum runs over tokens, so w cannot wait for it: w * grad or w * x, the narrower one, is rounded to x's dtype.
    Nor may the parts of a split sum be rounded, as cuBLAS does: with few channels the product is float32's.
    """
    (T, O), I, P = grad.shape, x.shape[1], weights.shape[1]
    out = x.new_empty(P, O, I)
    group = max(1, SCRATCH_BYTES // max(1, T * min(O, I) * x.element_size()))
    for p in range(0, P, group):
        mine, some = out[p : p + group], weights[:, p : p + group]
        scaled = torch.ops.dfn_cuda.scale_rows(grad if O <= I else x, some)
        if O <= I:
            left, right = scaled.permute(1, 2, 0), x.expand(len(mine), T, I)
        else:
            left, right = grad.t().expand(len(mine), O, T), scaled.transpose(0, 1)
        if min(O, I) < FEW_CHANNELS and x.dtype != weights.dtype:
            mine.copy_(_product(left, right, weights.dtype))
        elif O <= I:  # one product for all
            torch.mm(scaled.flatten(1).t(), x, out=mine.flatten(0, 1))
        else:
            torch.bmm(left, right, out=mine)
    return out


# ---- launchers ------------------------------------------------------------------------------------------------------
def _kernel(left, weights, patterns, bias, x, groups, wide) -> tuple[Tensor, Tensor | None]:
    """y and, where x is given (the backward pass), the gradient of the weights."""
    groups = groups or (None, None, None)
    y, parts = torch.ops.dfn_cuda.route_tokens(left, weights, patterns, bias, x, *groups, wide)
    return y, _joined(parts if x is not None else None)


def _tokens(left, weights, patterns, bias, x, chosen, wide) -> tuple[Tensor, Tensor | None]:
    (T, K), P, N = left.shape, patterns.shape[0], patterns.shape[2 if x is not None else 1]
    if _left_to_products(left, P, N, x is not None):
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
