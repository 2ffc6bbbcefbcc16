// What a search by products does with matrices, compiled once per instruction set; what it is for: cpu/knn/products.h.
// No std:: templates here: the linker would be free to take another instruction set's copy of them.
#include "cpu/common/product.h"
#include "cpu/knn/types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfn::knn::DFN_ISA {
namespace {

using namespace dfn::DFN_ISA;

// The lanes with a <= b, as bits.
template <class T>
unsigned at_most(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)(a <= b));
  else return _mm256_movemask_pd((__m256d)(a <= b));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps((__m128)(a <= b));
  else return _mm_movemask_pd((__m128d)(a <= b));
#else
  unsigned lanes = 0;
  for (int l = 0; l < kLanes<T>; ++l) lanes |= unsigned(a[l] <= b[l]) << l;
  return lanes;
#endif
}

template <class T, int Width>
void pack(const T* rows, int count, int dims, const T* centre, T* packed, double* norms) {
  constexpr int kChunk = 128;  // dimensions at a time: the shifted rows stay in the cache
  constexpr int kSums = 8;
  T shifted[Width * kChunk];
  double sums[Width][kSums] = {};
  for (int from = 0; from < dims; from += kChunk) {
    const int length = dims - from < kChunk ? dims - from : kChunk;
    for (int i = 0; i < count; ++i) {
      const T* row = rows + int64_t(i) * dims + from;
      T* to = shifted + i * kChunk;
      for (int d = 0; d < length; ++d) to[d] = row[d] - centre[from + d];
      int d = 0;
      for (; d + kSums <= length; d += kSums)
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s) sums[i][s] += double(to[d + s]) * double(to[d + s]);
      for (; d < length; ++d) sums[i][0] += double(to[d]) * double(to[d]);
    }
    pack_across<T, T, false, Width>(shifted, kChunk, count, length, packed + int64_t(from) * Width);
  }
  for (int i = 0; i < count; ++i) {
    norms[i] = 0;
    for (int s = 0; s < kSums; ++s) norms[i] += sums[i][s];
  }
}

template <class T>
void compare(int dims, const T* queries, const T* points, const T* lower, const T* upper, uint32_t first,
             Candidates<T>* const* candidates, int count) {
  constexpr int C = kCols<T>, L = kLanes<T>;
  alignas(64) T tile[kRows * C];
  tile_product<T>(dims, queries, points, tile);
  for (int r = 0; r < count; ++r) {
    Candidates<T>& of = *candidates[r];
    for (int v = 0; v < C; v += L) {
      const T* product = tile + r * C + v;
      const Vec<T> bounds = load(lower + v) - T(2) * load(product);
      unsigned close = at_most<T>(bounds, splat<T>(of.reach));
      if (close == 0) continue;
      T bound[L];
      store(bounds, bound);
      while (close) {
        const int l = __builtin_ctz(close);
        close &= close - 1;
        const int64_t id = int64_t(first) + v + l;
        if (id >= of.end || id == of.hidden) continue;
        of.lower[of.count] = bound[l];
        of.upper[of.count] = upper[v + l] - T(2) * product[l];
        of.ids[of.count] = static_cast<uint32_t>(id);
        if (++of.count < of.room) continue;
        of.full(of);
        close &= at_most<T>(bounds, splat<T>(of.reach));
      }
    }
  }
}

template <class T>
void measure(const T* query, const T* points, int dims, const uint32_t* ids, int count, T* dists) {
  constexpr int L = kLanes<T>;
  for (int at = 0; at < count; at += L) {
    const T* rows[L];
    for (int l = 0; l < L; ++l) rows[l] = points + int64_t(ids[at + l < count ? at + l : count - 1]) * dims;
    Vec<T> sum = {};
    int d = 0;
#if defined(DFN_SHUFFLE)
    for (; d + L <= dims; d += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) block[l] = load(rows[l] + d);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const Vec<T> step = block[i] - splat<T>(query[d + i]);
        sum = sum + step * step;
      }
    }
#endif
    for (; d < dims; ++d) {
      Vec<T> column;
      for (int l = 0; l < L; ++l) column[l] = rows[l][d];
      const Vec<T> step = column - splat<T>(query[d]);
      sum = sum + step * step;
    }
    T found[L];
    store(sum, found);
    for (int l = 0; l < L && at + l < count; ++l) dists[at + l] = found[l];
  }
}

// Halves the range of the bits, which order numbers as their values do.
template <class T>
T enough(const T* x, int count, int k) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr Bits kMagnitude = static_cast<Bits>(~(uint64_t(1) << (8 * sizeof(T) - 1)));
  auto flipped = [](Bits b) { return b < 0 ? b ^ kMagnitude : b; };
  auto bits = [&](T value) {
    Bits b;
    std::memcpy(&b, &value, sizeof b);
    return flipped(b);
  };
  auto value = [&](Bits b) {
    b = flipped(b);
    T of;
    std::memcpy(&of, &b, sizeof b);
    return of;
  };
  T least = x[0], most = x[0];
  for (int i = 0; i < count; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  for (Bits lo = bits(least), hi = bits(most); lo < hi;) {
    const Bits middle = (lo & hi) + ((lo ^ hi) >> 1);  // rounded down, without overflow
    const T at = value(middle);
    Bits below = 0;
    for (int i = 0; i < count; ++i) below += x[i] <= at;
    if (below < k) {
      lo = middle + 1;
    } else {
      hi = middle, most = at;
      if (below <= k + k / 4) break;
    }
  }
  return most;
}

template <class T>
constexpr ProductKernels<T> functions = {kRows,      kCols<T>,   pack<T, kRows>, pack<T, kCols<T>>,
                                         compare<T>, measure<T>, enough<T>};

}  // namespace

extern const ProductTable product_table;
const ProductTable product_table = {functions<float>, functions<double>};

}  // namespace dfn::knn::DFN_ISA
