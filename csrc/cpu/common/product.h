// The inner product of a cache-blocked matrix multiplication: a tile of kRows x kCols sums, held in registers, of
// packed operands. Packing converts to the type of the sums and pads with zeros, so every tile is a full one.
#pragma once

#include <utility>

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {

// As many sums as leave room for the operands: 28 of 32 registers, or 12 of 16.
#if defined(__AVX512F__)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif
template <class A> constexpr int kCols = 2 * kLanes<A>;

template <class A> inline Vec<A> fused_multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (Vec<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (Vec<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// tile[r][c] = sum_k left[k][r] * right[k][c], for packed left [K][kRows] and right [K][kCols]
template <class A>
__attribute__((noinline)) void tile_product(int64_t K, const A* left, const A* right, A* tile) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[kRows][2] = {};
  for (int64_t k = 0; k < K; ++k, left += kRows, right += 2 * L) {
    const Vec<A> right0 = load(right), right1 = load(right + L);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> one = splat<A>(left[r]);
      acc[r][0] = fused_multiply_add<A>(one, right0, acc[r][0]);
      acc[r][1] = fused_multiply_add<A>(one, right1, acc[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(acc[r][0], tile + r * 2 * L);
    store(acc[r][1], tile + r * 2 * L + L);
  }
}

// The same where an element of the packed operands is a pair of bfloat16 values, one after the other along k. The
// products are exact, the sums float32.
#if defined(__AVX512F__)
constexpr bool kHasPairs = true;
__attribute__((noinline, target("avx512bf16"))) inline void tile_product_of_pairs(int64_t K, const float* left,
                                                                                  const float* right, float* tile) {
  __m512 acc[kRows][2] = {};
  for (int64_t k = 0; k < K; ++k, left += kRows, right += 32) {
    const __m512bh right0 = (__m512bh)_mm512_loadu_ps(right), right1 = (__m512bh)_mm512_loadu_ps(right + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh one = (__m512bh)_mm512_set1_ps(left[r]);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], one, right0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], one, right1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(tile + r * 32, acc[r][0]);
    _mm512_storeu_ps(tile + r * 32 + 16, acc[r][1]);
  }
}
#else
constexpr bool kHasPairs = false;
inline void tile_product_of_pairs(int64_t, const float*, const float*, float*) {}
#endif

// ---- packing: a source row is contiguous along k, or along the tile's columns --------------------------------------
// What one packed element along k comes from: one element, converted, or with Pairs two bfloat16 as they are.
template <class A, class S, bool Pairs> struct Unit {
  static constexpr int kWidth = Pairs ? 2 : 1;

  static int64_t count(int64_t K) { return (K + kWidth - 1) / kWidth; }

  static A one(const S* row, int64_t k, int64_t K) {
    if constexpr (Pairs) {
      uint32_t bits = row[2 * k].bits;
      if (2 * k + 1 < K) bits |= static_cast<uint32_t>(row[2 * k + 1].bits) << 16;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    } else {
      return to_float(row[k]);
    }
  }

  static Vec<A> many(const S* row, int64_t k) {
    if constexpr (Pairs) return load(reinterpret_cast<const float*>(row + 2 * k));
    else return load(row + k);
  }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DFN_SHUFFLE 1
#endif
#endif

#if defined(DFN_SHUFFLE)
// One step of a transposition: swaps the blocks of `Step` lanes off the diagonal.
template <class A, int Step, int... Lane>
inline void exchange(Vec<A>& upper, Vec<A>& lower, std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<A>;
  const Vec<A> a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((Lane & Step) ? L + Lane - Step : Lane)...);
  lower = __builtin_shufflevector(a, b, ((Lane & Step) ? L + Lane : Lane + Step)...);
}

template <class A, int Step = 1>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
  if constexpr (Step < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & Step)) exchange<A, Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, L>{});
    transpose<A, 2 * Step>(rows);
  }
}
#endif

// packed[k][n] = source[n * stride + k] for n < count, 0 for the rest of the `Width` columns
template <class A, class S, bool Pairs, int Width>
inline void pack_across(const S* source, int64_t stride, int64_t count, int64_t K, A* packed) {
  using U = Unit<A, S, Pairs>;
  constexpr int L = kLanes<A>;
  const int64_t units = U::count(K), whole = K / U::kWidth;
  for (int64_t n = 0; n < Width; n += L) {
    int64_t k = 0;
#if defined(DFN_SHUFFLE)
    for (; k + L <= whole && n + L <= Width; k += L) {
      Vec<A> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] = n + i < count ? U::many(source + (n + i) * stride, k) : Vec<A>{};
      transpose<A>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(rows[i], packed + (k + i) * Width + n);
    }
#endif
    for (; k < units; ++k)
      for (int64_t i = n; i < n + L && i < Width; ++i)
        packed[k * Width + i] = i < count ? U::one(source + i * stride, k, K) : A(0);
  }
}

// The same for rows that lie anywhere: row r at source + place[r] * stride
template <class A, class S, bool Pairs, int Width>
inline void pack_across(const S* source, int64_t stride, const int32_t* place, int64_t count, int64_t K, A* packed) {
  using U = Unit<A, S, Pairs>;
  const int64_t units = U::count(K);
  for (int64_t r = 0; r < Width; ++r) {
    const S* row = source + (r < count ? place[r] : 0) * stride;
    for (int64_t k = 0; k < units; ++k) packed[k * Width + r] = r < count ? U::one(row, k, K) : A(0);
  }
}

// packed[k][n] = source[k * stride + n] for n < count, 0 for the rest of the `Width` columns
template <class A, class S, bool Pairs, int Width>
inline void pack_along(const S* source, int64_t stride, int64_t count, int64_t K, A* packed) {
  const int64_t units = Unit<A, S, Pairs>::count(K);
  for (int64_t k = 0; k < units; ++k, packed += Width) {
    if constexpr (Pairs) {
      const S *even = source + 2 * k * stride, *odd = even + stride;
      const bool both = 2 * k + 1 < K;
      uint32_t pairs[Width];
      for (int64_t n = 0; n < Width; ++n)
        pairs[n] = n >= count ? 0 : both ? even[n].bits | static_cast<uint32_t>(odd[n].bits) << 16 : even[n].bits;
      std::memcpy(packed, pairs, sizeof(pairs));
    } else {
      const S* row = source + k * stride;
      constexpr int L = kLanes<A>;
      int64_t n = 0;
      for (; n + L <= count && n + L <= Width; n += L) store(load(row + n), packed + n);
      for (; n < Width; ++n) packed[n] = n < count ? to_float(row[n]) : A(0);
    }
  }
}

}  // namespace dfn::DFN_ISA
