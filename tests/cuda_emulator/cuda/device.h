// In place of csrc/cuda/device.h: operators on tensors of the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#define DFN_DEVICE CPU

namespace dfn {

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace dfn
