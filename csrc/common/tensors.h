// From torch's stable tensors to the plain structs of problem.h: memory-safety checks live here, once.
// What a user can get wrong is checked in Python first, with better messages.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <initializer_list>
#include <optional>

#include "common/out_of_memory.h"
#include "common/problem.h"

namespace dfn {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, "expected a floating-point tensor");
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(), " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " in dimension ", axis, ", got ", t.size(axis));
    ++axis;
  }
}

// A dense tensor of this shape and dtype, ready to be indexed flat.
inline void check_dense(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_shape(t, name, shape);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": unexpected dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

// Offsets of packed sets, [S + 1]: they ascend from 0 to n.
inline void check_offsets(const Tensor& ptr, const char* name, int64_t n) {
  STD_TORCH_CHECK(ptr.dim() == 1 && ptr.size(0) >= 1, name, ": expected [S + 1]");
  check_dense(ptr, name, ScalarType::Long, {ptr.size(0)});
  const int64_t *at = static_cast<const int64_t*>(ptr.data_ptr()), S = ptr.size(0) - 1;
  bool ascends = at[0] == 0 && at[S] == n;
  for (int64_t s = 0; s < S; ++s) ascends &= at[s] <= at[s + 1];
  STD_TORCH_CHECK(ascends, name, ": expected to ascend from 0 to ", n);
}

// Of [B, H, n, c], or [B, n, c], or [n, c].
inline Rows rows_of(const Tensor& t, const char* name) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims >= 2 && dims <= 4, name, ": expected 2 to 4 dimensions, got ", dims);
  STD_TORCH_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1 || t.numel() == 0, name, ": expected a dense last dimension");
  return Rows{t.data_ptr(), dims > 2 ? t.stride(0) : 0, dims > 3 ? t.stride(1) : 0, t.stride(dims - 2)};
}

// What torch says where memory is missing does not come through the stable ABI.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {
    double bytes = dtype == ScalarType::Long ? 8 : dtype == ScalarType::Int ? 4 : dtype == ScalarType::Byte ? 1 : like.element_size();
    for (int64_t size : shape) bytes *= static_cast<double>(size);
    throw OutOfMemory(bytes);
  }
}

// [B, H, n, c] stored as [B, n, H, c]: what a model reshapes to [B, n, H*c] for free.
inline Tensor empty_rows(const Tensor& like, int64_t B, int64_t H, int64_t n, int64_t c) {
  return torch::stable::transpose(allocate(like, {B, n, H, c}), 1, 2);
}

inline int64_t grain_size(int64_t work_per_item) {
  const int64_t item = work_per_item > 0 ? work_per_item : 1;
  const int64_t grain = 32768 / item;  // about 10 us of work: less is not worth waking a thread
  return grain > 1 ? grain : 1;
}

}  // namespace dfn
