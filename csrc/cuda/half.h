// Between float32, in which everything is summed, and what tensors hold.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dfn {

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half* y) { *y = __float2half_rn(x); }
__device__ inline void from_float(float x, float* y) { *y = x; }

}  // namespace dfn
