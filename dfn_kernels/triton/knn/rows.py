"""Tables of 32-bit numbers whose rows are read as a whole, 16 bytes at a time: points with their indices, boxes."""

import triton
import triton.language as tl


@triton.constexpr_function
def wide(n):
    """Numbers in a row of n: rows are as wide as a few loads of 16 bytes."""
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def _columns(x, R: tl.constexpr, W: tl.constexpr):
    """Of x [R, W], a tuple."""
    parts = (x,)
    for s in tl.static_range(log2(W)):
        even, odd = (), ()
        for e in tl.static_range(1 << s):
            a, b = tl.split(tl.reshape(parts[e], (R, W >> (s + 1), 2)))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    out = ()
    for e in tl.static_range(W):
        out = out + (tl.reshape(parts[e], (R,)),)
    return out


@triton.jit
def same_row(ROW, R: tl.constexpr, W: tl.constexpr):
    """The W numbers at ROW, a tuple, for all R lanes. 16 bytes at a time, so that a lane has all of them."""
    PART: tl.constexpr = min(W, 4)
    out = ()
    for start in tl.static_range(0, W, PART):
        to = tl.broadcast_to(start + tl.arange(0, PART)[None, :], (R, PART))
        out = out + _columns(tl.load(ROW + to), R, PART)
    return out


@triton.jit
def rows_at(TABLE, at, mask, R: tl.constexpr, W: tl.constexpr):
    """The rows of a table at [R], a tuple of columns."""
    PART: tl.constexpr = min(W, 4)
    out = ()
    for start in tl.static_range(0, W, PART):
        to = at.to(tl.int64)[:, None] * W + start + tl.arange(0, PART)[None, :]
        out = out + _columns(tl.load(TABLE + to, mask=mask[:, None], other=0), R, PART)
    return out
