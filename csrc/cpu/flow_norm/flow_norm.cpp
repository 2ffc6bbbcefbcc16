// dfn_cpu::flow_norm and its backward. The sums over a sequence run here, one entity after the other in float64, so no
// later entity can change a bit of an earlier one; the passes over the states are the kernels'.
#include "cpu/flow_norm/flow_norm.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "common/tensors.h"
#include "cpu/common/memory.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

enum class Mode { mean, causal, entity };

Mode mode_of(const std::string& name) {
  STD_TORCH_CHECK(name == "mean" || name == "causal" || name == "entity", "mode: unknown: ", name);
  return name == "mean" ? Mode::mean : name == "causal" ? Mode::causal : Mode::entity;
}

int64_t length_of(const NormProblem& g, int64_t b) {
  if (g.lengths == nullptr || g.lengths[b] > g.N) return g.N;
  return g.lengths[b] > 0 ? g.lengths[b] : 0;
}

template <class A>
void fill_scale(const NormProblem& g, const A* energy, double eps, Mode mode, A* scale) {
  parallel_for(0, g.B, grain_size(4 * g.N), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A* e = energy + b * g.N;
      A* out = scale + b * g.N;
      const int64_t length = length_of(g, b);
      double running = 0;
      if (mode == Mode::mean) {
        for (int64_t i = 0; i < length; ++i) running += e[i];
        const A one = A(1 / std::sqrt(running / length + eps));
        for (int64_t i = 0; i < length; ++i) out[i] = one;
      } else {  // the sums one after another, all else several at a time
        const bool causal = mode == Mode::causal;
        double sums[64];
        for (int64_t from = 0; from < length; from += 64) {
          const int64_t n = std::min<int64_t>(64, length - from);
          for (int64_t i = 0; i < n; ++i) sums[i] = causal ? running += e[from + i] : e[from + i];
          DFN_CALL_ISA(norm_scales, sums, n, causal ? from + 1 : 1, causal ? 1 : 0, eps, out + from);
        }
      }
      for (int64_t i = length; i < g.N; ++i) out[i] = 0;
    }
  });
}

// along_i = <grad_i, s_i> is the derivative by scale_i; d scale / d mean = -scale^3 / 2.
template <class A>
void fill_grad_energy(const NormProblem& g, Mode mode, A* grad_energy) {
  const A* scale = static_cast<const A*>(g.scale);
  const A* along = static_cast<const A*>(g.along);
  parallel_for(0, g.B, grain_size(4 * g.N), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      A* out = grad_energy + b * g.N;
      const int64_t length = length_of(g, b);
      const auto by_mean = [&](int64_t i) {
        const double s = scale[b * g.N + i];
        return -0.5 * s * s * s * along[b * g.N + i];
      };
      double running = 0;
      if (mode == Mode::mean) {
        for (int64_t i = 0; i < length; ++i) running += by_mean(i);
        for (int64_t i = 0; i < length; ++i) out[i] = A(running / length);
      } else if (mode == Mode::causal) {
        for (int64_t i = length - 1; i >= 0; --i) {
          running += by_mean(i) / (i + 1);
          out[i] = A(running);
        }
      } else {
        for (int64_t i = 0; i < length; ++i) out[i] = A(by_mean(i));
      }
      for (int64_t i = length; i < g.N; ++i) out[i] = 0;
    }
  });
}

NormProblem describe(const Tensor& states, const Tensor& energy, const std::optional<Tensor>& lengths) {
  NormProblem g = {};
  STD_TORCH_CHECK(states.dim() == 3, "states: expected 3 dimensions, got ", states.dim());
  g.B = states.size(0), g.N = states.size(1), g.d = states.size(2);
  g.dtype = dtype_of(states);
  g.accumulate = dtype_of(energy);
  STD_TORCH_CHECK(g.accumulate == (g.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
                  "energy: expected float64 with float64 states, else float32");
  check_dense(energy, "energy", energy.scalar_type(), {g.B, g.N});
  if (lengths) {
    check_dense(*lengths, "lengths", ScalarType::Long, {g.B});
    g.lengths = static_cast<const int64_t*>(lengths->data_ptr());
  }
  g.states = rows_of(states, "states");
  return g;
}

Tensor scale_of(NormProblem& g, const Tensor& energy, double eps, Mode mode) {
  Tensor scale = allocate(energy, {g.B, g.N});
  g.scale = scale.data_ptr();
  if (g.accumulate == Dtype::f64)
    fill_scale(g, static_cast<const double*>(energy.data_ptr()), eps, mode, static_cast<double*>(scale.data_ptr()));
  else
    fill_scale(g, static_cast<const float*>(energy.data_ptr()), eps, mode, static_cast<float*>(scale.data_ptr()));
  return scale;
}

Tensor forward(const Tensor& states, const Tensor& energy, const std::optional<Tensor>& lengths, double eps,
               std::string mode) {
  NormProblem g = describe(states, energy, lengths);
  const Tensor scale = scale_of(g, energy, eps, mode_of(mode));
  Tensor out = allocate(states, {g.B, g.N, g.d});
  prefer_huge_pages(out);
  g.out = rows_of(out, "out");
  parallel_for(0, g.B * g.N, grain_size(g.d), [&](int64_t begin, int64_t end) {
    DFN_CALL_ISA(norm_forward, g, begin, end);
  });
  return out;
}

// -> grad_states, grad_energy
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& states, const Tensor& energy,
                                    const std::optional<Tensor>& lengths, double eps, std::string mode) {
  NormProblem g = describe(states, energy, lengths);
  check_shape(grad, "grad", {g.B, g.N, g.d});
  STD_TORCH_CHECK(grad.scalar_type() == states.scalar_type(), "grad: expected the dtype of states");
  const Tensor scale = scale_of(g, energy, eps, mode_of(mode));
  Tensor along = allocate(energy, {g.B, g.N});
  Tensor grad_states = allocate(states, {g.B, g.N, g.d});
  prefer_huge_pages(grad_states);
  Tensor grad_energy = allocate(energy, {g.B, g.N});
  g.grad = rows_of(grad, "grad");
  g.grad_states = rows_of(grad_states, "grad_states");
  g.along = along.data_ptr();
  parallel_for(0, g.B * g.N, grain_size(2 * g.d), [&](int64_t begin, int64_t end) {
    DFN_CALL_ISA(norm_backward, g, begin, end);
  });
  if (g.accumulate == Dtype::f64)
    fill_grad_energy(g, mode_of(mode), static_cast<double*>(grad_energy.data_ptr()));
  else
    fill_grad_energy(g, mode_of(mode), static_cast<float*>(grad_energy.data_ptr()));
  return {grad_states, grad_energy};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("flow_norm(Tensor states, Tensor energy, Tensor? lengths, float eps, str mode) -> Tensor");
  m.def("flow_norm_backward(Tensor grad, Tensor states, Tensor energy, Tensor? lengths, float eps, str mode) "
        "-> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("flow_norm", TORCH_BOX(&dfn::forward));
  m.impl("flow_norm_backward", TORCH_BOX(&dfn::backward));
}
