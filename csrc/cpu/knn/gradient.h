// The gradient of the distances that a search has found: the kernel's interface. Plain data only, see types.h.
#pragma once

#include <cstdint>

#include "cpu/common/isa.h"

namespace dfn::knn {

// One batch entry. d |q_i - p_j|^2 = 2 (p_j - q_i) (dp_j - dq_i); of absolute differences sign(p_j - q_i) (dp_j - dq_i).
template <class T>
struct Gradient {
  const T* points;         // [N, D]
  const T* queries;        // [M, D]; null: query i is point i
  const int64_t* indices;  // [M, k], -1 where there is none
  const T* grad;           // [M, k], of the distances
  int64_t grad_row, grad_column;  // its strides
  int64_t N, D, k;
  bool absolute;
  T* to_points;   // [N, D], added to; null if not wanted
  T* to_queries;  // [M, D], overwritten; null if not wanted, and where query i is point i
};

}  // namespace dfn::knn

namespace dfn {

// What the queries [begin, end) give, one after another. -> whether all indices are -1 or of a point
DFN_DECLARE_ISA(bool knn_gradient(const knn::Gradient<float>& g, int64_t begin, int64_t end);
                bool knn_gradient(const knn::Gradient<double>& g, int64_t begin, int64_t end))

}  // namespace dfn
