"""Pattern routing in Triton: a matrix product per pattern; the weights multiply its float32 sums.

Not yet run on a GPU with float32 and float64 sums in two levels (`span`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import INTERPRETED  # whose product of bfloat16 is wrong; in float32 it is the same one, exact


@triton.jit
def _add_columns(
    acc, left_at, right_at, rows, columns, begin, end, K, sL, sRo,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + left @ right over the columns k in [begin, end)."""
    t, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    left_at += begin
    if BACKWARD:
        right_at += begin * sRo
    else:
        right_at += begin
    for start in range(begin, end, BK):
        inside = k < K - start
        left = tl.load(left_at + (t[:, None] * sL + k[None, :]), mask=rows[:, None] & inside[None, :], other=0.0)
        if BACKWARD:
            offset = k[:, None] * sRo + n[None, :]
        else:
            offset = n[None, :] * sRo + k[:, None]
        right = tl.load(right_at + offset, mask=inside[:, None] & columns[None, :], other=0.0)
        if WIDEN:
            left = left.to(acc.dtype)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        left_at += BK
        if BACKWARD:
            right_at += BK * sRo
        else:
            right_at += BK
    return acc


@triton.jit
def tokens_kernel(
    L, W, R, BIAS, X,  # inputs: left matrix [T, K], weights [T, P], patterns, bias [N], x (for the gradient of w)
    Y, DW,  # outputs: [T, N]; what each block of columns adds to the gradient of w, [blocks, T, P]
    T, P, K, N, sL, sX, sRp, sRo,  # shapes and strides; [T, P] and Y are contiguous
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,  # tunable
):  # fmt: skip
    """y[t][n] = sum_p w[t][p] * (sum_k left[t][k] * right_p[k][n]).

    right_p[k][n] is patterns[p][n][k] in the forward pass; in the backward pass, with the output's gradient on the
    left, it is patterns[p][k][n], y is the gradient of x, and the sums in brackets also give that of w.
    """
    # 64-bit arithmetic for where a tile begins and for strides, as rows may lie far apart; 32-bit inside what is dense
    sL, sX, sRo = tl.cast(sL, tl.int64), tl.cast(sX, tl.int64), tl.cast(sRo, tl.int64)
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BN)
    block_n = pid % blocks_n
    t0, n0 = (pid // blocks_n).to(tl.int64) * BM, block_n.to(tl.int64) * BN
    t, n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = t < T - t0, n < N - n0
    inside_y = rows[:, None] & columns[None, :]
    total = tl.zeros((BM, BN), W.dtype.element_ty)
    for p in range(P):
        left_at = L + t0 * sL
        if BACKWARD:
            right_at = R + tl.cast(p, tl.int64) * sRp + n0
        else:
            right_at = R + tl.cast(p, tl.int64) * sRp + n0 * sRo
        acc = tl.zeros((BM, BN), W.dtype.element_ty)
        if SPAN == 0:
            acc = _add_columns(
                acc, left_at, right_at, rows, columns, 0, K, K, sL, sRo, BACKWARD, PRECISION, WIDEN, BM, BN, BK
            )
        else:
            for begin in range(0, K, SPAN):
                acc += _add_columns(
                    tl.zeros((BM, BN), W.dtype.element_ty), left_at, right_at, rows, columns, begin,
                    tl.minimum(begin + SPAN, K), K, sL, sRo, BACKWARD, PRECISION, WIDEN, BM, BN, BK,
                )  # fmt: skip
        weight = tl.load(W + t0 * P + (t * P + p), mask=rows, other=0.0)
        total += weight[:, None] * acc
        if BACKWARD:
            x = tl.load(X + (t0 * sX + n0) + (t[:, None] * sX + n[None, :]), mask=inside_y, other=0.0)
            dot = tl.sum(acc * x.to(acc.dtype), axis=1)
            tl.store(DW + (block_n.to(tl.int64) * T + t0) * P + (t * P + p), dot, mask=rows)
    if HAS_BIAS:
        total += tl.load(BIAS + n0 + n, mask=columns, other=0.0)[None, :]
    tl.store(Y + (t0 * N + n0) + (t[:, None] * N + n[None, :]), total.to(Y.dtype.element_ty), mask=inside_y)


@triton.jit
def _add_tokens(
    acc, weight_at, grad_at, x_at, rows, columns, begin, end, T, P, sG, sX,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + (w * grad)^T @ x over the tokens t in [begin, end). Here w cannot wait for the sum."""
    o, i, t = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    first = tl.cast(begin, tl.int64)
    weight_at, grad_at, x_at = weight_at + first * P, grad_at + first * sG, x_at + first * sX
    for start in range(begin, end, BK):
        inside = t < T - start
        weight = tl.load(weight_at + t * P, mask=inside, other=0.0)
        grad = tl.load(grad_at + (t[None, :] * sG + o[:, None]), mask=inside[None, :] & rows[:, None], other=0.0)
        x = tl.load(x_at + (t[:, None] * sX + i[None, :]), mask=inside[:, None] & columns[None, :], other=0.0)
        left = weight[None, :] * grad.to(weight.dtype)
        if not WIDEN:
            left = left.to(grad.dtype)
        acc = tl.dot(left, x.to(left.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        weight_at += BK * P
        grad_at += BK * sG
        x_at += BK * sX
    return acc


@triton.jit
def patterns_kernel(
    G, W, X,  # inputs: gradient of the output [T, O], weights [T, P], x [T, I]
    DP,  # output: [P, O, I]
    T, P, O, I, sG, sX,  # shapes and strides
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,  # tunable
):  # fmt: skip
    """dp[p][o][i] = sum_t (w[t][p] * g[t][o]) * x[t][i]."""
    sG, sX = tl.cast(sG, tl.int64), tl.cast(sX, tl.int64)  # rows may lie far apart
    pid = tl.program_id(0)
    blocks_o, blocks_i = tl.cdiv(O, BM), tl.cdiv(I, BN)
    p = (pid // (blocks_o * blocks_i)).to(tl.int64)
    o0, i0 = ((pid // blocks_i) % blocks_o).to(tl.int64) * BM, (pid % blocks_i).to(tl.int64) * BN
    o, i = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = o < O - o0, i < I - i0
    acc = tl.zeros((BM, BN), W.dtype.element_ty)
    if SPAN == 0:
        acc = _add_tokens(acc, W + p, G + o0, X + i0, rows, columns, 0, T, T, P, sG, sX, PRECISION, WIDEN, BM, BN, BK)
    else:
        for begin in range(0, T, SPAN):
            acc += _add_tokens(
                tl.zeros((BM, BN), W.dtype.element_ty), W + p, G + o0, X + i0, rows, columns, begin,
                tl.minimum(begin + SPAN, T), T, P, sG, sX, PRECISION, WIDEN, BM, BN, BK,
            )  # fmt: skip
    at = DP + ((p * O + o0) * I + i0) + (o[:, None] * I + i[None, :])
    tl.store(at, acc.to(DP.dtype.element_ty), mask=rows[:, None] & columns[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------
# Two tiles of sums need more registers than the compiler grants by itself.
OPTIONS = {} if torch.version.hip else {"maxnreg": 255}


def tiles(dtype: torch.dtype, kernel: str) -> dict[str, int]:
    """Tile of a kernel for the left operand's dtype; every value is compiled ahead of time by the tests.

    "backward" keeps x beside two tiles of sums, "patterns" has only one.
    """
    if dtype == torch.float64:
        return {"BM": 32, "BN": 32 if kernel == "patterns" else 16, "BK": 16}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 16} if kernel == "patterns" else {"BM": 32, "BN": 32, "BK": 16}
    return {"BM": 64 if kernel == "backward" else 128, "BN": 128 if kernel == "patterns" else 64, "BK": 32}


def span(dtype: torch.dtype, kernel: str) -> int:
    """Terms that are added up one after another before their sum joins the others; 0: all of them.

    A float32 sum of 65,536 tokens in one row is off by 4e-6, in rows of 256 by 4e-7; 768 columns by 5e-7, in rows of 64
    by 1.6e-7. Half precision rounds its operands by far more, and has no registers to spare for a third tile of sums.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return 0
    return 256 if kernel == "patterns" else 64


def warps(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float64 else 8


def _precision(dtype: torch.dtype) -> str:
    """True float32, unless PyTorch's own switch allows TF32.

    From PyTorch 2.9 on there are two switches, and the old one raises an error where the new one was set.
    """
    if dtype != torch.float32:
        return "ieee"
    switches = torch.backends.cuda.matmul
    new = getattr(switches, "fp32_precision", None)
    return "tf32" if (switches.allow_tf32 if new is None else new == "tf32") else "ieee"


def _multiply_tokens(left, weights, patterns, bias, x, out, K: int, backward: bool) -> Tensor:
    """Fills `out` and returns the gradient of the weights, if backward."""
    (T, P), N = weights.shape, out.shape[1]
    tile = tiles(left.dtype, "backward" if backward else "forward")
    blocks = triton.cdiv(N, tile["BN"])
    parts = weights.new_empty(blocks, T, P) if backward else weights
    if T * N > 0:
        tokens_kernel[(triton.cdiv(T, tile["BM"]) * blocks,)](
            left, weights, patterns, weights if bias is None else bias, x,
            out, parts,
            T, P, K, N, left.stride(0), x.stride(0), patterns.stride(0), patterns.stride(1),
            BACKWARD=backward, HAS_BIAS=bias is not None, PRECISION=_precision(left.dtype), WIDEN=INTERPRETED,
            SPAN=span(left.dtype, "tokens"), **tile, num_warps=warps(left.dtype), **OPTIONS,
        )  # fmt: skip
    return parts if not backward else parts[0] if blocks == 1 else parts.sum(0)


def pattern_route(
    x: Tensor, weights: Tensor, patterns: Tensor, bias: Tensor | None, chosen: Tensor | None, wide: bool
) -> Tensor:
    """`chosen` only saves time elsewhere: the weights of the other patterns are 0."""
    out = x.new_empty(x.shape[0], patterns.shape[1], dtype=weights.dtype if wide else x.dtype)
    _multiply_tokens(x, weights, patterns, bias, x, out, x.shape[1], backward=False)
    return out


def pattern_route_backward(
    grad: Tensor, x: Tensor, weights: Tensor, patterns: Tensor, chosen: Tensor | None,
    need_tokens: bool, need_patterns: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, I = x.shape
    P, O, _ = patterns.shape
    grad_x, grad_weights = x.new_empty(x.shape if need_tokens else 0), weights.new_empty(0)
    if need_tokens:
        grad_weights = _multiply_tokens(grad, weights, patterns, None, x, grad_x, O, backward=True)
    grad_patterns = patterns.new_empty((P, O, I) if need_patterns else 0)
    if grad_patterns.numel() > 0:
        tile = tiles(grad.dtype, "patterns")
        patterns_kernel[(P * triton.cdiv(O, tile["BM"]) * triton.cdiv(I, tile["BN"]),)](
            grad, weights, x,
            grad_patterns,
            T, P, O, I, grad.stride(0), x.stride(0),
            PRECISION=_precision(grad.dtype), WIDEN=INTERPRETED, SPAN=span(grad.dtype, "patterns"),
            **tile, num_warps=warps(grad.dtype), **OPTIONS,
        )  # fmt: skip
    grad_bias = grad.sum(0, dtype=weights.dtype) if need_bias else weights.new_empty(0)
    return grad_x, grad_weights, grad_patterns, grad_bias
