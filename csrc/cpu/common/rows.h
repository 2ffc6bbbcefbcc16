// Sums over a list of rows, given by pointers: what gathering comes down to. Compiled once per instruction set.
#pragma once

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {

// The first n < kLanes elements, zeros behind them.
template <class A, class V>
inline Vec<A> load_some(const V* p, int64_t n) {
  V lanes[kLanes<A>] = {};
  std::memcpy(lanes, p, n * sizeof(V));
  return load(lanes);
}
template <class A, class V>
inline void store_some(Vec<A> v, V* p, int64_t n) {
  V lanes[kLanes<A>];
  store(v, lanes);
  std::memcpy(p, lanes, n * sizeof(V));
}

// L registers of channels, from x on
template <int L, class A, class V, class O>
inline void weighted_block(int64_t n, const A* weight, const V* const* rows, int64_t x, O* out) {
  Vec<A> acc[L] = {};
  for (int64_t e = 0; e < n; ++e) {
    const Vec<A> w = splat<A>(weight[e]);
    const V* row = rows[e] + x;
    for (int l = 0; l < L; ++l) acc[l] = multiply_add(w, load(row + l * kLanes<A>), acc[l]);
  }
  for (int l = 0; l < L; ++l) store(acc[l], out + x + l * kLanes<A>);
}

// A register of bfloat16 values: those in even places and those in odd places as floats. Two operations for two
// registers of floats; loading half a register and widening it takes three for one.
template <class V> constexpr bool kIsBFloat16 = false;
template <> constexpr bool kIsBFloat16<BFloat16> = true;
struct Halves { Vec<float> even, odd; };
inline Halves load_halves(const BFloat16* p) {
  UintVec both, even, odd;
  std::memcpy(&both, p, kBytes);
  even = both << 16;
  odd = both & 0xffff0000u;
  Halves h;
  std::memcpy(&h.even, &even, kBytes);
  std::memcpy(&h.odd, &odd, kBytes);
  return h;
}
// As bits in the upper half of each lane, rounded to nearest, ties to even
inline UintVec rounded_bfloat16(Vec<float> v) {
  UintVec bits;
  std::memcpy(&bits, &v, kBytes);
  return v != v ? UintVec{} + 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
}
inline void store_halves(Vec<float> even, Vec<float> odd, BFloat16* p) {
  const UintVec both = (rounded_bfloat16(even) >> 16) | (rounded_bfloat16(odd) & 0xffff0000u);
  std::memcpy(p, &both, kBytes);
}

// L registers of bfloat16 channels, from x on
template <int L>
inline void weighted_block_of_halves(int64_t n, const float* weight, const BFloat16* const* rows, int64_t x, BFloat16* out) {
  Vec<float> even[L] = {}, odd[L] = {};
  for (int64_t e = 0; e < n; ++e) {
    const Vec<float> w = splat<float>(weight[e]);
    const BFloat16* row = rows[e] + x;
    for (int l = 0; l < L; ++l) {
      const Halves h = load_halves(row + l * 2 * kLanes<float>);
      even[l] = multiply_add(w, h.even, even[l]);
      odd[l] = multiply_add(w, h.odd, odd[l]);
    }
  }
  for (int l = 0; l < L; ++l) store_halves(even[l], odd[l], out + x + l * 2 * kLanes<float>);
}
// out[0..c) = sum of weight[e] * rows[e][0..c), in the order of e
template <class A, class V, class O>
inline void weighted_sum(int64_t n, int64_t c, const A* weight, const V* const* rows, O* out) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t x = 0;
  if constexpr (kIsBFloat16<V> && kIsBFloat16<O>) {
    constexpr int64_t both = 2 * lanes;
    for (; x + 8 * both <= c && kBytes == 64; x += 8 * both) weighted_block_of_halves<8>(n, weight, rows, x, out);
    for (; x + 4 * both <= c; x += 4 * both) weighted_block_of_halves<4>(n, weight, rows, x, out);
    for (; x + 2 * both <= c; x += 2 * both) weighted_block_of_halves<2>(n, weight, rows, x, out);
    for (; x + both <= c; x += both) weighted_block_of_halves<1>(n, weight, rows, x, out);
  }
  for (; x + 16 * lanes <= c && kBytes == 64; x += 16 * lanes) weighted_block<16, A>(n, weight, rows, x, out);
  for (; x + 8 * lanes <= c; x += 8 * lanes) weighted_block<8, A>(n, weight, rows, x, out);
  for (; x + 4 * lanes <= c; x += 4 * lanes) weighted_block<4, A>(n, weight, rows, x, out);
  for (; x + lanes <= c; x += lanes) weighted_block<1, A>(n, weight, rows, x, out);
  if (x < c) {
    Vec<A> acc = {};
    for (int64_t e = 0; e < n; ++e) acc = multiply_add(splat<A>(weight[e]), load_some<A>(rows[e] + x, c - x), acc);
    store_some<A>(acc, out + x, c - x);
  }
}

template <int R, class A, class V>
inline void dots_block(int64_t c, const V* left, const V* const* rows, A* out) {
  Vec<A> acc[R] = {};
  int64_t x = 0;
  if constexpr (kIsBFloat16<V>) {
    for (; x + 2 * kLanes<A> <= c; x += 2 * kLanes<A>) {
      const Halves one = load_halves(left + x);
      for (int r = 0; r < R; ++r) {
        const Halves h = load_halves(rows[r] + x);
        acc[r] = multiply_add(one.odd, h.odd, multiply_add(one.even, h.even, acc[r]));
      }
    }
  }
  for (; x + kLanes<A> <= c; x += kLanes<A>) {
    const Vec<A> one = load(left + x);
    for (int r = 0; r < R; ++r) acc[r] = multiply_add(one, load(rows[r] + x), acc[r]);
  }
  if (x < c) {
    const Vec<A> one = load_some<A>(left + x, c - x);
    for (int r = 0; r < R; ++r) acc[r] = multiply_add(one, load_some<A>(rows[r] + x, c - x), acc[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = sum<A>(acc[r]);
}

// out[e] = <left, rows[e]>
template <class A, class V>
inline void dots(int64_t n, int64_t c, const V* left, const V* const* rows, A* out) {
  int64_t e = 0;
  for (; e + 8 <= n; e += 8) dots_block<8, A, V>(c, left, rows + e, out + e);
  for (; e < n; ++e) dots_block<1, A, V>(c, left, rows + e, out + e);
}

}  // namespace dfn::DFN_ISA
