// What the kernels of gaussian_gather share: how groups of a warp's lanes, as many as a row has units, read rows of values
// or of their gradient; all rows of a batch are on their way before the first is used.
//
// Instructions are what these kernels run out of first: a row of 128 bytes costs a warp 5 beside its arithmetic. So numbers
// of rows have 32 bits, sizes that a lane divides by are powers of two, and nothing is computed twice for each edge.
//
// On a GPU (H200) it was right but for one fault, which has been mended since; how fast it is has not yet been measured.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/gaussian_gather.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace dfn::gather {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 8;    // of a block
constexpr int kFewDims = 3;  // that a lane keeps in registers
constexpr int kBatch = 4;    // rows on their way together

template <class V>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class V>
using Real = typename RealOf<V>::type;

template <class V>
constexpr int kUnit = 16 / sizeof(V);

template <class T>
__device__ T* as(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}
// Of rows that are `bytes` apart.
template <class T>
__device__ __forceinline__ T* row_of(T* first, int row, uint32_t bytes) {
  char* at = const_cast<char*>(reinterpret_cast<const char*>(first)) + ptx::multiply_wide(static_cast<uint32_t>(row), bytes);
  return reinterpret_cast<T*>(at);
}

// ---- units: E values of a row, 16 bytes or one value ----------------------------------------------------------------
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }

template <class V, int E>
struct Unit {
  uint4 words;

  __device__ void load(const void* from) { words = ptx::load_16_bytes(from); }
  __device__ void clear() { words = {0, 0, 0, 0}; }
  __device__ void get(Real<V> (&to)[E]) const {
    if constexpr (std::is_same_v<V, __nv_bfloat16>) {  // one instruction a value; the conversion takes three for two
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < E; ++i) to[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
    } else {
      union {
        uint4 words;
        V values[E];
      } both = {words};
#pragma unroll
      for (int i = 0; i < E; ++i) to[i] = widen(both.values[i]);
    }
  }
  static __device__ void store(void* to, const Real<V> (&from)[E]) {
    union Both {
      uint4 words;
      V values[E];
      __device__ Both() : words{} {}
    } both;
#pragma unroll
    for (int i = 0; i < E; ++i) narrow(from[i], both.values[i]);
    *static_cast<uint4*>(to) = both.words;
  }
};

template <class V>
struct Unit<V, 1> {
  Real<V> value;

  __device__ void load(const void* from) { value = widen(*static_cast<const V*>(from)); }
  __device__ void clear() { value = 0; }
  __device__ void get(Real<V> (&to)[1]) const { to[0] = value; }
  static __device__ void store(void* to, const Real<V> (&from)[1]) { narrow(from[0], *static_cast<V*>(to)); }
};

// ---- arithmetic -----------------------------------------------------------------------------------------------------
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float lesser(float x, float y) { return fminf(x, y); }  // a NaN is nobody's
__device__ inline double lesser(double x, double y) { return fmin(x, y); }
// Not to be contracted: the distances of a search, to the bit.
__device__ inline float plus_square(float sum, float x) { return __fadd_rn(sum, __fmul_rn(x, x)); }
__device__ inline double plus_square(double sum, double x) { return __dadd_rn(sum, __dmul_rn(x, x)); }

// Over `width` lanes, a power of two, `Most` at most. Without a branch, before which the compiler would have the warp meet.
template <int Most = 32, class A>
__device__ __forceinline__ A sum_over(A x, int width) {
#pragma unroll
  for (int step = Most / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAll, x, step);
    if (step < width) x += other;
  }
  return x;
}
template <class A>
__device__ __forceinline__ A least_of(A x, int width) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = lesser(x, __shfl_xor_sync(kAll, x, step < width ? step : 0));
  return x;
}

// sigma within WIDTHS of reference/gaussian_gather.py
template <class A>
__device__ A width_of(A sigma) {
  constexpr A low = sizeof(A) == 8 ? A(0x1p-496) : A(0x1p-56), high = sizeof(A) == 8 ? A(0x1p511) : A(0x1p63);
  const A size = sigma < 0 ? -sigma : sigma, width = size < low ? low : size > high ? high : size;
  return sigma < 0 ? -width : width;
}
constexpr float kFar = 1e4f;  // exp(-kFar) is 0

template <class A>
struct alignas(2 * sizeof(A)) Edge {
  A weight;
  int row;  // of values; -1: no neighbour
};

// Whole quotients of 31-bit numbers by k, in three instructions.
struct Divisor {
  uint32_t k, factor, shift;

  // 2^(31 + shift) / k, rounded up: so far above that no quotient of such a number changes (Granlund and Montgomery).
  void set(int64_t divisor) {
    k = static_cast<uint32_t>(divisor), shift = 0;
    while (1u << shift < k) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / k + 1);
  }
  __device__ uint32_t of(uint32_t n) const { return static_cast<uint32_t>(ptx::multiply_wide(2 * n, factor) >> 32) >> shift; }
};

// ---- how a problem is shared out ------------------------------------------------------------------------------------
struct Shape {
  int lanes, lane_bits;  // of a group: 4 to 32, and its logarithm
  int width, width_bits;  // lanes that make the weights of a query; at most `lanes`
  int queries;            // of a warp: 32 / width
  int slots;              // neighbours in shared memory: 4 to 32
  int stride;             // of queries in shared memory, in neighbours: groups meet different banks
  int chunks;             // of a query's neighbours
  int turns;              // of a warp, each with other queries
  int warp_bytes;         // of shared memory
  unsigned blocks;        // of a batch and head
  Divisor by_k;           // the query of an edge
  // From one row to the next, in bytes. On the device they would come to 64 bits.
  uint32_t list_bytes, slope_bytes, point_bytes, value_bytes, out_bytes, grad_bytes, grad_value_bytes;
};

inline int power_of_two(int64_t n, int low, int high) {
  int power = low;
  while (power < n && power < high) power *= 2;
  return power;
}
inline int logarithm(int power) {
  int bits = 0;
  while (1 << bits < power) ++bits;
  return bits;
}

// How many times a block takes queries, out of `blocks` times in all. Its start takes it a third of a turn. And it takes as
// long as any other: so many blocks that they come in whole waves, of as many as run at a time.
inline int turns_of(int64_t blocks) {
  const int64_t most = int64_t{12} * multiprocessors();  // 3 waves of 4 blocks, 4 of 3, 6 of 2
  return static_cast<int>(blocks > most ? (blocks + most - 1) / most : 1);
}

template <class V>
Shape with_strides(const Problem& g) {
  const auto bytes = [](int64_t elements, size_t size) { return static_cast<uint32_t>(elements * size); };
  Shape t = {};
  t.by_k.set(g.k);
  t.list_bytes = bytes(g.k, sizeof(int64_t)), t.slope_bytes = bytes(g.k, sizeof(Slope<Real<V>>));
  t.point_bytes = bytes(g.D, sizeof(Real<V>));
  t.value_bytes = bytes(g.values.sN, sizeof(V)), t.out_bytes = bytes(g.out.sN, sizeof(V));
  t.grad_bytes = bytes(g.grad.sN, sizeof(V)), t.grad_value_bytes = bytes(g.grad_values.sN, sizeof(V));
  return t;
}

// Calls body with a value of the dtype and, as its second argument's type, the number of them in a unit: one of float64.
template <int N>
struct Number {
  static constexpr int value = N;
};
template <class Body>
void for_dtype(const Problem& g, Body body) {
  const auto call = [&](auto v) {
    if (by_units(g))
      body(v, Number<kUnit<decltype(v)>>{});
    else
      body(v, Number<1>{});
  };
  switch (g.dtype) {
    case Dtype::f16: return call(__half{});
    case Dtype::bf16: return call(__nv_bfloat16{});
    case Dtype::f32: return call(float{});
    case Dtype::f64: return body(double{}, Number<1>{});
  }
}
// Calls body with how many neighbours a lane looks up: 1, 2 or `Most`, whichever `share` is. Where it is not worth kernels
// of its own, always `Most`.
template <int Most, bool Always, class Body>
void for_share(int share, Body body) {
  if constexpr (!Always) {
    if (share == 1) return body(Number<1>{});
    if (share == 2) return body(Number<2>{});
  }
  return body(Number<Most>{});
}

// A batch and head.
struct Group {
  unsigned number, b, h, list;

  __device__ Group(const Problem& g, unsigned number) : number(number) {
    const unsigned H = static_cast<unsigned>(g.H);
    b = number / H, h = number - b * H;
    list = g.list_heads == 1 ? b : number;
  }
  template <class V>
  __device__ char* rows(const Rows& rows) const {
    return reinterpret_cast<char*>(static_cast<V*>(rows.data) + b * rows.sB + h * rows.sH);
  }
};

// ---- rows of edges, by a group of lanes -----------------------------------------------------------------------------
// Units of kBatch rows and what they are worth. Checked: rows may be missing, and are 0 then, as all are if not `live`.
template <class V, int E, bool Checked>
struct Batch {
  using A = Real<V>;
  Unit<V, E> units[kBatch];
  A weights[kBatch];

  __device__ __forceinline__ void load(const Edge<A>* edges, const char* rows, uint32_t row_bytes, bool live = true) {
    struct alignas(16) Pair {  // one instruction
      Edge<A> of[2];
    };
#pragma unroll
    for (int u = 0; u < kBatch; u += 2) {
      const Pair pair = *reinterpret_cast<const Pair*>(edges + u);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[u + i] = pair.of[i].weight;
        if (!Checked || (pair.of[i].row >= 0 && live))
          units[u + i].load(row_of(rows, pair.of[i].row, row_bytes));
        else
          units[u + i].clear();
      }
    }
  }
};

// acc += the sum of weight * row over a batch.
template <class V, int E, bool Checked>
__device__ __forceinline__ void add_rows(Real<V> (&acc)[E], const Edge<Real<V>>* edges, const char* rows, uint32_t row_bytes) {
  Batch<V, E, Checked> batch;
  batch.load(edges, rows, row_bytes);
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
    Real<V> f[E];
    batch.units[u].get(f);
#pragma unroll
    for (int i = 0; i < E; ++i) acc[i] += batch.weights[u] * f[i];
  }
}

// Of `count` edges the first `there` have a row.
template <class V, int E>
__device__ __forceinline__ void add_all_rows(Real<V> (&acc)[E], const Edge<Real<V>>* edges, int count, int there,
                                             const char* rows, uint32_t row_bytes) {
#pragma unroll 1
  for (; there >= kBatch; there -= kBatch, count -= kBatch, edges += kBatch)
    add_rows<V, E, false>(acc, edges, rows, row_bytes);
#pragma unroll 1
  for (; count > 0; count -= kBatch, edges += kBatch) add_rows<V, E, true>(acc, edges, rows, row_bytes);
}

}  // namespace dfn::gather
