// Routing with a threshold on the mixed matrix, on the CPU. Formula, shapes and meaning: dfn_kernels/route_density.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

// Everything dense, of the type `dtype`: f32 or f64.
struct DensityProblem {
  int64_t T, P, O, I;
  Dtype dtype;
  const void* x;          // [T, I]
  const void* weights;    // [T, P]
  const void* patterns;   // [P, O, I]
  const void* threshold;  // [T]
  const void* bias;       // [O] or null
  void* out;              // [T, O]
  int64_t* kept;          // [T] entries of the token's mixed matrix above its threshold
  // backward
  const void* grad;       // [T, O]
  void* grad_x;           // [T, I]
  void* grad_weights;     // [T, P]
  void* grad_patterns;    // [P, O, I]
};

// Tokens [begin, end): out and kept.
DFN_DECLARE_ISA(void density_forward(const DensityProblem& g, int64_t begin, int64_t end))
// Tokens [begin, end): grad_x and grad_weights.
DFN_DECLARE_ISA(void density_backward_tokens(const DensityProblem& g, int64_t begin, int64_t end))
// Rows [begin, end) of O: grad_patterns.
DFN_DECLARE_ISA(void density_backward_patterns(const DensityProblem& g, int64_t begin, int64_t end))
// Rows [begin, end) of mixed [T, S]: out[t] = the magnitude that `keep` of the entries exceed, exactly, or fewer where
// some are equal: the (S - keep)-th smallest. NaN for a row that holds one.
DFN_DECLARE_ISA(void magnitude_above(Dtype dtype, const void* mixed, int64_t S, int64_t keep, int64_t begin, int64_t end,
                                     void* out))

}  // namespace dfn
