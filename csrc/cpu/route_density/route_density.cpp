// dfn_cpu::pattern_route_density and its backward: the mixed matrix exists only as a few registers per token.
#include "cpu/route_density/route_density.h"

#include <algorithm>
#include <tuple>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

DensityProblem describe(const Tensor& x, const Tensor& weights, const Tensor& patterns, const Tensor& threshold) {
  DensityProblem g = {};
  STD_TORCH_CHECK(x.dim() == 2 && patterns.dim() == 3, "expected x [T, I] and patterns [P, O, I]");
  g.T = x.size(0), g.I = x.size(1), g.P = patterns.size(0), g.O = patterns.size(1);
  g.dtype = dtype_of(x);
  STD_TORCH_CHECK(g.dtype == Dtype::f32 || g.dtype == Dtype::f64, "x: expected float32 or float64");
  check_dense(x, "x", x.scalar_type(), {g.T, g.I});
  check_dense(weights, "weights", x.scalar_type(), {g.T, g.P});
  check_dense(patterns, "patterns", x.scalar_type(), {g.P, g.O, g.I});
  check_dense(threshold, "threshold", x.scalar_type(), {g.T});
  g.x = x.data_ptr();
  g.weights = weights.data_ptr();
  g.patterns = patterns.data_ptr();
  g.threshold = threshold.data_ptr();
  return g;
}

// Blocks of tokens: as many as there are threads, but not so large that their x leaves the cache.
template <class Block>
void for_blocks_of_tokens(const DensityProblem& g, Block block) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t size = std::clamp<int64_t>((g.T + threads - 1) / threads, 4, 64);
  parallel_for(0, (g.T + size - 1) / size, grain_size(size * g.O * g.I / 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) block(i * size, std::min(g.T, (i + 1) * size));
  });
}

// -> out [T, O], kept [T]
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weights, const Tensor& patterns,
                                   const Tensor& threshold, const std::optional<Tensor>& bias) {
  DensityProblem g = describe(x, weights, patterns, threshold);
  if (bias) check_dense(*bias, "bias", x.scalar_type(), {g.O});
  g.bias = bias ? bias->data_ptr() : nullptr;
  Tensor out = allocate(x, {g.T, g.O});
  Tensor kept = allocate(x, {g.T}, ScalarType::Long);
  g.out = out.data_ptr();
  g.kept = static_cast<int64_t*>(kept.data_ptr());
  for_blocks_of_tokens(g, [&](int64_t begin, int64_t end) { DFN_CALL_ISA(density_forward, g, begin, end); });
  return {out, kept};
}

// -> gradients of x, weights, patterns; the threshold counts as constant
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                            const Tensor& patterns, const Tensor& threshold) {
  DensityProblem g = describe(x, weights, patterns, threshold);
  check_dense(grad, "grad", x.scalar_type(), {g.T, g.O});
  g.grad = grad.data_ptr();
  Tensor grad_x = allocate(x, {g.T, g.I}), grad_weights = allocate(x, {g.T, g.P});
  Tensor grad_patterns = allocate(x, {g.P, g.O, g.I});
  g.grad_x = grad_x.data_ptr();
  g.grad_weights = grad_weights.data_ptr();
  g.grad_patterns = grad_patterns.data_ptr();
  for_blocks_of_tokens(g, [&](int64_t begin, int64_t end) { DFN_CALL_ISA(density_backward_tokens, g, begin, end); });
  parallel_for(0, g.O, grain_size(g.T * g.I),
               [&](int64_t begin, int64_t end) { DFN_CALL_ISA(density_backward_patterns, g, begin, end); });
  return {grad_x, grad_weights, grad_patterns};
}

Tensor magnitude_above(const Tensor& mixed, int64_t keep) {  // [T, S] -> [T]
  STD_TORCH_CHECK(mixed.dim() == 2, "mixed: expected 2 dimensions");
  const int64_t T = mixed.size(0), S = mixed.size(1);
  check_dense(mixed, "mixed", mixed.scalar_type(), {T, S});
  const Dtype dtype = dtype_of(mixed);
  STD_TORCH_CHECK(dtype == Dtype::f32 || dtype == Dtype::f64, "mixed: expected float32 or float64");
  STD_TORCH_CHECK(keep >= 0 && keep < S, "keep: out of range");
  Tensor out = allocate(mixed, {T});
  parallel_for(0, T, grain_size(8 * S), [&](int64_t begin, int64_t end) {
    DFN_CALL_ISA(magnitude_above, dtype, mixed.data_ptr(), S, keep, begin, end, out.data_ptr());
  });
  return out;
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("pattern_route_density(Tensor x, Tensor weights, Tensor patterns, Tensor threshold, Tensor? bias) "
        "-> (Tensor, Tensor)");
  m.def("magnitude_above(Tensor mixed, int keep) -> Tensor");
  m.def("pattern_route_density_backward(Tensor grad, Tensor x, Tensor weights, Tensor patterns, Tensor threshold) "
        "-> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("pattern_route_density", TORCH_BOX(&dfn::forward));
  m.impl("magnitude_above", TORCH_BOX(&dfn::magnitude_above));
  m.impl("pattern_route_density_backward", TORCH_BOX(&dfn::backward));
}
