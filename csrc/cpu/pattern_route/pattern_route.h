// Pattern routing on the CPU: the kernels' interface. Formula, shapes and meaning: dfn_kernels/pattern_route.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

// Rows with a dense last dimension: row i starts at data + i * stride elements.
struct Matrix {
  void* data;
  int64_t stride;
};

// The tokens that use pattern p are token[start[p] .. start[p + 1]), ascending.
struct TokenLists {
  const int32_t* start;  // [P + 1], or null: every token uses every pattern
  const int32_t* token;
};

// Which 128 x 64 blocks of each pattern count; the others are taken for 0.
struct BlockMask {
  static constexpr int64_t kRows = 128, kColumns = 64;
  const bool* active;     // [P, ceil(O / kRows), ceil(I / kColumns)], or null: all of them
  int64_t rows, columns;  // blocks

  bool operator()(int64_t p, int64_t o, int64_t i) const {
    return active == nullptr || active[(p * rows + o / kRows) * columns + i / kColumns];
  }
};

struct RouteProblem {
  int64_t T, P, O, I;
  Dtype dtype;       // of x, patterns, grad_x, grad_patterns
  Dtype accumulate;  // of weights, bias, grad_weights, grad_bias: f64 if dtype is, else f32
  bool wide;         // out and grad have the type `accumulate`, not `dtype`
  bool pairs;        // the CPU multiplies pairs of bfloat16
  Matrix x;                 // [T, I]
  const void* weights;      // [T, P]
  const void* patterns;     // [P, O, I]: pattern p, row o at p * pattern_stride + o * row_stride
  int64_t pattern_stride, row_stride;
  const void* bias;         // [O] or null
  TokenLists lists;
  BlockMask blocks;
  void* out;                // forward: [T, O]
  // backward
  Matrix grad;              // [T, O]
  void* grad_x;             // [T, I]
  void* grad_patterns;      // [P, O, I]
  void* grad_bias;          // [O]
};

// Forward: rows [t0, t1) and columns [c0, c1) of out.
DFN_DECLARE_ISA(void route_forward(const RouteProblem& g, int64_t t0, int64_t t1, int64_t c0, int64_t c1))
// Backward: rows [t0, t1) and columns [c0, c1) of grad_x; grad_weights [T, P] grows by what these columns contribute.
DFN_DECLARE_ISA(void route_backward_tokens(const RouteProblem& g, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                                           void* grad_weights))
// Backward: rows [o0, o1) and columns [c0, c1) of grad_patterns[p].
DFN_DECLARE_ISA(void route_backward_patterns(const RouteProblem& g, int64_t p, int64_t o0, int64_t o1, int64_t c0,
                                             int64_t c1))
// Backward: grad_bias [o0, o1).
DFN_DECLARE_ISA(void route_backward_bias(const RouteProblem& g, int64_t o0, int64_t o1))
// Tokens and columns that the above divide work into; a block's size never changes a result.
DFN_DECLARE_ISA(int64_t route_tile_rows())
DFN_DECLARE_ISA(int64_t route_tile_columns(Dtype accumulate))

}  // namespace dfn
