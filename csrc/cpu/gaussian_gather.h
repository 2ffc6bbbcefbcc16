// Gaussian gather on the CPU: the kernels' interface. Formula, shapes and meaning: dfn_kernels/gaussian_gather.py.
#pragma once

#include "common/problem.h"
#include "cpu/isa.h"

namespace dfn {

// A is the type of the arithmetic: double if `accumulate` says so, else float.
struct GatherProblem {
  int64_t B, H, N, M, D, c, k;
  Dtype dtype;             // of values, out, grad, grad_values
  Dtype accumulate;        // of everything else: f32 or f64
  bool normalize;
  const void* positions;   // [B, H, N, D]
  const void* queries;     // [B, H, M, D]
  const int64_t* indices;  // [B, H, M, k]
  const void* sigma;       // [H]
  const void* influence;   // [B, H, N] or null: all ones
  Rows values;             // [B, H, N, c]
  Rows out;                // forward: [B, H, M, c]
  // backward
  Rows grad;                   // [B, H, M, c]
  void* edge_weight;           // [B, H, M, k] what values[j] was multiplied by in y_i
  void* edge_slope;            // [B, H, M, k] derivative of the loss by the exponent of the edge
  void* edge_influence;        // [B, H, M, k] derivative of the loss by influence[j], through this edge; or null
  const int64_t* edge_starts;  // [B, H, N + 1] the edges that end in entity j are
  const int64_t* edges;        // [B, H, M * k]   edges[edge_starts[j] .. edge_starts[j + 1]), ascending
  Rows grad_values;            // [B, H, N, c]
  void* grad_positions;        // [B, H, N, D]
  void* grad_queries;          // [B, H, M, D]
  void* grad_sigma_rows;       // [B, H, M] each query's share of the gradient to sigma[h]
  void* grad_influence;        // [B, H, N] or null
};

// Rows of the output, [begin, end) of B*H*M. False if an index was out of range (it is then treated as padding).
DFN_DECLARE_ISA(bool gather_forward(const GatherProblem& g, int64_t begin, int64_t end))
// Per query: edge_weight, edge_slope, edge_influence, grad_queries, grad_sigma_rows; [begin, end) of B*H*M.
DFN_DECLARE_ISA(void gather_backward_queries(const GatherProblem& g, int64_t begin, int64_t end))
// Per entity, from the transposed list: grad_values, grad_positions, grad_influence; [begin, end) of B*H*N.
DFN_DECLARE_ISA(void gather_backward_entities(const GatherProblem& g, int64_t begin, int64_t end))

}  // namespace dfn
