// dfn_cuda::route_tokens: from torch's tensors to the kernels of pattern_route. The formula: pattern_route.h. What is
// done here and what by PyTorch's own products: dfn_kernels/cuda/pattern_route.py. Compiled, but not yet run on a GPU.
#include "cuda/pattern_route.h"

#include <optional>
#include <tuple>

#include "common/tensors.h"
#include "cuda/device.h"

namespace dfn::route {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

struct Kernel {
  Plan (*plan)(const Problem&);
  void (*run)(const Problem&, const Plan&);
};

Kernel kernel_for(const Problem& g) {
  if (g.dtype == Dtype::f32 || g.dtype == Dtype::f64) return {plan_simple, route_simple};
  if (takes_sm90(g)) return {plan_sm90, route_sm90};
  return {plan_sm80, route_sm80};
}

void check_rows(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, name, ": expected a dense last dimension");
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// y [T, N] and, where x is given (the backward pass), the gradient of the weights.
std::tuple<Tensor, Tensor> route_tokens(const Tensor& left, const Tensor& weights, const Tensor& patterns,
                                        const std::optional<Tensor>& bias, const std::optional<Tensor>& x,
                                        const std::optional<Tensor>& order, const std::optional<Tensor>& tile_patterns,
                                        const std::optional<Tensor>& tile_counts, bool wide) {
  const OnDevice device(left);
  STD_TORCH_CHECK(left.dim() == 2 && patterns.dim() == 3, "expected left [T, K] and patterns [P, O, I]");
  Problem g = {};
  g.dtype = dtype_of(left);
  g.backward = x.has_value();
  const bool half = g.dtype == Dtype::f16 || g.dtype == Dtype::bf16;
  const ScalarType real = g.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  g.wide = wide && half;
  STD_TORCH_CHECK(!(g.wide && g.backward), "wide: the gradient of x has the dtype of x");
  g.T = left.size(0), g.K = left.size(1), g.P = patterns.size(0), g.N = patterns.size(g.backward ? 2 : 1);
  const int64_t limit = (int64_t{1} << 31) - 256;  // of a single size, so that the kernels' tiles fit into an int
  STD_TORCH_CHECK(g.T < limit && g.P < limit && g.K < limit && g.N < limit, "pattern_route: a size is above 2^31 - 256");

  STD_TORCH_CHECK(patterns.scalar_type() == left.scalar_type(), "patterns: expected the dtype of left");
  STD_TORCH_CHECK(patterns.size(g.backward ? 1 : 2) == g.K, "patterns: expected size ", g.K, " where left has it");
  check_dense(weights, "weights", real, {g.T, g.P});
  check_rows(left, "left");
  check_rows(patterns, "patterns");
  if (bias) check_dense(*bias, "bias", real, {g.N});
  if (x) {
    check_shape(*x, "x", {g.T, g.N});
    check_rows(*x, "x");
    STD_TORCH_CHECK(x->scalar_type() == left.scalar_type(), "x: expected the dtype of left");
  }
  const int64_t lists = (g.T + kTileRows - 1) / kTileRows;
  STD_TORCH_CHECK(order.has_value() == tile_patterns.has_value() && order.has_value() == tile_counts.has_value(),
                  "order, tile_patterns and tile_counts belong together");
  if (order) {
    check_dense(*order, "order", ScalarType::Long, {g.T});
    check_dense(*tile_patterns, "tile_patterns", ScalarType::Int, {lists, g.P});
    check_dense(*tile_counts, "tile_counts", ScalarType::Int, {lists});
  }

  g.stream = device.stream();
  g.left = left.data_ptr(), g.left_stride = left.stride(0);
  g.weights = static_cast<const float*>(weights.data_ptr());
  g.patterns = patterns.data_ptr(), g.pattern_stride = patterns.stride(0), g.row_stride = patterns.stride(1);
  g.bias = data<const float>(bias);
  if (x) g.x = x->data_ptr(), g.x_stride = x->stride(0);
  g.order = data<const int64_t>(order);
  g.tile_patterns = data<const int32_t>(tile_patterns);
  g.tile_counts = data<const int32_t>(tile_counts);

  Tensor y = new_empty(g.wide ? weights : left, {g.T, g.N});
  g.y = y.data_ptr();
  if (g.T * g.N == 0) return {y, new_zeros(weights, {g.backward ? g.T : 0, g.P})};
  const Kernel kernel = kernel_for(g);
  const Plan plan = kernel.plan(g);
  // Every place is written, but for patterns that a tile's list leaves out, or if there is nothing to sum.
  const bool all_written = !order && g.K > 0;
  const int64_t part_columns = g.backward ? plan.part_columns : 0;
  Tensor parts = all_written ? new_empty(weights, {part_columns, g.T, g.P}) : new_zeros(weights, {part_columns, g.T, g.P});
  g.parts = static_cast<float*>(parts.data_ptr());
  Tensor workspace = new_empty(weights, {plan.splits > 1 ? plan.splits : 0, g.T, g.N});
  g.workspace = static_cast<float*>(workspace.data_ptr());
  kernel.run(g, plan);
  if (!g.backward) return {y, parts};
  const int64_t over[] = {0};
  return {y, torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(over, 1))};
}

}  // namespace
}  // namespace dfn::route

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cuda, m) {
  m.def("route_tokens(Tensor left, Tensor weights, Tensor patterns, Tensor? bias, Tensor? x, Tensor? order, "
        "Tensor? tile_patterns, Tensor? tile_counts, bool wide) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cuda, DFN_DEVICE, m) { m.impl("route_tokens", TORCH_BOX(&dfn::route::route_tokens)); }
