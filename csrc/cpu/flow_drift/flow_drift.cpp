// dfn_cpu::flow_drift and its backward.
#include "cpu/flow_drift/flow_drift.h"

#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/common/memory.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kMaxChunks = 64;  // partial sums of the gradient to the weight; also what threads can share out

DriftProblem describe(const Tensor& states, const Tensor& weight, const Tensor& alpha) {
  DriftProblem g = {};
  STD_TORCH_CHECK(states.dim() == 3 && weight.dim() == 3, "states and weight: expected 3 dimensions");
  g.B = states.size(0), g.N = states.size(1), g.d = states.size(2);
  g.H = weight.size(0), g.D = weight.size(1);
  g.dtype = dtype_of(states);
  g.accumulate = dtype_of(weight);
  STD_TORCH_CHECK(g.accumulate == (g.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
                  "weight: expected float64 with float64 states, else float32");
  check_dense(weight, "weight", weight.scalar_type(), {g.H, g.D, g.d});
  check_dense(alpha, "alpha", weight.scalar_type(), {g.H});
  g.states = rows_of(states, "states");
  g.weight = weight.data_ptr();
  g.alpha = alpha.data_ptr();
  return g;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& states, const Tensor& positions, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& alpha) {
  DriftProblem g = describe(states, weight, alpha);
  const auto real = weight.scalar_type();
  check_dense(positions, "positions", real, {g.B, g.H, g.N, g.D});
  if (bias) check_dense(*bias, "bias", real, {g.H, g.D});
  Tensor out_positions = allocate(positions, {g.B, g.H, g.N, g.D});
  Tensor flow = allocate(positions, {g.B, g.H, g.N, g.D});
  Tensor energy = allocate(positions, {g.B, g.H, g.N});
  g.positions = positions.data_ptr();
  g.bias = bias ? bias->data_ptr() : nullptr;
  g.out_positions = out_positions.data_ptr();
  g.flow = flow.data_ptr();
  g.out_energy = energy.data_ptr();
  parallel_for(0, g.B * g.N, grain_size(g.H * g.D * g.d / 4), [&](int64_t begin, int64_t end) {
    DFN_CALL_ISA(drift_forward, g, begin, end);
  });
  return {out_positions, flow, energy};
}

Tensor sum_chunks(const Tensor& parts) {
  const std::vector<int64_t> first = {0};
  return torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(first));
}

// -> grad_states, grad_weight, grad_bias, grad_alpha
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_positions, const Tensor& grad_flow,
                                                    const Tensor& grad_energy, const Tensor& states,
                                                    const Tensor& weight, const Tensor& alpha, const Tensor& flow) {
  DriftProblem g = describe(states, weight, alpha);
  const auto real = weight.scalar_type();
  check_dense(grad_positions, "grad_positions", real, {g.B, g.H, g.N, g.D});
  check_dense(grad_flow, "grad_flow", real, {g.B, g.H, g.N, g.D});
  check_dense(grad_energy, "grad_energy", real, {g.B, g.H, g.N});
  check_dense(flow, "flow", real, {g.B, g.H, g.N, g.D});
  const int64_t rows = g.B * g.N;
  g.chunk = rows / kMaxChunks > 256 ? (rows + kMaxChunks - 1) / kMaxChunks : 256;
  const int64_t chunks = (rows + g.chunk - 1) / g.chunk;
  Tensor part_weight = allocate(weight, {chunks, g.H, g.D, g.d});
  Tensor part_bias = allocate(weight, {chunks, g.H, g.D});
  Tensor part_alpha = allocate(weight, {chunks, g.H});
  Tensor grad_states = allocate(states, {g.B, g.N, g.d});
  prefer_huge_pages(grad_states);
  g.grad_positions = grad_positions.data_ptr();
  g.grad_flow = grad_flow.data_ptr();
  g.grad_energy = grad_energy.data_ptr();
  g.flow = flow.data_ptr();
  g.grad_states = rows_of(grad_states, "grad_states");
  g.part_weight = part_weight.data_ptr();
  g.part_bias = part_bias.data_ptr();
  g.part_alpha = part_alpha.data_ptr();
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { DFN_CALL_ISA(drift_backward, g, begin, end); });
  return {grad_states, sum_chunks(part_weight), sum_chunks(part_bias), sum_chunks(part_alpha)};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("flow_drift(Tensor states, Tensor positions, Tensor weight, Tensor? bias, Tensor alpha) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("flow_drift_backward(Tensor grad_positions, Tensor grad_flow, Tensor grad_energy, Tensor states, "
        "Tensor weight, Tensor alpha, Tensor flow) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("flow_drift", TORCH_BOX(&dfn::forward));
  m.impl("flow_drift_backward", TORCH_BOX(&dfn::backward));
}
