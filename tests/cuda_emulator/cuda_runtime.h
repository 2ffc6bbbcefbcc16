// In place of CUDA's header: the words of the language, and the intrinsics of warps and blocks.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

using cudaStream_t = void*;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}

inline void __syncthreads() {
  emulator::barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z));
}

namespace emulator {
template <class T>
T shuffle(T value, int from) {  // `from` is a lane
  struct Call {
    T value;
    int from;
    T result;
  } call{value, from, {}};
  warp_collective("shfl.sync", &call, [](void** slots) {
    for (int lane = 0; lane < 32; ++lane) {
      Call* c = static_cast<Call*>(slots[lane]);
      c->result = static_cast<Call*>(slots[c->from])->value;
    }
  });
  return call.result;
}
}  // namespace emulator

inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::warp_collective("bar.warp.sync", nullptr, [](void**) {});
}
// Every thread of the warp must take part: masks of fewer lanes are not emulated.
template <class T> T __shfl_sync(unsigned, T value, int from, int width = 32) {
  const int lane = emulator::self().lane;
  return emulator::shuffle(value, lane / width * width + from % width);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int step, int width = 32) {
  // As PTX has it: only lanes of a later part of the warp cannot be read, those of an earlier one can.
  const int lane = emulator::self().lane, from = lane ^ step;
  return emulator::shuffle(value, from / width <= lane / width ? from : lane);
}
template <class T> T __shfl_up_sync(unsigned, T value, int step, int width = 32) {
  const int lane = emulator::self().lane, from = lane - step;
  return emulator::shuffle(value, from >= lane / width * width ? from : lane);
}
template <class T> T __shfl_down_sync(unsigned, T value, int step, int width = 32) {
  const int lane = emulator::self().lane, from = lane + step;
  return emulator::shuffle(value, from / width == lane / width ? from : lane);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  struct Call {
    bool vote;
    unsigned result;
  } call{vote, 0};
  emulator::warp_collective("vote.sync", &call, [](void** slots) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(static_cast<Call*>(slots[lane])->vote) << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Call*>(slots[lane])->result = votes;
  });
  return call.result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// One operation, one rounding: this folder is compiled without contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T> T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
