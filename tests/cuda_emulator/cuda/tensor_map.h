// In place of csrc/cuda/tensor_map.h: the description is kept as it is given, and checked against what the driver demands.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>

#include "common/problem.h"

namespace dfn {

struct Axis {
  int64_t size;
  int64_t stride;  // elements; 1 for the first axis
  int box;         // elements of a copy
};

struct TensorMap {
  const char* data;
  int rank;
  Axis axes[5];
};

inline bool has_tma() { return true; }

inline TensorMap make_tensor_map(const char*, Dtype, const void* data, std::initializer_list<Axis> axes) {
  TensorMap map{static_cast<const char*>(data), 0, {}};
  const auto demand = [](bool holds, const char* what) {
    if (!holds && emulator::world.error.empty()) emulator::world.error = std::string("cuTensorMapEncodeTiled: ") + what;
  };
  demand(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the tensor does not start at a multiple of 16 bytes");
  demand(axes.size() >= 1 && axes.size() <= 5, "1 to 5 axes");
  for (const Axis& axis : axes) {
    demand(axis.size >= 1 && axis.size <= int64_t{1} << 32, "size of an axis");
    demand(axis.box >= 1 && axis.box <= 256, "size of a box");
    if (map.rank == 0) demand(axis.stride == 1 && axis.box * 2 <= 128, "lines must be dense, and at most 128 bytes in a box");
    else demand(axis.stride > 0 && axis.stride * 2 % 16 == 0 && axis.stride * 2 < int64_t{1} << 40, "stride of an axis");
    map.axes[map.rank++] = axis;
  }
  return map;
}

}  // namespace dfn
