// What every op needs to describe its tensors to a kernel that knows nothing of torch.
#pragma once

#include <cstdint>

namespace dfn {

enum class Dtype : int { f16, bf16, f32, f64 };

// A [B, H, n, c] tensor whose last dimension is dense: row (b, h, i) starts at data + (b*sB + h*sH + i*sN) elements.
// So [B, n, H*c] memory, as a linear layer leaves it, needs no copy.
struct Rows {
  void* data;
  int64_t sB, sH, sN;

  template <class T>
  T* row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<T*>(data) + b * sB + h * sH + i * sN;
  }
};

}  // namespace dfn
