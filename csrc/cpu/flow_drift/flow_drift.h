// Flow drift on the CPU: the kernels' interface. Formula, shapes and meaning: dfn_kernels/flow_drift.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

// Entities are numbered b * N + i here. Everything but the states is of the type `accumulate`.
struct DriftProblem {
  int64_t B, H, N, D, d;
  Dtype dtype;            // of states and grad_states
  Dtype accumulate;       // f32, or f64 with float64 states
  Rows states;            // [B, 1, N, d]
  const void* weight;     // [H, D, d]
  const void* alpha;      // [H]
  // forward
  const void* positions;  // [B, H, N, D]
  const void* bias;       // [H, D] or null
  void* out_positions;    // [B, H, N, D]
  void* out_energy;       // [B, H, N]
  // forward: output; backward: what the forward pass found
  void* flow;             // [B, H, N, D]
  // backward
  const void* grad_positions;  // [B, H, N, D]
  const void* grad_flow;       // [B, H, N, D]
  const void* grad_energy;     // [B, H, N]
  Rows grad_states;            // [B, 1, N, d]
  int64_t chunk;               // entities per partial sum: a function of the shape alone, so the bits never vary
  void* part_weight;           // [chunks, H, D, d]
  void* part_bias;             // [chunks, H, D]
  void* part_alpha;            // [chunks, H]
};

// Entities [begin, end) of B * N.
DFN_DECLARE_ISA(void drift_forward(const DriftProblem& g, int64_t begin, int64_t end))
// Chunks of entities [begin, end): grad_states, and the partial sums over each chunk.
DFN_DECLARE_ISA(void drift_backward(const DriftProblem& g, int64_t begin, int64_t end))

}  // namespace dfn
