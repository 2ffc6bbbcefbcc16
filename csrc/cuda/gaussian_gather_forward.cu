// Gaussian gather, forward. How a warp works: gaussian_gather_rows.h. Compiled, run in the tests' emulator, not yet run on
// a GPU; its prototype (one dtype, D = 3, k = 16) was.
#include "cuda/gaussian_gather_rows.h"

namespace dfn::gather {
namespace {

// Chunked: a query has more neighbours than there are slots, so weights are made where they are used.
template <class V, int E, bool Chunked>
__global__ void __launch_bounds__(32 * kWarps, Chunked ? 2 : E == 4 ? 3 : 4)
    forward_kernel(const __grid_constant__ Problem g, const __grid_constant__ Shape t) {
  using A = Real<V>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t group = blockIdx.x / t.blocks;
  const int64_t first = (blockIdx.x % t.blocks * kWarps + warp) * t.queries;
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(ptx::shared_memory() + warp * t.warp_bytes);
  A* factors = reinterpret_cast<A*>(edges + t.queries * t.stride);
  int* numbers = reinterpret_cast<int*>(factors + t.queries);

  const int mine = lane / t.width;
  Query<A> query(g, group, first + mine, lane % t.width, t.width, edges + mine * t.stride);
  bool all = false;
  if (!Chunked) all = query.stage(t, 0, true);
  if (Chunked && g.normalize) query.look_through(t);
  if (query.lane == 0) factors[mine] = query.factor(), numbers[mine] = query.m;
  __syncwarp();

  const uint32_t row_bytes = static_cast<uint32_t>(g.values.sN * sizeof(V));
  const int l = lane % t.lanes, groups = 32 / t.lanes;
  for (int served = lane / t.lanes; served < t.queries; served += groups) {
    const int m = numbers[served];
    for (int64_t c0 = 0; c0 < g.c; c0 += t.lanes * E) {
      const bool live = c0 + l * E < g.c;
      const int64_t channel = live ? c0 + l * E : 0;  // lanes beyond a row's end read along
      const char* rows = unit_of<V>(g.values, group, g.H, channel);
      A acc[E] = {};
      for (int chunk = 0; chunk < (Chunked ? t.chunks : 1); ++chunk) {
        if (Chunked) all = query.stage(t, chunk, true);
        const int left = static_cast<int>(g.k) - chunk * t.slots, count = left < t.slots ? left : t.slots;
        add_all_rows<V, E>(acc, edges + served * t.stride, count, all ? count : 0, rows, row_bytes);
      }
      const A factor = factors[served];
#pragma unroll
      for (int i = 0; i < E; ++i) acc[i] *= factor;
      if (m >= 0 && live) Unit<V, E>::store(unit_of<V>(g.out, group, g.H, channel) + m * g.out.sN * sizeof(V), acc);
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
    using A = Real<V>;
    constexpr int E = decltype(elements)::value;
    const Shape t = shape_of<V, E>(g, sizeof(Edge<A>), sizeof(A) + sizeof(int));
    launch("gaussian_gather", t.chunks > 1 ? forward_kernel<V, E, true> : forward_kernel<V, E, false>,
           Grid{g.B * g.H * t.blocks, 32 * kWarps, static_cast<size_t>(kWarps) * t.warp_bytes, g.stream}, g, t);
  });
}

}  // namespace dfn::gather
