"""The k nearest of what each lane has met, sorted keys in memory, and a list of what is still to be merged into them.

A key is (distance bits << 32 | index): an integer, and keys order as neighbours do. Whatever is nearer than the worst
of the k is put at the end of the lane's list, one store; a list that is nearly full is sorted and merged, K keys at a
time, by networks of min and max in registers. All lanes do the same, whatever their keys are.

Up to THINNED keys the list is first thinned: the smallest distances, 32 bits wide and in registers, tell which of its
keys are still wanted, for a third of what merging them costs. Only what is left at the end is merged, or if too many
tie.

A program's memory: CAP list entries, then `kept` best keys, a multiple of K; entry s of lane l is at s LANES + l. The
first kept - k of the best are -1, so that the last one is the k-th of what was found.
"""

import functools

import torch
import triton
import triton.language as tl

LANES = 64 if torch.version.hip else 32
THINNED = 16  # keys that are kept, at most, where lists are thinned
REGISTERS = 2**16 // 32  # of a lane, if a multiprocessor has one warp
MOST_MEMORY = 1 << 28  # bytes, of all programs
FAR = tl.constexpr(0x7F80000000000000)  # no key of a point at a finite distance reaches it


@triton.constexpr_function
def _is_lower(e, k, p, n):
    """Whether a layer of the network compares entry e with entry e + k, and e gets the smaller one. p = 0: a layer of a
    bitonic merge; else the layer (p, k) of Batcher's odd-even merge sort.
    """
    if p == 0:
        return e & k == 0
    return e >= k % p and (e - k % p) % (2 * k) < k and e + k < n and e // (2 * p) == (e + k) // (2 * p)


@triton.constexpr_function
def _is_upper(e, k, p, n):
    return e >= k and _is_lower(e - k, k, p, n)


@triton.jit
def _layer(x, k: tl.constexpr, p: tl.constexpr, n: tl.constexpr):
    y = ()
    for e in tl.static_range(n):
        if _is_lower(e, k, p, n):
            y = y + (tl.minimum(x[e], x[e + k]),)
        elif _is_upper(e, k, p, n):
            y = y + (x[e - k] ^ x[e] ^ y[e - k],)  # the other one: takes an instruction less than the maximum
        else:
            y = y + (x[e],)
    return y


@triton.jit
def _sorted(x, n: tl.constexpr, LOG: tl.constexpr):
    """n = 2^LOG keys in ascending order."""
    for i in tl.static_range(LOG):
        for j in tl.static_range(i + 1):
            x = _layer(x, 1 << (i - j), 1 << i, n)
    return x


@triton.jit
def _merged(x, n: tl.constexpr, LOG: tl.constexpr):
    """n = 2^LOG keys, which fall after they rise, in ascending order."""
    for i in tl.static_range(LOG):
        x = _layer(x, n >> (i + 1), 0, n)
    return x


@triton.jit
def merge_sorted(new, BEST, kept, ONE: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr):
    """Merges K keys, ascending, into the best: what is too large for one K of them goes on to the next."""
    if not ONE:
        for chunk in range(0, kept - K, K):
            if tl.max((new[0] < tl.load(BEST + (chunk + K - 1) * LANES)).to(tl.int32), axis=0) > 0:
                small, large = (), ()
                for e in tl.static_range(K):
                    old = tl.load(BEST + (chunk + e) * LANES)
                    smaller = tl.minimum(old, new[K - 1 - e])
                    small = small + (smaller,)
                    large = large + (old ^ new[K - 1 - e] ^ smaller,)
                small = _merged(small, K, LOG)
                for e in tl.static_range(K):
                    tl.store(BEST + (chunk + e) * LANES, small[e])
                new = _merged(large, K, LOG)
    small = ()
    for e in tl.static_range(K):
        small = small + (tl.minimum(tl.load(BEST + (kept - K + e) * LANES), new[K - 1 - e]),)
    small = _merged(small, K, LOG)
    for e in tl.static_range(K):
        tl.store(BEST + (kept - K + e) * LANES, small[e])


@triton.jit
def merge_list(
    LIST, BEST, count, longest, kept, ONE: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr
):
    """Merges the first `count` keys of each lane's list, of which the longest has `longest`. The worst that is kept."""
    for start in range(0, longest, K):
        new = ()
        for e in tl.static_range(K):
            new = new + (tl.load(LIST + (start + e) * LANES, mask=start + e < count, other=FAR),)
        merge_sorted(_sorted(new, K, LOG), BEST, kept, ONE, LANES, K, LOG)
    return tl.load(BEST + (kept - 1) * LANES)


@triton.jit
def nearest_of_nothing(like, kept, k, K: tl.constexpr):
    """The K smallest distances, as bits, ascending: -1 for those that k leaves out, then inf."""
    near = ()
    for e in tl.static_range(K):
        near = near + (tl.where(e < kept - k, -1, like * 0 + 0x7F800000),)
    return near


@triton.jit
def thin(LIST, near, worst, count, old, longest, LANES: tl.constexpr, K: tl.constexpr, LOG: tl.constexpr):
    """The first `old` keys of each lane's list are among its K `near`est already; now the others are, too, and of the
    list only what is below the new `worst` key stays.
    """
    NEW = (LIST + old * LANES).to(tl.pointer_type(tl.int32), bitcast=True) + 1  # the upper halves, distances
    fresh = count - old
    for start in range(0, tl.max(fresh, axis=0), K):
        new = ()
        for e in tl.static_range(K):  # up to K keys behind the list may be read: the best ones are there
            d = tl.load(NEW + (start + e) * (2 * LANES))
            new = new + (tl.where(start + e < fresh, d, 0x7F800000),)
        new = _sorted(new, K, LOG)
        both = ()
        for e in tl.static_range(K):
            both = both + (tl.minimum(near[e], new[K - 1 - e]),)
        near = _merged(both, K, LOG)
    worst = tl.minimum(worst, (near[K - 1].to(tl.int64) << 32) | 0xFFFFFFFF)  # whatever its index, it may tie
    to = tl.zeros_like(count)
    for start in range(0, longest, 8):
        keys = ()
        for e in tl.static_range(8):
            keys = keys + (tl.load(LIST + (start + e) * LANES),)
        for e in tl.static_range(8):
            stays = (keys[e] < worst) & (start + e < count)
            tl.store(LIST + to, keys[e], mask=stays)
            to = tl.where(stays, to + LANES, to)
    left = to // LANES
    return near, worst, left


@triton.jit
def forget(BEST, like, kept, k, LANES: tl.constexpr):
    """The best of nothing."""
    for s in range(0, kept):
        tl.store(BEST + s * LANES, tl.where(s < kept - k, tl.zeros_like(like) - 1, FAR))


@triton.jit
def write(MEMORY, OUT_I, OUT_D, at, mask, kept, k, LANES: tl.constexpr):
    """The best keys, which begin at MEMORY, as indices and squared distances from `at` on; -1 and inf for none."""
    tl.debug_barrier()  # a lane reads what another one has written
    lane = tl.arange(0, LANES)[:, None]
    for chunk in range(0, kept, 4):  # four of a row fill a sector, and not all registers
        s = chunk + tl.arange(0, 4)[None, :]
        key = tl.load(MEMORY + s * LANES + lane)
        to = s - (kept - k)
        wanted = mask[:, None] & (to >= 0)
        tl.store(OUT_I + at[:, None] + to, tl.where(key < FAR, key & 0x7FFFFFFF, -1), mask=wanted)
        tl.store(OUT_D + at[:, None] + to, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=wanted)
    tl.debug_barrier()


@triton.jit
def write_nothing(OUT_I, OUT_D, at, mask, k):
    if tl.max(mask.to(tl.int32), axis=0) > 0:
        for s in range(0, k):
            tl.store(OUT_I + at + s, tl.zeros_like(at) - 1, mask=mask)
            tl.store(OUT_D + at + s, tl.zeros_like(at).to(tl.float32) + float("inf"), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------
def sizes(k: int) -> tuple[int, int]:
    """K and how many keys are kept, a multiple of it. Two lists of 16 at a time would not fit into registers."""
    K = max(4, triton.next_power_of_2(k)) if k <= THINNED else 8
    return K, triton.cdiv(k, K) * K


def options(registers: int) -> dict[str, object]:
    """For the compiler: no fused multiply-add, and no more registers than needed, so that many programs fit."""
    exact = {"num_warps": 1, "enable_fp_fusion": False}
    return exact if torch.version.hip else exact | {"maxnreg": registers}


@functools.cache
def resident(device: torch.device, registers: int) -> int:
    """Programs of one warp that run at a time. More would begin when others have ended, and end after all of them."""
    on_gpu = device.type == "cuda"
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
    return multiprocessors * (REGISTERS // registers)


def programs(work: int, entries: int, most: int) -> int:
    """How many share the work, each with so many entries of memory a lane, which it uses for piece after piece."""
    return max(1, min(most, work, MOST_MEMORY // (entries * LANES * 8)))
