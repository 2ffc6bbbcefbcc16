// What the kernels of gaussian_gather share: how a warp makes the weights of its queries, and how groups of its lanes add
// up rows of values. A warp takes `queries` queries. First its lanes, `width` for a query, make the weights of all their
// neighbours at once and leave them in shared memory. Then groups of `lanes` lanes, as many as a row has units, serve a
// query each; all rows of a batch are on their way before the first is used.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/gaussian_gather.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace dfn::gather {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 8;  // of a block

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

// ---- units: E values of a row, 16 bytes or one value ----------------------------------------------------------------
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
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
    union {
      uint4 words;
      V values[E];
    } both = {words};
#pragma unroll
    for (int i = 0; i < E; ++i) to[i] = widen(both.values[i]);
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
// Not to be contracted: the distances of a search, to the bit.
__device__ inline float plus_square(float sum, float x) { return __fadd_rn(sum, __fmul_rn(x, x)); }
__device__ inline double plus_square(double sum, double x) { return __dadd_rn(sum, __dmul_rn(x, x)); }

template <class A>
__device__ A sum_over(A x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
template <class A>
__device__ A least_of(A x, int width) {
  for (int step = width / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAll, x, step);
    x = other < x ? other : x;
  }
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

// ---- how a problem is shared out ------------------------------------------------------------------------------------
struct Shape {
  int lanes;    // of a group: 4 to 32
  int queries;  // of a warp
  int width;    // 32 / queries
  int slots;    // neighbours in shared memory, a multiple of 4
  int stride;   // of queries in shared memory, in neighbours: off by one, so that groups meet different banks
  int chunks;   // of a query's neighbours
  int warp_bytes;
  int64_t blocks;  // of a batch and head
};

inline int power_of_two(int64_t n, int low, int high) {
  int power = low;
  while (power < n && power < high) power *= 2;
  return power;
}

template <class V, int E>
Shape shape_of(const Problem& g, int bytes_per_slot, int bytes_per_query) {
  Shape t;
  t.lanes = power_of_two((g.c + E - 1) / E, 4, 32);
  const int at_once = 32 / power_of_two(g.k, 1, 32);
  t.queries = 32 / t.lanes > at_once ? 32 / t.lanes : at_once;
  t.width = 32 / t.queries;
  t.slots = static_cast<int>(g.k < kMostSlots ? (g.k + 3) / 4 * 4 : kMostSlots);
  t.stride = t.slots + 1;
  t.chunks = static_cast<int>((g.k + t.slots - 1) / t.slots);
  t.warp_bytes = (t.queries * (t.stride * bytes_per_slot + bytes_per_query) + 15) / 16 * 16;
  t.blocks = (g.M + kWarps * t.queries - 1) / (kWarps * t.queries);
  return t;
}

// Calls body with a value of the dtype and, as its second argument's type, the number of them in a unit.
template <int E>
struct Elements {
  static constexpr int value = E;
};
template <class Body>
void for_dtype(const Problem& g, Body body) {
  const auto call = [&](auto v) {
    if (by_units(g))
      body(v, Elements<kUnit<decltype(v)>>{});
    else
      body(v, Elements<1>{});
  };
  switch (g.dtype) {
    case Dtype::f16: return call(__half{});
    case Dtype::bf16: return call(__nv_bfloat16{});
    case Dtype::f32: return call(float{});
    case Dtype::f64: return call(double{});
  }
}

// ---- the weights of a query, by `width` lanes -----------------------------------------------------------------------
template <class A>
struct alignas(2 * sizeof(A)) Edge {
  A weight;  // or squared distance
  int row;   // of values; -1: no neighbour
};

template <class A>
struct Query {
  const Problem& g;
  const int64_t* indices;  // [k]
  const A* sq_dists;       // [k] or null
  const A* positions;      // [N, D]
  const A* influence;      // [N] or null
  const A* at;             // [D]
  Edge<A>* edges;          // in shared memory
  int m;                   // -1: none
  int lane, width;
  A scale;                 // 1 / (2 sigma^2)
  A least, total;          // of normalised weights: the least squared distance, the sum of the weights

  __device__ Query(const Problem& g, int64_t group, int64_t turn, int lane, int width, Edge<A>* edges)
      : g(g), edges(edges), lane(lane), width(width), least(0), total(1) {
    const int64_t list = group / g.H * g.list_heads + group % g.H % g.list_heads;
    m = turn >= g.M ? -1 : g.query_order ? g.query_order[list * g.M + turn] : static_cast<int>(turn);
    const int64_t row = m < 0 ? 0 : m;
    indices = g.indices + (list * g.M + row) * g.k;
    sq_dists = g.sq_dists ? as<const A>(g.sq_dists) + (group * g.M + row) * g.k : nullptr;
    positions = as<const A>(g.positions) + group * g.N * g.D;
    influence = g.influence ? as<const A>(g.influence) + group * g.N : nullptr;
    at = as<const A>(g.queries) + (group * g.M + row) * g.D;
    const A sigma = width_of(as<const A>(g.sigma)[group % g.H]);
    scale = A(0.5) / (sigma * sigma);
  }

  __device__ A sq_dist(int slot, int row) const {
    if (sq_dists) return sq_dists[slot];
    const A* p = positions + row * g.D;
    A sum = 0;
    for (int64_t a = 0; a < g.D; ++a) sum = plus_square(sum, at[a] - p[a]);
    return sum;
  }

  // What the weight is exp of, but for the sign.
  __device__ A exponent(A sq_dist) const {
    const A x = (sq_dist - least) * scale;
    return x > A(kFar) ? A(kFar) : x;
  }

  // Squared distances of the neighbours from n0 on, as many as there are slots; one that overflows is too far to be there.
  // The least goes to `nearest`; returns whether all are there.
  __device__ bool look_up(int n0, int slots, A& nearest) {
    bool all = true;
    for (int s = lane; s < slots; s += width) {
      const int n = n0 + s;
      const bool inside = m >= 0 && n < g.k;
      const int64_t index = inside ? indices[n] : -1;
      int row = static_cast<uint64_t>(index) < static_cast<uint64_t>(g.N) ? static_cast<int>(index) : -1;
      const A distance = row < 0 ? A(INFINITY) : sq_dist(n, row);
      if (distance == A(INFINITY)) row = -1;
      edges[s] = {distance, row};
      nearest = distance < nearest ? distance : nearest;
      all &= row >= 0 || n >= g.k;
    }
    return all;
  }

  __device__ A influence_of(int row) const { return influence ? influence[row] : A(1); }

  // From distances to weights, with influence or before it. Returns the lane's sum, with influence.
  __device__ A weigh(int slots, bool with_influence) {
    A sum = 0;
    for (int s = lane; s < slots; s += width) {
      const Edge<A> edge = edges[s];
      if (edge.row < 0) {
        edges[s].weight = 0;
        continue;
      }
      const A gauss = exponential(-exponent(edge.weight)), weight = gauss * influence_of(edge.row);
      edges[s].weight = with_influence ? weight : gauss;
      sum += weight;
    }
    return sum;
  }

  __device__ void set_least(A nearest) {
    nearest = least_of(nearest, width);
    least = nearest == A(INFINITY) ? A(0) : nearest;
  }

  // For normalised weights of more neighbours than there are slots: least and total of all.
  __device__ void look_through(const Shape& t) {
    A nearest = INFINITY, sum = 0;
    for (int chunk = 0; chunk < t.chunks; ++chunk) look_up(chunk * t.slots, t.slots, nearest);
    set_least(nearest);
    for (int chunk = 0; chunk < t.chunks; ++chunk) {
      look_up(chunk * t.slots, t.slots, nearest);
      sum += weigh(t.slots, true);
    }
    total = sum_over(sum, width);
  }

  // Weights of a chunk of neighbours, for the whole warp to read. Returns whether all are there, in all queries of the warp.
  __device__ bool stage(const Shape& t, int chunk, bool with_influence) {
    __syncwarp();
    A nearest = INFINITY;
    const bool all = look_up(chunk * t.slots, t.slots, nearest);
    const bool alone = g.normalize && t.chunks == 1;
    if (alone) set_least(nearest);
    const A sum = weigh(t.slots, with_influence);
    if (alone) total = sum_over(sum, width);
    const bool complete = __ballot_sync(kAll, all) == kAll;
    __syncwarp();  // a vote orders no memory
    return complete;
  }

  __device__ A factor() const { return !g.normalize ? A(1) : total != 0 ? 1 / total : A(0); }
};

// ---- sums of rows, by a group of lanes ------------------------------------------------------------------------------
// acc += the sum of edges[u].weight * row edges[u].row over u < U. Checked: rows may be missing.
template <class V, int E, int U, bool Checked>
__device__ __forceinline__ void add_rows(Real<V> (&acc)[E], const Edge<Real<V>>* edges, const char* rows, uint32_t row_bytes) {
  Unit<V, E> x[U];
  Real<V> weights[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const Edge<Real<V>> edge = edges[u];
    weights[u] = edge.weight;
    if (!Checked || edge.row >= 0)
      x[u].load(rows + uint64_t{static_cast<uint32_t>(edge.row)} * row_bytes);  // one instruction
    else
      x[u].clear();
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Real<V> f[E];
    x[u].get(f);
#pragma unroll
    for (int i = 0; i < E; ++i) acc[i] += weights[u] * f[i];
  }
}

// Of `count` edges the first `there` have a row.
template <class V, int E>
__device__ __forceinline__ void add_all_rows(Real<V> (&acc)[E], const Edge<Real<V>>* edges, int count, int there,
                                             const char* rows, uint32_t row_bytes) {
  int n = 0;
  for (; n + 8 <= there; n += 8) add_rows<V, E, 8, false>(acc, edges + n, rows, row_bytes);
  if (n + 4 <= there) add_rows<V, E, 4, false>(acc, edges + n, rows, row_bytes), n += 4;
  for (; n < count; n += 4) add_rows<V, E, 4, true>(acc, edges + n, rows, row_bytes);
}

// Where a lane's unit of the rows of a batch and head begins.
template <class V>
__device__ char* unit_of(const Rows& rows, int64_t group, int64_t H, int64_t channel) {
  return reinterpret_cast<char*>(static_cast<V*>(rows.data) + group / H * rows.sB + group % H * rows.sH + channel);
}

}  // namespace dfn::gather
