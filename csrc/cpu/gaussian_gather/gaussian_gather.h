// Gaussian gather on the CPU: the kernels' interface. Formula, shapes and meaning: dfn_kernels/gaussian_gather.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

// What the backward pass knows of one edge, stored in the order of neighbors.h.
template <class A>
struct Edge {
  uint32_t query;
  A weight;     // what values[j] was multiplied by in y_i
  A slope;      // derivative of the loss by the exponent of the edge
  A influence;  // derivative of the loss by influence[j], through this edge
};

// One batch and head. A is the type of the arithmetic: double if `accumulate` says so, else float.
struct GatherProblem {
  int64_t N, M, D, c, k;
  Dtype dtype;             // of values, out, grad, grad_values
  Dtype accumulate;        // of everything else: f32 or f64
  bool normalize;
  double sigma;
  const void* positions;   // [N, D]
  const void* queries;     // [M, D]
  const int64_t* indices;  // [M, k]
  const void* influence;   // [N] or null: all ones
  const void* sq_dists;    // [M, k] |q_i - p_j|^2 where somebody knows them already, or null
  const int32_t* query_order;   // [M] or null: as they come
  const int32_t* entity_order;  // [N] or null
  const void* values;      // [N, c], rows this far apart:
  int64_t values_stride;
  void* out;               // forward: [M, c]
  int64_t out_stride;
  // backward; whatever nobody asked for is null
  const void* grad;        // [M, c]
  int64_t grad_stride;
  const int64_t* starts;   // [N + 1] by turn, see neighbors.h
  const uint32_t* slots;   // [M, k] by turn, or
  const int64_t* slots64;  // [M, k]
  void* edges;             // [M * k] Edge<A>
  bool slopes;             // whether anything but grad_values is wanted
  void* grad_values;       // [N, c]
  int64_t grad_values_stride;
  void* grad_positions;    // [N, D]
  void* grad_queries;      // [M, D]
  void* grad_sigma_rows;   // [M] each query's share of the gradient to sigma
  void* grad_influence;    // [N]
};

// An entity with more edges than this (a hub: many points in one place) is left to gather_backward_hub.
constexpr int64_t kHub = 4096;

// Queries number [begin, end) in query_order. False if an index was out of range (it is then treated as padding).
DFN_DECLARE_ISA(bool gather_forward(const GatherProblem& g, int64_t begin, int64_t end))
// The same queries: edges, grad_queries, grad_sigma_rows.
DFN_DECLARE_ISA(void gather_backward_queries(const GatherProblem& g, int64_t begin, int64_t end))
// Entities number [begin, end) in entity_order, from their edges: grad_values, grad_positions, grad_influence.
DFN_DECLARE_ISA(void gather_backward_entities(const GatherProblem& g, int64_t begin, int64_t end))
// The hub at this place of entity_order, piece by piece of kHub edges: sums [c + D + 1] of type A; then all pieces
// together, in order.
DFN_DECLARE_ISA(void gather_backward_piece(const GatherProblem& g, int64_t turn, int64_t piece, void* sums))
DFN_DECLARE_ISA(void gather_backward_hub(const GatherProblem& g, int64_t turn, int64_t pieces, const void* sums))

}  // namespace dfn
