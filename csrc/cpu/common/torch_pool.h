// Torch's threads as the pool of cpu/knn/parallel.h.
#pragma once

#include <algorithm>

#include "common/tensors.h"
#include "cpu/knn/parallel.h"

namespace dfn {

inline knn::Pool torch_pool() {
  knn::Pool pool;
  pool.threads = static_cast<int>(std::max<uint32_t>(1, torch::stable::get_num_threads()));
  pool.run = [](int count, const std::function<void(int)>& body) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
    });
  };
  return pool;
}

}  // namespace dfn
