// FlowNorm on the CPU: the kernels' interface. Formula, shapes and meaning: dfn_kernels/flow_norm.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

struct NormProblem {
  int64_t B, N, d;
  Dtype dtype;             // of states, out and their gradients
  Dtype accumulate;        // of energy: f32, or f64 with float64 states
  const int64_t* lengths;  // [B] or null
  Rows states;             // [B, 1, N, d]
  const void* scale;       // [B, N] 1 / sqrt(mean + eps); where there is padding, 0
  Rows out;                // forward: [B, 1, N, d]
  Rows grad;               // backward: [B, 1, N, d]
  Rows grad_states;        // [B, 1, N, d]
  void* along;             // [B, N] <grad_i, s_i>, 0 for padding
};

// 1 / sqrt(sums[i] / (first + i * step) + eps), in double
DFN_DECLARE_ISA(void norm_scales(const double* sums, int64_t n, int64_t first, int64_t step, double eps, float* out);
                void norm_scales(const double* sums, int64_t n, int64_t first, int64_t step, double eps, double* out))
// Entities [begin, end) of B * N.
DFN_DECLARE_ISA(void norm_forward(const NormProblem& g, int64_t begin, int64_t end))
DFN_DECLARE_ISA(void norm_backward(const NormProblem& g, int64_t begin, int64_t end))

}  // namespace dfn
