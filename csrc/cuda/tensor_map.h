// Descriptions of tensors for the copy engine of sm_90 (TMA). tests/cuda_emulator has the same in plain C++.
#pragma once

#include <cuda.h>  // types only: the one function of libcuda is asked for at run time, so that machines without it load us
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

#include "common/problem.h"

namespace dfn {

using TensorMap = CUtensorMap;

struct Axis {
  int64_t size;
  int64_t stride;  // elements; 1 for the first axis
  int box;         // elements of a copy
};

inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return encode;
}

// Compute capability 9.0 (code for sm_90a runs on no other), and a driver that knows tensor maps.
inline bool has_tma() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0 && tensor_map_encoder() != nullptr;
}

// For float16 and bfloat16, the innermost axis first; lines of a box have at most 128 bytes and are swizzled over 128.
inline TensorMap make_tensor_map(const char* op, Dtype dtype, const void* data, std::initializer_list<Axis> axes) {
  cuuint64_t sizes[5], strides[5];
  cuuint32_t boxes[5], steps[5];
  cuuint32_t rank = 0;
  for (const Axis& axis : axes) {
    sizes[rank] = static_cast<cuuint64_t>(axis.size);
    strides[rank] = static_cast<cuuint64_t>(axis.stride * 2);
    boxes[rank] = static_cast<cuuint32_t>(axis.box);
    steps[rank++] = 1;
  }
  TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
      const_cast<void*>(data), sizes, strides + 1, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
  return map;
}

}  // namespace dfn
