// pattern_route on Hopper: who takes it, the choice of tiles, the launch. Device code: pattern_route_sm90_kernel.h.
// On an H200 forward 0.82 to 1.01 of the rate of cuBLAS's product of the same work, backward 0.75 to 0.79.
#include <algorithm>
#include <limits>

#include "cuda/launch.h"
#include "cuda/pattern_route.h"
#include "cuda/pattern_route_sm90_kernel.h"

namespace dfn::route {
namespace {

constexpr int64_t kLargest = 1 << 30;  // sizes and tiles are counted in 32 bits

int64_t ceil_div(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }
int64_t pairs_of_tiles(const Problem& g, int64_t width) {
  return ceil_div(g.T, sm90::kPair * sm90::kRows) * ceil_div(g.N, width);
}
int64_t clusters() { return std::max(1, multiprocessors() / sm90::kPair); }

struct Choice {
  int64_t width, splits;
};

// Columns of a tile, and how many blocks share one, each with some of the patterns. 192 columns feed the tensor cores
// better than 128, but more may be wasted: at the edge, and in the last round, when not all blocks have a tile; a small T
// leaves blocks without any, hence splits. The backward pass keeps x in registers too, where 192 leave no room.
// Counted in columns times depth that the busiest block multiplies. kSplitCost stands for writing and adding float32 sums
// and for one more launch, about 5 us. Derived, not measured.
Choice choose(const Problem& g) {
  constexpr int64_t kSplitCost = 128 * 1024;
  Choice best{128, 1};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t width : {192, 128}) {
    if (g.backward && width > 128) continue;
    const int64_t tiles = pairs_of_tiles(g, width);
    for (int64_t splits = 1; splits <= g.P && (splits == 1 || tiles * (splits - 1) < clusters()); ++splits) {
      const int64_t time = ceil_div(tiles * splits, clusters()) * ceil_div(g.P, splits) * width * g.K + (splits > 1) * kSplitCost;
      if (time < least) least = time, best = {width, splits};
    }
  }
  return best;
}

// TMA reads rows whose starts and distances are multiples of 16 bytes.
bool is_readable(const void* data, int64_t rows, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         (rows == 1 || (stride % 8 == 0 && stride >= width && stride < int64_t{1} << 38));
}

template <bool Backward, class V, int N>
void start(const Problem& g, const Plan& plan) {
  const int64_t O = Backward ? g.K : g.N, I = Backward ? g.N : g.K;
  // The stride of an axis of size 1 means nothing, but has to be a valid one.
  const int64_t left_stride = g.T > 1 ? g.left_stride : ceil_div(g.K, 8) * 8;
  const int64_t row_stride = O > 1 ? g.row_stride : ceil_div(I, 8) * 8;
  const int64_t pattern_stride = g.P > 1 ? g.pattern_stride : O * row_stride;
  const TensorMap tokens = make_tensor_map("pattern_route", g.dtype, g.left,
                                           {{g.K, 1, sm90::kDepth}, {g.T, left_stride, sm90::kRows}});
  // Half of a tile, what one block of a pair loads: N / 2 rows of 64 deep, or 64 rows of N / 2 columns
  const TensorMap patterns = make_tensor_map(
      "pattern_route", g.dtype, g.patterns,
      {{I, 1, sm90::kDepth}, {O, row_stride, Backward ? sm90::kDepth : N / sm90::kPair}, {g.P, pattern_stride, 1}});
  static_assert(!Backward || N / sm90::kPair == sm90::kDepth);
  const int64_t tiles = pairs_of_tiles(g, N) * plan.splits;
  launch("pattern_route", sm90::route_kernel<Backward, V, N>,
         Grid{std::min(tiles, clusters()) * sm90::kPair, sm90::kThreads, sizeof(sm90::Storage<N>), g.stream, sm90::kPair},
         tokens, patterns, g, plan);
  if (plan.splits > 1) add_splits(g, plan);
}

}  // namespace

bool takes_sm90(const Problem& g) {
  const int64_t O = g.backward ? g.K : g.N, I = g.backward ? g.N : g.K;
  const bool sizes = g.T > 0 && g.P > 0 && g.K > 0 && g.N > 0 && g.T < kLargest && g.P < kLargest && g.K < kLargest &&
                     g.N < kLargest && pairs_of_tiles(g, 128) < kLargest;
  return sizes && g.order == nullptr && (g.dtype == Dtype::f16 || g.dtype == Dtype::bf16) &&
         is_readable(g.left, g.T, g.left_stride, g.K) && is_readable(g.patterns, O, g.row_stride, I) &&
         is_readable(g.patterns, g.P, g.pattern_stride, (O - 1) * g.row_stride + I) && has_tma();
}

Plan plan_sm90(const Problem& g) {
  const Choice choice = choose(g);
  return {choice.splits, ceil_div(g.N, choice.width)};
}

void route_sm90(const Problem& g, const Plan& plan) {
  const bool bf16 = g.dtype == Dtype::bf16, wide = choose(g).width == 192;
  if (g.backward) bf16 ? start<true, __nv_bfloat16, 128>(g, plan) : start<true, __half, 128>(g, plan);
  else if (wide) bf16 ? start<false, __nv_bfloat16, 192>(g, plan) : start<false, __half, 192>(g, plan);
  else bf16 ? start<false, __nv_bfloat16, 128>(g, plan) : start<false, __half, 128>(g, plan);
}

}  // namespace dfn::route
