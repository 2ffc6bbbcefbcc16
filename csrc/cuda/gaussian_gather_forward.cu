// Gaussian gather, forward. How a warp works: gaussian_gather_weights.h.
#include "cuda/gaussian_gather_weights.h"

namespace dfn::gather {
namespace {

// Chunked: a query has more neighbours than there are slots, so weights are made where they are used.
template <class V, int E, int S, bool Chunked>
__global__ void __launch_bounds__(32 * kWarps, sizeof(V) == 8 ? (S == 4 ? 1 : 2) : Chunked ? 2 : 4)
    forward_kernel(const __grid_constant__ Problem g, const __grid_constant__ Shape t) {
  using A = Real<V>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Group group(g, blockIdx.x / t.blocks);
  const unsigned block = blockIdx.x - group.number * t.blocks;
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(ptx::shared_memory() + warp * t.warp_bytes);
  Query<A, S> query(g, t, group, lane & (t.width - 1), edges + (lane >> t.width_bits) * t.stride);
  const int own = lane & (t.lanes - 1), groups = 32 >> t.lane_bits, c = static_cast<int>(g.c), k = static_cast<int>(g.k);
  // A lane beyond the end of a row reads along, the row's last unit.
  const auto channel_of = [&](int c0) { return c0 + own * E < c ? c0 + own * E : c - E; };
  const char* values = group.rows<V>(g.values);
  const char* first_rows = ptx::as_one(values + channel_of(0) * int{sizeof(V)});
  char* out = group.rows<V>(g.out) + own * E * int{sizeof(V)};
  query.prepare(block * t.turns * kWarps + warp);
  for (int turn = 0; turn < t.turns; ++turn) {
    if (!query.take((block * t.turns + turn) * kWarps + warp)) return;
    bool all = false;
    if (!Chunked) all = query.stage(0, true);
    if (Chunked && g.normalize) query.look_through();
    const A factor = query.factor();

    for (int served = lane >> t.lane_bits; served < t.queries; served += groups) {
      const int m = __shfl_sync(kAll, query.m, served << t.width_bits);
      const A scale = __shfl_sync(kAll, factor, served << t.width_bits);
      const char* rows = first_rows;
      for (int c0 = 0;;) {
        A acc[E] = {};
        for (int chunk = 0; chunk < (Chunked ? t.chunks : 1); ++chunk) {
          if (Chunked) all = query.stage(chunk, true);
          const int left = k - chunk * t.slots, count = Chunked && left > t.slots ? t.slots : left;
          add_all_rows<V, E>(acc, edges + served * t.stride, count, all ? count : 0, rows, t.value_bytes);
        }
#pragma unroll
        for (int i = 0; i < E; ++i) acc[i] *= scale;
        if (m >= 0 && c0 + own * E < c) Unit<V, E>::store(row_of(out + c0 * int{sizeof(V)}, m, t.out_bytes), acc);
        c0 += t.lanes * E;
        if (c0 >= c) break;
        rows = ptx::as_one(values + channel_of(c0) * int{sizeof(V)});
      }
    }
  }
}

}  // namespace

bool by_units(const Problem& g) {
  const int64_t size = g.dtype == Dtype::f64 ? 8 : g.dtype == Dtype::f32 ? 4 : 2;
  bool aligned = g.c * size % 16 == 0;
  for (const Rows& rows : {g.values, g.out, g.grad, g.grad_values})
    if (rows.data)
      aligned &= reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.sB * size % 16 == 0 && rows.sH * size % 16 == 0 &&
                 rows.sN * size % 16 == 0;
  return aligned;
}

void forward(const Problem& g) {
  for_dtype(g, [&](auto v, auto elements) {
    using V = decltype(v);
    constexpr int E = decltype(elements)::value;
    const Shape t = shape_of<V, E>(g, [](const Shape&) { return 0; });
    for_share<kMostShare, E == 1>(t.slots / t.width, [&](auto share) {
      constexpr int S = decltype(share)::value;
      launch("gaussian_gather", t.chunks > 1 ? forward_kernel<V, E, S, true> : forward_kernel<V, E, S, false>,
             Grid{g.B * g.H * t.blocks, 32 * kWarps, static_cast<size_t>(kWarps) * t.warp_bytes, g.stream}, g, t);
    });
  });
}

}  // namespace dfn::gather
