// What the CUDA kernels of gaussian_gather are told. They know nothing of torch. The formula, shapes and what is shared by
// heads: dfn_kernels/gaussian_gather.py. A list is what heads that share their neighbours share: lists = B * list_heads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/problem.h"

namespace dfn::gather {

constexpr int kMostSlots = 32;  // neighbours of a query that are served at a time

// What the backward pass by entity needs of an edge, as the pass by query leaves it. With u the weight before influence:
// the weight is u times the entity's influence w, the derivative of the loss by the exponent is w * slope, that by w is slope.
template <class A>
struct alignas(2 * sizeof(A)) Slope {
  A weight;
  A slope;
};

// Called real: float64 if dtype is f64, else float32.
struct Problem {
  Dtype dtype;  // of values, out, grad, grad_values
  bool normalize;
  int64_t B, H, list_heads, N, M, D, c, k;
  const void* positions;       // real [B, H, N, D]
  const void* queries;         // real [B, H, M, D]
  const int64_t* indices;      // [lists, M, k]
  const void* sigma;           // real [H]
  const void* influence;       // real [B, H, N], or null: all ones
  const void* sq_dists;        // real [B, H, M, k], |q - p|^2 where a search knows them, or null
  const int32_t* query_order;   // [lists, M], or null: as they come
  const int32_t* entity_order;  // [lists, N], or null
  Rows values;                  // [B, H, N, c]
  Rows out;                     // forward: [B, H, M, c]
  // backward: what nobody asked for is null
  Rows grad;                    // [B, H, M, c]
  void* slopes;                 // Slope<real> [B, H, M, k]
  void* grad_queries;           // real [B, H, M, D]
  void* grad_sigma_rows;        // real [B, H, M]: each query's share
  // backward by entity
  bool wide;                    // starts and edges are int64, else int32
  const void* starts;           // [lists * N + 2]: where in edges the list of an entity begins; the longest list comes last
  const void* edges;            // query * k + slot, ascending for each entity
  int64_t hub, pieces;          // a list longer than `hub` is cut; each list has room for so many pieces
  void* parts;                  // real [B, H, pieces, c + D + 1]: their sums
  Rows grad_values;             // [B, H, N, c]
  void* grad_positions;         // real [B, H, N, D]
  void* grad_influence;         // real [B, H, N]
  cudaStream_t stream;
};

// Whether rows are read 16 bytes a lane: every row of values, out, grad and grad_values begins at a multiple of that.
bool by_units(const Problem&);

void forward(const Problem&);           // gaussian_gather_forward.cu
void backward_queries(const Problem&);  // gaussian_gather_queries.cu: slopes, grad_queries, grad_sigma_rows
void backward_entities(const Problem&);  // gaussian_gather_entities.cu: grad_values, grad_positions, grad_influence

// ---- gaussian_gather_lists.cu: things that point to places, by place ------------------------------------------------
struct Lists {
  int64_t lists, places, things;  // things: edges of a list
  bool wide;
  const void* targets;  // [lists, things]: the place of a thing; outside of [0, places): none. int64, or
  bool narrow_targets;  // int32
  const int32_t* order;  // [lists, things / per]: in which order to visit rows of `per` things, or null; nothing depends on it
  int64_t per;
  void* counts;         // [lists * places], zero
  void* tiles;          // [2, scan_tiles()]
  void* starts;         // [lists * places + 2]
  void* scratch;        // [lists, things]
  void* edges;          // [lists, things]: the things of each place, ascending
  cudaStream_t stream;
};
int64_t scan_tiles(const Lists&);
void make_lists(const Lists&);

// A cell of a grid along a Z-order curve for each of [lists, n, D] points, by up to three of the dimensions.
struct Cells {
  Dtype dtype;
  int64_t lists, n, D;
  int bits;  // of a cell's number, per dimension
  const void* points;
  double* bounds;  // [lists, 6]
  int32_t* cells;  // [lists, n]
  cudaStream_t stream;
};
void find_cells(const Cells&);

}  // namespace dfn::gather
