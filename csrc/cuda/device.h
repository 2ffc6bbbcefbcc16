// Where an operator runs. The tests replace this header, too, and so call the operators on tensors of the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#define DFN_DEVICE CUDA  // the dispatch key that operators are registered for

namespace dfn {

// Makes the tensor's device the current one as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  cudaStream_t stream() const {
    void* current = nullptr;
    aoti_torch_get_current_cuda_stream(index_, &current);
    return static_cast<cudaStream_t>(current);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace dfn
