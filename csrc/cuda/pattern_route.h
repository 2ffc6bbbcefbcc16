// What the CUDA kernels of pattern_route are told, and who takes what. They know nothing of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/problem.h"

namespace dfn::route {

// Rows of a tile: a list of patterns (top_k) belongs to as many tokens.
constexpr int64_t kTileRows = 128;

// y[t][n] = bias[n] + sum_p weights[t][p] * (sum_k left[t][k] * right_p[k][n]), in float32 sums (float64
// for float64).
//
//   forward    left = x [T, I], K = I, N = O, right_p[k][n] = patterns[p][n][k], y the output
//   backward   left = grad [T, O], K = O, N = I, right_p[k][n] = patterns[p][k][n], y the gradient of x; the sum over k
//              in brackets, before it is multiplied by the weight, also gives that of the weights:
//              parts[c][t][p] = sum over the columns n of tile column c of (sum over k) * x[t][n]
struct Problem {
  Dtype dtype;    // of left, patterns, x. With f64, what is called float below is float64
  bool wide;      // f16 and bf16, forward only: y is float32
  bool backward;
  int64_t T, P, K, N;
  const void* left;      // [T, K], rows left_stride elements apart, dense in k
  int64_t left_stride;
  const float* weights;  // [T, P], contiguous
  const void* patterns;  // [P, O, I], dense in i
  int64_t pattern_stride, row_stride;
  const float* bias;     // [N] or null
  const void* x;         // backward: [T, N], dense in n
  int64_t x_stride;
  void* y;               // [T, N], contiguous
  float* parts;          // backward: [part_columns of the plan, T, P], zero where a tile skips a pattern
  // Tokens grouped by pattern set (top_k), or null: tile m holds the tokens order[128 m ...] and multiplies by the
  // patterns tile_patterns[m][0 ... tile_counts[m] - 1], ascending.
  const int64_t* order;          // [T]
  const int32_t* tile_patterns;  // [ceil(T / 128), P]
  const int32_t* tile_counts;    // [ceil(T / 128)]
  float* workspace;              // [splits, T, N] if splits > 1
  cudaStream_t stream;
};

// What has to be allocated before the launch.
struct Plan {
  int64_t splits;        // ranges of patterns that different blocks add up; their sums meet in the workspace
  int64_t part_columns;  // tile columns: the first dimension of parts
};

// float32 and float64: pattern_route_simple.cu.
Plan plan_simple(const Problem&);
void route_simple(const Problem&, const Plan&);

// float16 and bfloat16 by mma.sync, any size, stride and alignment: pattern_route_sm80.cu.
Plan plan_sm80(const Problem&);
void route_sm80(const Problem&, const Plan&);

// The same by TMA and wgmma: pattern_route_sm90.cu. `takes_sm90`: compute capability 9.0, and operands that TMA can read.
bool takes_sm90(const Problem&);
Plan plan_sm90(const Problem&);
void route_sm90(const Problem&, const Plan&);

// y = bias + the sum of the splits, in this order: pattern_route_sm80.cu.
void add_splits(const Problem&, const Plan&);

// ---- beside PyTorch's products: pattern_route_products.cu -----------------------------------------------------------
// out[t][p][e] = weights[t][p] * rows[t][e], rounded once.
struct Scaling {
  Dtype dtype;  // of rows and out; weights are float32, or float64 with f64
  int64_t T, P, E;
  const void* rows;  // [T, E], rows_stride elements apart
  int64_t rows_stride;
  const void* weights;  // [T, P], rows weights_stride elements apart
  int64_t weights_stride;
  void* out;  // [T, P, E]
  cudaStream_t stream;
};
void scale_rows(const Scaling&);

// y[t][n] = bias[n] + sum_p weights[t][p] * sums[p][t][n], and in the backward pass
// parts[c][t][p] = sum over the columns n of strip c of sums[p][t][n] * x[t][n]
struct Combination {
  Dtype dtype;  // of y and x; all else is float32, or float64 with f64
  int64_t T, P, N;
  const void* sums;     // [P, T, N]
  const void* weights;  // [T, P]
  const void* bias;     // [N] or null
  const void* x;        // backward: [T, N], rows x_stride elements apart
  int64_t x_stride;
  void* y;      // [T, N]
  void* parts;  // backward: [ceil(N / kStrip), T, P], strips parts_stride elements apart; else null
  int64_t parts_stride;
  cudaStream_t stream;
};
constexpr int64_t kStrip = 512;
void combine_products(const Combination&);

}  // namespace dfn::route
