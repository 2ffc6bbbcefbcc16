// dfn_cuda::route_tokens, scale_rows, combine_products: from torch's tensors to the kernels of pattern_route. What they
// compute: pattern_route.h. What is left to PyTorch's own products: dfn_kernels/cuda/pattern_route.py.
#include "cuda/pattern_route.h"

#include <optional>
#include <tuple>

#include "common/tensors.h"
#include "cuda/device.h"

namespace dfn::route {
namespace {

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

ScalarType real_of(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

void check_rows(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, name, ": expected a dense last dimension");
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// y [T, N] and, where x is given (the backward pass), what each column of tiles adds to the gradient of the weights.
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
  const ScalarType real = real_of(g.dtype);
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

  Tensor y = allocate(g.wide ? weights : left, {g.T, g.N});
  g.y = y.data_ptr();
  if (g.T * g.N == 0) return {y, new_zeros(weights, {g.backward ? 1 : 0, g.T, g.P})};
  const Kernel kernel = kernel_for(g);
  const Plan plan = kernel.plan(g);
  // Every place is written, but for patterns that a tile's list leaves out, or if there is nothing to sum.
  const bool all_written = !order && g.K > 0;
  const int64_t part_columns = g.backward ? plan.part_columns : 0;
  Tensor parts = all_written ? allocate(weights, {part_columns, g.T, g.P}) : new_zeros(weights, {part_columns, g.T, g.P});
  g.parts = static_cast<float*>(parts.data_ptr());
  Tensor workspace = allocate(weights, {plan.splits > 1 ? plan.splits : 0, g.T, g.N});
  g.workspace = static_cast<float*>(workspace.data_ptr());
  kernel.run(g, plan);
  return {y, parts};
}

Tensor scale_rows_of(const Tensor& rows, const Tensor& weights) {  // [T, E], [T, P] -> [T, P, E]
  const OnDevice device(rows);
  Scaling g = {};
  STD_TORCH_CHECK(rows.dim() == 2 && weights.dim() == 2, "expected rows [T, E] and weights [T, P]");
  g.dtype = dtype_of(rows);
  g.T = rows.size(0), g.P = weights.size(1), g.E = rows.size(1);
  check_shape(weights, "weights", {g.T, g.P});
  STD_TORCH_CHECK(weights.scalar_type() == real_of(g.dtype), "weights: unexpected dtype");
  check_rows(rows, "rows");
  check_rows(weights, "weights");
  Tensor out = allocate(rows, {g.T, g.P, g.E});
  if (out.numel() == 0) return out;
  g.stream = device.stream();
  g.rows = rows.data_ptr(), g.rows_stride = rows.stride(0);
  g.weights = weights.data_ptr(), g.weights_stride = weights.stride(0);
  g.out = out.data_ptr();
  scale_rows(g);
  return out;
}

// Fills y and, where x is given (the backward pass), what each strip of columns adds to the gradient of the weights.
void combine_products_of(const Tensor& sums, const Tensor& weights, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& x, Tensor y, std::optional<Tensor> parts) {
  const OnDevice device(sums);
  Combination g = {};
  STD_TORCH_CHECK(sums.dim() == 3, "expected sums [P, T, N]");
  g.P = sums.size(0), g.T = sums.size(1), g.N = sums.size(2);
  g.dtype = dtype_of(y);
  const ScalarType real = sums.scalar_type();
  STD_TORCH_CHECK(real == real_of(g.dtype), "sums: expected float32, or float64 with float64");
  STD_TORCH_CHECK(x.has_value() == parts.has_value(), "x and parts belong together");
  check_dense(sums, "sums", real, {g.P, g.T, g.N});
  check_dense(weights, "weights", real, {g.T, g.P});
  check_dense(y, "y", y.scalar_type(), {g.T, g.N});
  if (bias) check_dense(*bias, "bias", real, {g.N});
  if (x) {
    check_shape(*x, "x", {g.T, g.N});
    check_rows(*x, "x");
    STD_TORCH_CHECK(y.scalar_type() == x->scalar_type(), "y: expected the dtype of x");
    check_shape(*parts, "parts", {(g.N + kStrip - 1) / kStrip, g.T, g.P});
    STD_TORCH_CHECK(parts->scalar_type() == real, "parts: unexpected dtype");
    STD_TORCH_CHECK(parts->numel() == 0 || g.P == 1 || parts->stride(2) == 1, "parts: expected a dense last dimension");
    STD_TORCH_CHECK(parts->numel() == 0 || g.T == 1 || parts->stride(1) == g.P, "parts: expected rows that follow each other");
  }
  if (g.T * g.N == 0) return;
  g.stream = device.stream();
  g.sums = sums.data_ptr(), g.weights = weights.data_ptr();
  g.bias = bias ? bias->data_ptr() : nullptr;
  g.y = y.data_ptr();
  if (x) {
    g.x = x->data_ptr(), g.x_stride = x->stride(0);
    g.parts = parts->data_ptr(), g.parts_stride = parts->stride(0);
  }
  combine_products(g);
}

}  // namespace
}  // namespace dfn::route

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cuda, m) {
  m.def("route_tokens(Tensor left, Tensor weights, Tensor patterns, Tensor? bias, Tensor? x, Tensor? order, "
        "Tensor? tile_patterns, Tensor? tile_counts, bool wide) -> (Tensor, Tensor)");
  m.def("scale_rows(Tensor rows, Tensor weights) -> Tensor");
  m.def("combine_products(Tensor sums, Tensor weights, Tensor? bias, Tensor? x, Tensor(a!) y, Tensor(b!)? parts) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cuda, DFN_DEVICE, m) {
  m.impl("route_tokens", TORCH_BOX(&dfn::route::route_tokens));
  m.impl("scale_rows", TORCH_BOX(&dfn::route::scale_rows_of));
  m.impl("combine_products", TORCH_BOX(&dfn::route::combine_products_of));
}
