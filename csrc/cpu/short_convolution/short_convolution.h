// The short convolution on the CPU: the kernels' interface. Formula, shapes and meaning: dfn_kernels/short_convolution.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

struct ConvolutionProblem {
  int64_t B, N, d, W;
  Dtype dtype;           // of x, out and their gradients
  Dtype accumulate;      // of weight: f32, or f64 with float64 x
  const int64_t* place;  // [N] or null: how many entities of the same sequence come before
  Rows x;                // [B, 1, N, d]
  const void* weight;    // [W, d]
  Rows out;              // forward: [B, 1, N, d]
  Rows grad;             // backward: [B, 1, N, d]
  Rows grad_x;           // [B, 1, N, d]
};

// Entities [begin, end) of B * N.
DFN_DECLARE_ISA(void convolution_forward(const ConvolutionProblem& g, int64_t begin, int64_t end))
// The same; sums [W, d], of the type of weight, takes what these entities add to the weight's gradient.
DFN_DECLARE_ISA(void convolution_backward(const ConvolutionProblem& g, int64_t begin, int64_t end, void* sums))

}  // namespace dfn
