// Sums over a list of rows, given by pointers: what gathering comes down to. Compiled once per instruction set.
#pragma once

#include "cpu/simd.h"

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

// out[0..c) = sum of weight[e] * rows[e][0..c), in the order of e
template <class A, class V, class O>
inline void weighted_sum(int64_t n, int64_t c, const A* weight, const V* const* rows, O* out) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t x = 0;
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
