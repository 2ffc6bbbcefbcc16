// dfn_cpu::quantized_route: int8 tokens times prepacked int8 patterns.
#include "cpu/quantized_route.h"

#include <algorithm>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr int64_t kPanelsPerTask = 36;

bool multiplies_quads_of_bytes() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has && cpu_isa() == Isa::avx512;
#else
  return false;
#endif
}

Tensor forward(const Tensor& x, const Tensor& weights, const Tensor& patterns, const Tensor& scales, const Tensor& sums,
               const std::optional<Tensor>& bias) {
  QuantizedProblem g = {};
  STD_TORCH_CHECK(x.dim() == 2 && scales.dim() == 2, "expected x [T, I] and scales [P, O]");
  g.T = x.size(0), g.I = x.size(1), g.P = scales.size(0), g.O = scales.size(1), g.quads = (g.I + 3) / 4;
  STD_TORCH_CHECK(g.I <= 65536, "x: at most 65,536 features, or the int32 sums overflow");
  const int64_t strips = (g.O + QuantizedProblem::kStrip - 1) / QuantizedProblem::kStrip;
  check_dense(x, "x", ScalarType::Float, {g.T, g.I});
  check_dense(weights, "weights", ScalarType::Float, {g.T, g.P});
  check_dense(patterns, "patterns", ScalarType::Char, {g.P, strips, g.quads, QuantizedProblem::kStrip, 4});
  check_dense(scales, "scales", ScalarType::Float, {g.P, g.O});
  check_dense(sums, "sums", ScalarType::Int, {g.P, g.O});
  if (bias) check_dense(*bias, "bias", ScalarType::Float, {g.O});
  g.panel = g.T <= 1 ? 1 : g.T <= 2 ? 2 : g.T <= 4 ? 4 : g.T <= 8 ? 8 : 14;
  const int64_t panels = (g.T + g.panel - 1) / g.panel;
  Tensor tokens = new_empty(x, {panels, g.quads, g.panel, 4}, ScalarType::Byte);
  Tensor token_scales = new_empty(x, {g.T});
  Tensor out = new_empty(x, {g.T, g.O});
  g.vnni = multiplies_quads_of_bytes();
  g.x = static_cast<const float*>(x.data_ptr());
  g.weights = static_cast<const float*>(weights.data_ptr());
  g.patterns = static_cast<const int8_t*>(patterns.data_ptr());
  g.scales = static_cast<const float*>(scales.data_ptr());
  g.sums = static_cast<const int32_t*>(sums.data_ptr());
  g.bias = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  g.tokens = static_cast<uint8_t*>(tokens.data_ptr());
  g.token_scales = static_cast<float*>(token_scales.data_ptr());
  g.out = static_cast<float*>(out.data_ptr());
  parallel_for(0, panels, grain_size(2 * g.panel * g.I),
               [&](int64_t begin, int64_t end) { DFN_CALL_ISA(quantize_tokens, g, begin, end); });
  const int64_t groups = (panels + kPanelsPerTask - 1) / kPanelsPerTask;
  const int64_t work = std::min(panels, kPanelsPerTask) * g.panel * g.P * g.I * QuantizedProblem::kStrip / 64;
  parallel_for(0, groups * strips, grain_size(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / strips * kPanelsPerTask, last = std::min(panels, first + kPanelsPerTask);
      DFN_CALL_ISA(quantized_route, g, i % strips, i % strips + 1, first, last);
    }
  });
  return out;
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("quantized_route(Tensor x, Tensor weights, Tensor patterns, Tensor scales, Tensor sums, Tensor? bias) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) { m.impl("quantized_route", TORCH_BOX(&dfn::forward)); }
