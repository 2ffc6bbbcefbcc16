// Pattern routing on mma.sync: launches the kernels of pattern_route_sm80_kernel.h.
#include "cuda/pattern_route_sm80_kernel.h"

#include "cuda/launch.h"

namespace dfn::route {
namespace {

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The widest copy that every row starts at a multiple of.
int width_of(const void* data, int64_t stride, int64_t other_stride = 0) {
  const uint64_t places = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(2 * stride | 2 * other_stride);
  return places % 16 == 0 ? 16 : places % 8 == 0 ? 8 : places % 4 == 0 ? 4 : 2;
}

// body(a value of the operands' type, one of y's)
template <class Body>
void by_dtype(const Problem& g, Body body) {
  if (g.dtype == Dtype::bf16 && g.wide) body(__nv_bfloat16{}, float{});
  else if (g.dtype == Dtype::bf16) body(__nv_bfloat16{}, __nv_bfloat16{});
  else if (g.wide) body(__half{}, float{});
  else body(__half{}, __half{});
}

}  // namespace

// With fewer tiles than multiprocessors the patterns are divided. Counted in columns of K that the busiest multiprocessor
// multiplies: `split_cost` stands for writing and reading float32 sums, a second launch included. Not measured yet.
Plan plan_sm80(const Problem& g) {
  constexpr int64_t split_cost = 512, pattern_cost = 32;
  const int64_t blocks = tiles(g.T, sm80::kRows) * tiles(g.N, sm80::kColumns), processors = multiprocessors();
  Plan plan{1, tiles(g.N, sm80::kColumns)};
  int64_t least = INT64_MAX;
  for (int64_t splits = 1; splits <= g.P && (splits == 1 || blocks * (splits - 1) < processors); ++splits) {
    const int64_t patterns = tiles(blocks * splits, processors) * tiles(g.P, splits);  // of the busiest multiprocessor
    const int64_t cost = patterns * (g.K + pattern_cost) + (splits > 1 ? split_cost : 0);
    if (cost < least) least = cost, plan.splits = splits;
  }
  return plan;
}

void route_sm80(const Problem& g, const Plan& plan) {
  const sm80::Widths widths{width_of(g.left, g.left_stride), width_of(g.patterns, g.row_stride, g.pattern_stride)};
  const int64_t blocks = tiles(g.T, sm80::kRows) * tiles(g.N, sm80::kColumns) * plan.splits;
  const Grid grid{blocks, sm80::kThreads, sm80::kSharedBytes, g.stream};
  by_dtype(g, [&](auto v, auto y) {
    using V = decltype(v);
    using Y = decltype(y);
    if (!g.backward)
      launch("pattern_route", sm80::tokens_kernel<V, Y, false>, grid, g, plan, widths);
    else if constexpr (std::is_same_v<V, Y>)
      launch("pattern_route", sm80::tokens_kernel<V, V, true>, grid, g, plan, widths);
  });
  if (plan.splits > 1) add_splits(g, plan);
}

void add_splits(const Problem& g, const Plan& plan) {
  by_dtype(g, [&](auto, auto y) {
    const Grid grid{tiles(g.T * g.N, sm80::kThreads), sm80::kThreads, 0, g.stream};
    launch("pattern_route", sm80::add_splits_kernel<decltype(y)>, grid, g, plan);
  });
}

}  // namespace dfn::route
