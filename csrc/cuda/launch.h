// Starts kernels. The tests replace this header (tests/cuda_emulator/cuda/launch.h), so launchers know no <<<>>>.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace dfn {

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  check_cuda("multiprocessors", cudaGetDevice(&device));
  check_cuda("multiprocessors", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

struct Grid {
  int64_t blocks;
  unsigned threads;
  size_t shared_bytes;
  cudaStream_t stream;
  unsigned cluster = 1;  // blocks that share their shared memory (sm_90)
};

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  STD_TORCH_CHECK(grid.blocks > 0 && grid.blocks < (int64_t{1} << 31), op, ": too many tiles for one launch");
  if (grid.shared_bytes > 48 << 10)  // more than every kernel may use is asked for by name
    check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(grid.shared_bytes)));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {grid.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = grid.stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace dfn
