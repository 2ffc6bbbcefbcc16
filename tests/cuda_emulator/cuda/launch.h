// In place of csrc/cuda/launch.h: runs the kernel to its end at once.
#pragma once

#include <cuda_runtime.h>

namespace dfn {

inline int multiprocessors() { return emulator::world.multiprocessors; }

struct Grid {
  int64_t blocks;
  unsigned threads;
  size_t shared_bytes;
  cudaStream_t stream;
  unsigned cluster = 1;  // blocks that share their shared memory (sm_90)
};

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  const unsigned blocks = static_cast<unsigned>(grid.blocks);
  emulator::run({blocks, grid.threads, grid.cluster, grid.shared_bytes}, {grid.threads, 1, 1},
                [&] { kernel(arguments...); });
}

}  // namespace dfn
