// Gaussian gather, backward by query: how the loss moves with each weight, from one read of the values; then all that is
// the query's own, and weight and slope of each edge for the pass by entity.
#include "cuda/gaussian_gather_weights.h"

namespace dfn::gather {
namespace {

// kBatch sums over the lanes of a group at once: two steps halve lanes and sums together. Afterwards lane l holds a part of
// the sum number l / (lanes / kBatch).
template <class A>
__device__ __forceinline__ A part_of_sums(const A (&sums)[kBatch], unsigned l, unsigned lanes) {
  static_assert(kBatch == 4 && kFewDims == 3);
  const bool upper = l & (lanes / 2), odd = l & (lanes / 4);
  const A low = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(kAll, upper ? sums[0] : sums[2], lanes / 2);
  const A high = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(kAll, upper ? sums[1] : sums[3], lanes / 2);
  return (odd ? high : low) + __shfl_xor_sync(kAll, odd ? low : high, lanes / 4);
}

// parts (+)= those of <gradient, row edges[u].row>, for the edges of a batch.
template <class V, int E, bool Checked>
__device__ __forceinline__ void dot_rows(Real<V>* parts, bool add, const Real<V> (&grad)[E], bool live, int l, const Shape& t,
                                         const Edge<Real<V>>* edges, const char* rows) {
  using A = Real<V>;
  Batch<V, E, Checked> batch;
  batch.load(edges, rows, t.value_bytes, live);
  A dots[kBatch];
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
    A f[E];
    batch.units[u].get(f);
    dots[u] = grad[0] * f[0];
#pragma unroll
    for (int i = 1; i < E; ++i) dots[u] += grad[i] * f[i];
  }
  const A part = part_of_sums(dots, l, t.lanes);
  *parts = add ? *parts + part : part;
}

// Whole: no neighbour is missing, and no lane is beyond the end of a row.
template <class V, int E>
__device__ __forceinline__ void dot_all_rows(Real<V>* parts, bool add, const Real<V> (&grad)[E], bool live, int l, const Shape& t,
                                             const Edge<Real<V>>* edges, int count, bool whole, const char* rows) {
  if (whole)
#pragma unroll 1
    for (; count >= kBatch; count -= kBatch, edges += kBatch, parts += t.lanes)
      dot_rows<V, E, false>(parts, add, grad, live, l, t, edges, rows);
#pragma unroll 1
  for (; count > 0; count -= kBatch, edges += kBatch, parts += t.lanes)
    dot_rows<V, E, true>(parts, add, grad, live, l, t, edges, rows);
}

template <class V, int E, int S, bool Chunked>
__global__ void __launch_bounds__(32 * kWarps, sizeof(V) == 8 ? 1 : Chunked || S == 4 ? 2 : E == 1 ? 3 : 4)
    queries_kernel(const __grid_constant__ Problem g, const __grid_constant__ Shape t) {
  using A = Real<V>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Group group(g, blockIdx.x / t.blocks);
  const unsigned block = blockIdx.x - group.number * t.blocks;
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(ptx::shared_memory() + warp * t.warp_bytes);
  // <gradient, value> of each edge, in so many parts; later the slope
  A* along = reinterpret_cast<A*>(edges + t.queries * t.stride);
  const int parts = t.lanes / kBatch, along_stride = t.slots * parts;
  const int mine = lane >> t.width_bits;
  Query<A, S> query(g, t, group, lane & (t.width - 1), edges + mine * t.stride);
  A* own = along + mine * along_stride + query.lane * parts;
  const auto sum_of_parts = [&](int i) {
    A sum = own[i * t.width * parts];
#pragma unroll 1
    for (int p = 1; p < parts; ++p) sum += own[i * t.width * parts + p];
    return sum;
  };
  const int l = lane & (t.lanes - 1), groups = 32 >> t.lane_bits, c = static_cast<int>(g.c), k = query.k, D = query.D;
  const bool has_slopes = g.grad.data != nullptr;  // else nothing but the values' gradient is wanted

  // A lane beyond the end of a row does nothing, at the row's last unit.
  const auto channel_of = [&](int c0) { return c0 + l * E < c ? c0 + l * E : c - E; };
  const char *values = group.rows<V>(g.values), *grads = group.rows<V>(g.grad);
  const auto count_of = [&](int chunk) {
    const int left = k - chunk * t.slots;
    return Chunked && left > t.slots ? t.slots : left;
  };
  // Along: for all neighbours of a chunk.
  const auto dots = [&](int chunk, bool all) {
    for (int served = lane >> t.lane_bits; served < t.queries; served += groups) {
      const int m = __shfl_sync(kAll, query.m, served << t.width_bits);
      for (int c0 = 0; c0 < c; c0 += t.lanes * E) {
        const bool live = c0 + l * E < c;
        const int at = channel_of(c0) * int{sizeof(V)};
        Unit<V, E> unit;
        if (live)
          unit.load(row_of(grads + at, m < 0 ? 0 : m, t.grad_bytes));
        else
          unit.clear();
        A grad[E];
        unit.get(grad);
        dot_all_rows<V, E>(along + served * along_stride + l, c0 > 0, grad, live, l, t, edges + served * t.stride,
                           count_of(chunk), all && c0 + t.lanes * E <= c, ptx::as_one(values + at));
      }
    }
    __syncwarp();
  };

  Slope<A>* slopes = as<Slope<A>>(g.slopes) + group.number * g.M * g.k;
  A* grad_queries = as<A>(g.grad_queries) + group.number * g.M * g.D;
  const A by_sigma = 2 / width_of(as<const A>(g.sigma)[group.h]);
  const bool needs_away = g.grad_queries && D <= kFewDims;
  query.prepare(block * t.turns * kWarps + warp);
  for (int turn = 0; turn < t.turns; ++turn) {
    if (!query.take((block * t.turns + turn) * kWarps + warp)) return;
    const int m = query.m;
    const auto slope_of = [&](int n) -> Slope<A>& { return row_of(slopes, m, t.slope_bytes)[n]; };
    A mean = 0;  // <gradient, output>: what normalisation takes away
    A loss[S] = {};  // its derivative by the weight; what missing neighbours have there may be NaN
    const auto sum_up = [&] {
      query.recall();
#pragma unroll
      for (int i = 0; i < S; ++i) {
        loss[i] = query.row[i] < 0 ? A(0) : sum_of_parts(i);
        mean += query.weight[i] * query.influence[i] * loss[i];
      }
    };
    if (Chunked) {
      if (g.normalize) query.look_through();
      for (int chunk = 0; has_slopes && chunk < t.chunks; ++chunk) {
        dots(chunk, query.stage(chunk, false));
        sum_up();
#pragma unroll
        for (int i = 0; i < S; ++i) {
          const int n = chunk * t.slots + query.lane + i * t.width;
          if (query.inside(n)) slope_of(n).slope = loss[i];
        }
      }
    } else {
      const bool all = query.stage(0, false, needs_away);
      if (has_slopes) {
        dots(0, all);
        sum_up();
      }
    }
    const A factor = query.factor();
    mean = g.normalize ? sum_over(mean, t.width) * factor : A(0);

    A grad_query[kFewDims] = {}, grad_sigma = 0;
    for (int chunk = 0; chunk < (Chunked ? t.chunks : 1); ++chunk) {
      if (Chunked) query.stage(chunk, false, needs_away);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const int n = chunk * t.slots + query.lane + i * t.width;
        if (!query.inside(n)) continue;
        const bool there = query.row[i] >= 0;
        const A rest = (Chunked && has_slopes ? slope_of(n).slope : loss[i]) - mean;
        const A weight = query.weight[i] * factor, slope = there ? weight * rest : A(0);
        if (g.slopes) slope_of(n) = {weight, slope};
        if (!has_slopes || !there) continue;
        const A moved = slope * query.influence[i];  // by the exponent
        if (D > kFewDims) own[i * t.width * parts] = moved;
#pragma unroll
        for (int a = 0; a < kFewDims; ++a) grad_query[a] += moved * query.away[i][a];
        grad_sigma += moved * query.exponent[i];
      }
      if (g.grad_queries && D > kFewDims) {  // a lane for each dimension
        __syncwarp();
        for (int served = 0; served < t.queries; ++served) {
          const int number = __shfl_sync(kAll, m, served << t.width_bits);
          if (number < 0) continue;
          A* out = row_of(grad_queries, number, t.point_bytes);
          const A* q = row_of(query.queries, number, t.point_bytes);
          for (int a = lane; a < D; a += 32) {
            A sum = 0;
            for (int s = 0; s < count_of(chunk); ++s) {
              const int row = edges[served * t.stride + s].row;
              if (row >= 0) sum += along[served * along_stride + s * parts] * (q[a] - query.positions[row * g.D + a]);
            }
            sum *= -2 * query.scale;
            out[a] = chunk > 0 ? out[a] + sum : sum;
          }
        }
        __syncwarp();
      }
    }
    // A quarter of the lanes sums up and writes each.
    const A sums[] = {grad_query[0], grad_query[1], grad_query[2], grad_sigma};
    const A sum = sum_over<32 / kBatch>(part_of_sums(sums, query.lane, t.width), t.width / kBatch);
    const int which = query.lane >> (t.width_bits - 2);
    if (m < 0 || (query.lane & (t.width / kBatch - 1)) > 0) continue;
    if (which < kFewDims) {
      if (needs_away && which < D) row_of(grad_queries, m, t.point_bytes)[which] = -2 * query.scale * sum;
    } else if (g.grad_sigma_rows) {
      as<A>(g.grad_sigma_rows)[group.number * g.M + m] = sum * by_sigma;
    }
  }
}

}  // namespace

void backward_queries(const Problem& g) {
  for_dtype(g, [&](auto v, auto elements) {
    using V = decltype(v);
    using A = Real<V>;
    constexpr int E = decltype(elements)::value;
    const Shape t = shape_of<V, E>(g, [](const Shape& t) { return t.slots * t.lanes / kBatch * int{sizeof(A)}; });
    for_share<kMostShare, E == 1>(t.slots / t.width, [&](auto share) {
      constexpr int S = decltype(share)::value;
      launch("gaussian_gather", t.chunks > 1 ? queries_kernel<V, E, S, true> : queries_kernel<V, E, S, false>,
             Grid{g.B * g.H * t.blocks, 32 * kWarps, static_cast<size_t>(kWarps) * t.warp_bytes, g.stream}, g, t);
    });
  });
}

}  // namespace dfn::gather
