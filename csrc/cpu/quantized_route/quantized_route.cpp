// dfn_cpu::quantized_route: int8 tokens times prepacked int8 patterns.
// dfn_cpu::quantized_low_rank: selector, softmax and low-rank patterns in one pass over the tokens.
#include "cpu/quantized_route/quantized_route.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/tensors.h"

namespace dfn {
namespace {

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
  Tensor tokens = allocate(x, {panels, g.quads, g.panel, 4}, ScalarType::Byte);
  Tensor token_scales = allocate(x, {g.T});
  Tensor out = allocate(x, {g.T, g.O});
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

// ---- low rank -------------------------------------------------------------------------------------------------------
// An int8 matrix [O, I] as one packed pattern.
struct Int8Matrix {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int64_t O, I;
};

Int8Matrix matrix(const Tensor& values, const Tensor& scales, const Tensor& sums, int64_t O, int64_t I, const char* name) {
  const int64_t strips = (O + QuantizedProblem::kStrip - 1) / QuantizedProblem::kStrip;
  STD_TORCH_CHECK(I <= 65536, name, ": at most 65,536 columns, or the int32 sums overflow");
  check_dense(values, name, ScalarType::Char, {1, strips, (I + 3) / 4, QuantizedProblem::kStrip, 4});
  check_dense(scales, name, ScalarType::Float, {1, O});
  check_dense(sums, name, ScalarType::Int, {1, O});
  return {static_cast<const int8_t*>(values.data_ptr()), static_cast<const float*>(scales.data_ptr()),
          static_cast<const int32_t*>(sums.data_ptr()), O, I};
}

// Space for one task, of up to `tokens` tokens.
struct Scratch {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
};

// out [T, O] = x [T, I] times the matrix, on this thread.
void multiply(const Int8Matrix& m, int64_t T, const float* x, const float* bias, float* out, bool vnni, Scratch& space) {
  QuantizedProblem g = {};
  g.T = T, g.P = 1, g.O = m.O, g.I = m.I, g.quads = (m.I + 3) / 4;
  g.panel = T <= 1 ? 1 : T <= 2 ? 2 : T <= 4 ? 4 : T <= 8 ? 8 : 14;
  const int64_t panels = (T + g.panel - 1) / g.panel, strips = (m.O + QuantizedProblem::kStrip - 1) / QuantizedProblem::kStrip;
  space.bytes.resize(panels * g.quads * g.panel * 4);
  space.scales.resize(T);
  g.vnni = vnni, g.x = x, g.patterns = m.values, g.scales = m.scales, g.sums = m.sums, g.bias = bias;
  g.tokens = space.bytes.data(), g.token_scales = space.scales.data(), g.out = out;
  DFN_CALL_ISA(quantize_tokens, g, 0, panels);
  DFN_CALL_ISA(quantized_route, g, 0, strips, 0, panels);
}

// One row of down's result: P * r inner values, then P logits. Turns the logits into weights, the values into weighted ones.
void mix(float* inner, int64_t P, int64_t r, const float* selector_bias, float* weights) {
  const float* logits = inner + P * r;
  float largest = -INFINITY, total = 0;
  for (int64_t p = 0; p < P; ++p) largest = std::max(largest, weights[p] = logits[p] + selector_bias[p]);
  for (int64_t p = 0; p < P; ++p) total += weights[p] = std::exp(weights[p] - largest);
  for (int64_t p = 0; p < P; ++p) weights[p] /= total;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t i = 0; i < r; ++i) inner[p * r + i] *= weights[p];
}

std::tuple<Tensor, Tensor> low_rank(const Tensor& x, const Tensor& down, const Tensor& down_scales, const Tensor& down_sums,
                                    const Tensor& selector_bias, const Tensor& up, const Tensor& up_scales,
                                    const Tensor& up_sums, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && selector_bias.dim() == 1 && down_scales.dim() == 2 && up_scales.dim() == 2,
                  "expected x [T, I], selector_bias [P] and scales [1, rows]");
  const int64_t T = x.size(0), I = x.size(1), P = selector_bias.size(0), O = up_scales.size(1);
  const int64_t rows = down_scales.size(1), r = P > 0 ? rows / P - 1 : 0;
  STD_TORCH_CHECK(P > 0 && r > 0 && rows == P * (r + 1), "down: expected P * r rows and the selector's P");
  check_dense(x, "x", ScalarType::Float, {T, I});
  check_dense(selector_bias, "selector_bias", ScalarType::Float, {P});
  if (bias) check_dense(*bias, "bias", ScalarType::Float, {O});
  const Int8Matrix first = matrix(down, down_scales, down_sums, rows, I, "down");
  const Int8Matrix second = matrix(up, up_scales, up_sums, O, P * r, "up");
  Tensor out = allocate(x, {T, O});
  Tensor weights = allocate(x, {T, P});
  const float* features = static_cast<const float*>(x.data_ptr());
  const float* shift = static_cast<const float*>(selector_bias.data_ptr());
  const float* plus = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  float *result = static_cast<float*>(out.data_ptr()), *w = static_cast<float*>(weights.data_ptr());
  const bool vnni = multiplies_quads_of_bytes();
  constexpr int64_t kTokens = 56;  // four panels
  const int64_t tasks = (T + kTokens - 1) / kTokens;
  parallel_for(0, tasks, grain_size(std::min(T, kTokens) * (rows * I + O * P * r) / 64), [&](int64_t begin, int64_t end) {
    Scratch space;
    std::vector<float> inner(std::min(T, kTokens) * rows), packed(std::min(T, kTokens) * P * r);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task * kTokens, count = std::min(T - t0, kTokens);
      multiply(first, count, features + t0 * I, nullptr, inner.data(), vnni, space);
      for (int64_t t = 0; t < count; ++t) {
        mix(inner.data() + t * rows, P, r, shift, w + (t0 + t) * P);
        std::copy_n(inner.data() + t * rows, P * r, packed.data() + t * P * r);
      }
      multiply(second, count, packed.data(), plus, result + t0 * O, vnni, space);
    }
  });
  return {out, weights};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("quantized_route(Tensor x, Tensor weights, Tensor patterns, Tensor scales, Tensor sums, Tensor? bias) -> Tensor");
  m.def(
      "quantized_low_rank(Tensor x, Tensor down, Tensor down_scales, Tensor down_sums, Tensor selector_bias, Tensor up, "
      "Tensor up_scales, Tensor up_sums, Tensor? bias) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("quantized_route", TORCH_BOX(&dfn::forward));
  m.impl("quantized_low_rank", TORCH_BOX(&dfn::low_rank));
}
