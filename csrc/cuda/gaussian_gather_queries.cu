// Gaussian gather, backward by query: how the loss moves with each weight, from one read of the values; then all that is
// the query's own, and weight and slope of each edge for the pass by entity. Compiled, run in the tests' emulator, not yet
// run on a GPU; its prototype was.
#include "cuda/gaussian_gather_rows.h"

namespace dfn::gather {
namespace {

// U sums over the lanes of a group at once: each step halves lanes and sums together, as long as there are both. Afterwards
// lane l holds, first, the sum number l * U / lanes; then the next, where a lane keeps two (U = 8, 4 lanes).
template <class A, int U>
__device__ __forceinline__ void sum_over_group(A (&sums)[U], int l, int lanes) {
  int step = lanes / 2;
#pragma unroll
  for (int have = U; have > 1; have /= 2) {
    if (step == 0) break;
    const bool upper = l & step;
#pragma unroll
    for (int i = 0; i < have / 2; ++i) {
      const A kept = upper ? sums[i + have / 2] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAll, upper ? sums[i] : sums[i + have / 2], step);
    }
    step /= 2;
  }
  for (; step > 0; step /= 2) sums[0] += __shfl_xor_sync(kAll, sums[0], step);
}

// along[u] (+)= <gradient, row edges[u].row> for u < U. Lanes that are not live have no channel.
template <class V, int E, int U, bool Checked>
__device__ __forceinline__ void dot_rows(Real<V>* along, bool add, const Real<V> (&grad)[E], bool live, int l, int lanes,
                                         const Edge<Real<V>>* edges, const char* rows, uint32_t row_bytes) {
  using A = Real<V>;
  Unit<V, E> x[U];
  bool there[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int row = edges[u].row;
    there[u] = live && (!Checked || row >= 0);
    if (!Checked || row >= 0)
      x[u].load(rows + uint64_t{static_cast<uint32_t>(row)} * row_bytes);
    else
      x[u].clear();
  }
  A dots[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    A f[E], dot = 0;
    x[u].get(f);
#pragma unroll
    for (int i = 0; i < E; ++i) dot += grad[i] * f[i];
    dots[u] = there[u] ? dot : A(0);
  }
  sum_over_group(dots, l, lanes);
  if (lanes <= U || l % (lanes / U) == 0) {
    const int first = l * U / lanes;
    along[first] = add ? along[first] + dots[0] : dots[0];
    if (U > lanes) along[first + 1] = add ? along[first + 1] + dots[1] : dots[1];
  }
}

template <class V, int E>
__device__ __forceinline__ void dot_all_rows(Real<V>* along, bool add, const Real<V> (&grad)[E], bool live, int l, int lanes,
                                             const Edge<Real<V>>* edges, int count, bool all, const char* rows, uint32_t row_bytes) {
  int n = 0;
  if (all) {
    for (; n + 8 <= count; n += 8) dot_rows<V, E, 8, false>(along + n, add, grad, live, l, lanes, edges + n, rows, row_bytes);
    if (n + 4 <= count) dot_rows<V, E, 4, false>(along + n, add, grad, live, l, lanes, edges + n, rows, row_bytes), n += 4;
  }
  for (; n < count; n += 4) dot_rows<V, E, 4, true>(along + n, add, grad, live, l, lanes, edges + n, rows, row_bytes);
}

constexpr int kFewDims = 3;  // whose gradient a lane keeps in registers

template <class V, int E, bool Chunked>
__global__ void __launch_bounds__(32 * kWarps, Chunked || sizeof(V) == 8 ? 2 : 3)
    queries_kernel(const __grid_constant__ Problem g, const __grid_constant__ Shape t) {
  using A = Real<V>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = static_cast<int>(blockIdx.x / t.blocks);
  const int64_t first = (blockIdx.x % t.blocks * kWarps + warp) * t.queries;
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(ptx::shared_memory() + warp * t.warp_bytes);
  A* along = reinterpret_cast<A*>(edges + t.queries * t.stride);  // <gradient, value>; later the slope
  int* numbers = reinterpret_cast<int*>(along + t.queries * t.stride);

  const int mine = lane / t.width;
  Query<A> query(g, group, first + mine, lane % t.width, t.width, edges + mine * t.stride);
  if (query.lane == 0) numbers[mine] = query.m;
  if (Chunked && g.normalize) query.look_through(t);
  // Not before it is wanted: registers are few.
  const auto slope_of = [&](int n) -> Slope<A>& { return as<Slope<A>>(g.slopes)[(group * g.M + query.m) * g.k + n]; };
  const auto count_of = [&](int chunk) {
    const int left = static_cast<int>(g.k) - chunk * t.slots;
    return left < t.slots ? left : t.slots;
  };

  // Along: for all neighbours of a chunk.
  const int l = lane % t.lanes, groups = 32 / t.lanes;
  const uint32_t row_bytes = static_cast<uint32_t>(g.values.sN * sizeof(V));
  const auto dots = [&](int chunk, bool all) {
    for (int served = lane / t.lanes; served < t.queries; served += groups) {
      const int64_t m = numbers[served] < 0 ? 0 : numbers[served];
      for (int64_t c0 = 0; c0 < g.c; c0 += t.lanes * E) {
        const bool live = c0 + l * E < g.c;
        const int64_t channel = live ? c0 + l * E : 0;
        Unit<V, E> unit;
        unit.load(unit_of<V>(g.grad, group, g.H, channel) + m * g.grad.sN * sizeof(V));
        A grad[E];
        unit.get(grad);
        dot_all_rows<V, E>(along + served * t.stride, c0 > 0, grad, live, l, t.lanes, edges + served * t.stride, count_of(chunk),
                           all, unit_of<V>(g.values, group, g.H, channel), row_bytes);
      }
    }
    __syncwarp();
  };
  const bool has_slopes = g.grad.data != nullptr;  // else nothing but the values' gradient is wanted
  A* own = along + mine * t.stride;
  A mean = 0;  // <gradient, output>: what normalisation takes away
  const auto add_to_mean = [&](int chunk) {
    for (int s = query.lane; s < count_of(chunk); s += t.width)
      if (query.edges[s].row >= 0) mean += query.edges[s].weight * query.influence_of(query.edges[s].row) * own[s];
  };
  if (Chunked) {
    for (int chunk = 0; has_slopes && chunk < t.chunks; ++chunk) {
      dots(chunk, query.stage(t, chunk, false));
      add_to_mean(chunk);
      for (int s = query.lane; query.m >= 0 && s < count_of(chunk); s += t.width) slope_of(chunk * t.slots + s).slope = own[s];
    }
  } else {
    const bool all = query.stage(t, 0, false);
    if (has_slopes) {
      dots(0, all);
      add_to_mean(0);
    }
  }
  const A factor = query.factor();
  mean = g.normalize ? sum_over(mean, t.width) * factor : A(0);

  A grad_query[kFewDims] = {}, grad_sigma = 0;
  for (int chunk = 0; chunk < (Chunked ? t.chunks : 1); ++chunk) {
    if (Chunked) query.stage(t, chunk, false);
    for (int s = query.lane; query.m >= 0 && s < count_of(chunk); s += t.width) {
      const int n = chunk * t.slots + s, row = query.edges[s].row;
      const A rest = !has_slopes ? A(0) : (Chunked ? slope_of(n).slope : own[s]) - mean;
      const A weight = query.edges[s].weight * factor, slope = row < 0 ? A(0) : weight * rest;
      if (g.slopes) slope_of(n) = {weight, slope};
      if (!has_slopes || row < 0) continue;
      const A moved = slope * query.influence_of(row);  // by the exponent
      own[s] = moved;
      if (g.grad_queries && g.D <= kFewDims) {
        const A* p = query.positions + row * g.D;
#pragma unroll
        for (int a = 0; a < kFewDims; ++a)
          if (a < g.D) grad_query[a] += moved * (query.at[a] - p[a]);
      }
      if (g.grad_sigma_rows) grad_sigma += moved * query.exponent(query.sq_dist(n, row));
    }
    if (g.grad_queries && g.D > kFewDims) {  // a lane for each dimension
      __syncwarp();
      for (int served = 0; served < t.queries; ++served) {
        const int m = numbers[served];
        if (m < 0) continue;
        A* out = as<A>(g.grad_queries) + (group * g.M + m) * g.D;
        const A* q = as<const A>(g.queries) + (group * g.M + m) * g.D;
        for (int64_t a = lane; a < g.D; a += 32) {
          A sum = 0;
          for (int s = 0; s < count_of(chunk); ++s) {
            const int row = edges[served * t.stride + s].row;
            if (row >= 0) sum += along[served * t.stride + s] * (q[a] - as<const A>(g.positions)[(group * g.N + row) * g.D + a]);
          }
          sum *= -2 * query.scale;
          out[a] = chunk > 0 ? out[a] + sum : sum;
        }
      }
    }
  }
  if (g.grad_sigma_rows) {
    grad_sigma = sum_over(grad_sigma, t.width);
    const A sigma = width_of(as<const A>(g.sigma)[group % g.H]);
    if (query.lane == 0 && query.m >= 0) as<A>(g.grad_sigma_rows)[group * g.M + query.m] = grad_sigma * 2 / sigma;
  }
  if (g.grad_queries && g.D <= kFewDims) {
#pragma unroll
    for (int a = 0; a < kFewDims; ++a) {
      if (a >= g.D) break;
      const A sum = sum_over(grad_query[a], t.width);
      if (query.lane == 0 && query.m >= 0) as<A>(g.grad_queries)[(group * g.M + query.m) * g.D + a] = -2 * query.scale * sum;
    }
  }
}

}  // namespace

void backward_queries(const Problem& g) {
  for_dtype(g, [&](auto v, auto elements) {
    using V = decltype(v);
    using A = Real<V>;
    constexpr int E = decltype(elements)::value;
    const Shape t = shape_of<V, E>(g, sizeof(Edge<A>) + sizeof(A), sizeof(int));
    launch("gaussian_gather", t.chunks > 1 ? queries_kernel<V, E, true> : queries_kernel<V, E, false>,
           Grid{g.B * g.H * t.blocks, 32 * kWarps, static_cast<size_t>(kWarps) * t.warp_bytes, g.stream}, g, t);
  });
}

}  // namespace dfn::gather
