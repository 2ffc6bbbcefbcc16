// Pattern routing on mma.sync (compute capability 8.0 and later): float16 and bfloat16, any size, stride and alignment.
// What is computed: pattern_route.h. Run in the tests' emulator; not yet timed on a GPU.
//
// A block makes 128 x 128 sums. It walks over its patterns and, for each, over K in steps of 64: three stages of both
// operands in shared memory, filled by cp.async two steps ahead. 8 warps, each with 64 x 32 of the sums: `acc` of the
// current pattern, and `total`, to which a finished `acc` is added, times the token's weight, in float32.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/half.h"
#include "cuda/pattern_route.h"
#include "cuda/ptx.h"

namespace dfn::route::sm80 {

constexpr int kRows = kTileRows, kColumns = 128, kDepth = 64, kStages = 3;
constexpr int kThreads = 256, kWarpsDown = 2, kWarpsAcross = 4;
constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;  // of a warp
constexpr int kChunk = 8;                                                 // elements of 16 bytes, the unit of a swizzle
constexpr int kOperandBytes = kRows * kDepth * 2;
// The stages' left operands, their right operands, their weights, the dot products of all warp columns but the first.
// Together 99 KiB, what a block can have on compute capability 8.6 and 8.9.
constexpr int kRightAt = kStages * kOperandBytes, kWeightsAt = 2 * kStages * kOperandBytes;
constexpr int kDotsAt = kWeightsAt + kStages * kRows * 4;
constexpr int kSharedBytes = kDotsAt + (kWarpsAcross - 1) * kRows * 4;
static_assert(kSharedBytes <= 99 << 10 && kRows == kColumns && kThreads >= kRows);

struct Widths {  // bytes that every row of an operand can be copied by: 16, 8, 4 or 2
  int left, right;
};

// Where chunk c of a row starts. Eight rows at one c, which ldmatrix reads at once, lie in different banks.
template <int RowChunks>
__device__ __forceinline__ unsigned chunk_at(unsigned row, unsigned c) {  // unsigned: % 8 is one instruction
  return (row * RowChunks + (c ^ row % 8)) * 16;
}

// 8 elements to shared memory, of which those from `valid` on (any number) become 0 and are not read.
template <int Width, class V>
__device__ __forceinline__ void copy_chunk(char* to, const V* from, int valid) {
  if constexpr (Width == 2) {  // no asynchronous copy is that narrow; the next barrier but one is before anybody reads
#pragma unroll
    for (int e = 0; e < kChunk; ++e) reinterpret_cast<V*>(to)[e] = e < valid ? from[e] : V{};
  } else {
    constexpr int kEach = Width / 2;
#pragma unroll
    for (int e = 0; e < kChunk; e += kEach) ptx::copy_async<Width>(to + 2 * e, from + e, 2 * min(max(valid - e, 0), kEach));
  }
}

// body(the width as a type)
template <class Body>
__device__ __forceinline__ void by_width(int width, Body body) {
  if (width == 16) body(std::integral_constant<int, 16>{});
  else if (width == 8) body(std::integral_constant<int, 8>{});
  else if (width == 4) body(std::integral_constant<int, 4>{});
  else body(std::integral_constant<int, 2>{});
}

template <class V>
__device__ __forceinline__ uint32_t pack(V low, V high) {
  uint16_t bits[2];
  memcpy(&bits[0], &low, 2);
  memcpy(&bits[1], &high, 2);
  return bits[0] | uint32_t{bits[1]} << 16;
}
// The number in the lower half.
template <class V>
__device__ __forceinline__ float widen(uint32_t pair) {
  const uint16_t bits = static_cast<uint16_t>(pair);
  V x;
  memcpy(&x, &bits, 2);
  return to_float(x);
}

// The tile of one block: which tokens, columns and patterns it works on. Sizes are below 2^31, their products are not.
struct Tile {
  int m, column, split;
  int row0, column0;  // of the tokens, in the order they are taken, and of the columns of y
  int first, end;     // its patterns, or their places in the tile's list

  __device__ Tile(const Problem& g, const Plan& plan) {
    const unsigned columns = static_cast<unsigned>((g.N + kColumns - 1) / kColumns);
    const unsigned splits = static_cast<unsigned>(plan.splits);
    column = blockIdx.x % columns;
    split = blockIdx.x / columns % splits;
    m = blockIdx.x / columns / splits;
    row0 = m * kRows;
    column0 = column * kColumns;
    const int64_t count = g.tile_counts ? g.tile_counts[m] : g.P;
    first = static_cast<int>(count * split / plan.splits);
    end = static_cast<int>(count * (split + 1) / plan.splits);
  }
  __device__ int pattern(const Problem& g, int at) const { return g.tile_patterns ? g.tile_patterns[m * g.P + at] : at; }
  // The token of a row of the tile; -1 beyond the last.
  __device__ int token(const Problem& g, unsigned row) const {
    const int64_t at = row0 + int64_t{row};
    return static_cast<int>(at >= g.T ? -1 : g.order ? g.order[at] : at);
  }
};

// Fills the stages. Each thread always copies the same chunk column of the same four rows of an operand.
template <class V, bool Backward>
struct Loader {
  static constexpr int kCopies = kOperandBytes / 16 / kThreads;
  static constexpr int kLeftChunks = kDepth / kChunk, kRightChunks = (Backward ? kColumns : kDepth) / kChunk;  // of a row
  static constexpr int kLeftStep = kThreads / kLeftChunks, kRightStep = kThreads / kRightChunks;  // rows between a thread's
  static_assert(kLeftStep % 8 == 0 && kRightStep % 8 == 0, "one swizzle for all rows of a thread");
  int left_token[kCopies], weight_token;  // -1 for none
  int pattern_at, k0 = 0;                 // what comes next

  __device__ Loader(const Problem& g, const Tile& tile, unsigned thread) : pattern_at(tile.first) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) left_token[i] = tile.token(g, thread / kLeftChunks + i * kLeftStep);
    weight_token = thread < kRows ? tile.token(g, thread) : -1;
  }

  // Issues the copies of the next step, if there is one, and closes the group in any case.
  __device__ void next(const Problem& g, const Tile& tile, Widths widths, int stage, unsigned thread) {
    if (pattern_at < tile.end) {
      char* memory = ptx::shared_memory();
      const int p = tile.pattern(g, pattern_at), K = static_cast<int>(g.K), N = static_cast<int>(g.N);
      {
        const unsigned row = thread / kLeftChunks, c = thread % kLeftChunks;
        const int k = k0 + c * kChunk;
        const V* left = static_cast<const V*>(g.left);
        char* to = memory + stage * kOperandBytes + chunk_at<kLeftChunks>(row, c);
        by_width(widths.left, [&](auto width) {
#pragma unroll
          for (int i = 0; i < kCopies; ++i) {
            const int valid = left_token[i] < 0 ? 0 : K - k;
            copy_chunk<width>(to + i * kLeftStep * kLeftChunks * 16,
                              valid > 0 ? left + left_token[i] * g.left_stride + k : left, valid);
          }
        });
      }
      {
        const unsigned row = thread / kRightChunks, c = thread % kRightChunks;
        const int o = (Backward ? k0 : tile.column0) + row, e = (Backward ? tile.column0 : k0) + c * kChunk;
        const int O = Backward ? K : N, I = Backward ? N : K;
        const V* pattern = static_cast<const V*>(g.patterns) + p * g.pattern_stride;
        char* to = memory + kRightAt + stage * kOperandBytes + chunk_at<kRightChunks>(row, c);
        by_width(widths.right, [&](auto width) {
#pragma unroll
          for (int i = 0; i < kCopies; ++i) {
            const int valid = o + i * kRightStep < O ? I - e : 0;
            copy_chunk<width>(to + i * kRightStep * kRightChunks * 16,
                              valid > 0 ? pattern + (o + i * kRightStep) * g.row_stride + e : pattern, valid);
          }
        });
      }
      k0 += kDepth;
      if (k0 >= K) {  // the pattern's last step: its weights are wanted at its end
        if (thread < kRows)
          ptx::copy_async<4>(memory + kWeightsAt + (stage * kRows + thread) * 4,
                             g.weights + (weight_token < 0 ? 0 : weight_token * g.P + p), weight_token < 0 ? 0 : 4);
        k0 = 0;
        ++pattern_at;
      }
    }
    ptx::copy_commit();
  }
};

// Where a thread's sums are in the tile: sum (i, j, e) in row row_of() + 16 i + 8 (e / 2), column column_of() + 8 j + e % 2.
__device__ __forceinline__ unsigned warp_row_of(unsigned thread) { return thread / 32 / kWarpsAcross * kWarpRows; }
__device__ __forceinline__ unsigned warp_column_of(unsigned thread) { return thread / 32 % kWarpsAcross * kWarpColumns; }
__device__ __forceinline__ unsigned row_of(unsigned thread) { return warp_row_of(thread) + thread % 32 / 4; }
__device__ __forceinline__ unsigned column_of(unsigned thread) { return warp_column_of(thread) + thread % 4 * 2; }
using Sums = float[kMmaRows][kMmaColumns][4];  // of a thread, as mma.m16n8k16 leaves them

// acc += the stage's left times its right operand.
template <class V, bool Backward>
__device__ __forceinline__ void multiply(Sums& acc, int stage, unsigned warp_row, unsigned warp_column, unsigned lane) {
  constexpr int kRightChunks = Loader<V, Backward>::kRightChunks;
  const char* left = ptx::shared_memory() + stage * kOperandBytes;
  const char* right = ptx::shared_memory() + kRightAt + stage * kOperandBytes;
#pragma unroll(Backward ? 2 : 4)  // four ahead do not fit into the registers beside x
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[kMmaRows][4], b[kMmaColumns / 2][4];
#pragma unroll
    for (int i = 0; i < kMmaRows; ++i)  // matrices: rows 0-7 and 8-15, then the same of the later 8 columns
      ptx::load_matrix(a[i], left + chunk_at<kDepth / kChunk>(warp_row + 16 * i + lane % 16, k / kChunk + lane / 16));
#pragma unroll
    for (int j = 0; j < kMmaColumns / 2; ++j) {  // matrices: the first and last 8 of k, then the same of the later 8 columns
      const unsigned column = warp_column + 16 * j + lane / 16 * 8, k_half = lane / 8 % 2;
      if constexpr (Backward)
        ptx::load_matrix_transposed(b[j], right + chunk_at<kRightChunks>(k + 8 * k_half + lane % 8, column / kChunk));
      else
        ptx::load_matrix(b[j], right + chunk_at<kRightChunks>(column + lane % 8, k / kChunk + k_half));
    }
#pragma unroll
    for (int i = 0; i < kMmaRows; ++i)
#pragma unroll
      for (int j = 0; j < kMmaColumns; ++j)
        ptx::multiply_add<V>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

template <class V, class Y, bool Backward>
__global__ void __launch_bounds__(kThreads, 1) tokens_kernel(const __grid_constant__ Problem g, const __grid_constant__ Plan plan,
                                                             const __grid_constant__ Widths widths) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const unsigned warp_row = warp_row_of(thread), warp_column = warp_column_of(thread);
  const unsigned row = row_of(thread);
  const Tile tile(g, plan);
  float* shared_weights = reinterpret_cast<float*>(ptx::shared_memory() + kWeightsAt);
  float* shared_dots = reinterpret_cast<float*>(ptx::shared_memory() + kDotsAt);

  uint32_t x[kMmaRows * 2][kMmaColumns];  // the pairs at the places of the sums
  if constexpr (Backward) {
#pragma unroll
    for (int i = 0; i < kMmaRows * 2; ++i) {
      const int t = tile.token(g, row + 8 * i);
      const V* from = static_cast<const V*>(g.x) + t * g.x_stride;
#pragma unroll
      for (int j = 0; j < kMmaColumns; ++j) {
        const int n = tile.column0 + column_of(thread) + 8 * j;
        x[i][j] = pack(t >= 0 && n < g.N ? from[n] : V{}, t >= 0 && n + 1 < g.N ? from[n + 1] : V{});
      }
    }
  }

  Loader<V, Backward> loader(g, tile, thread);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) loader.next(g, tile, widths, stage, thread);

  Sums total = {}, acc = {};
  int stage = 0, filled = kStages - 1;
  const int K = static_cast<int>(g.K), N = static_cast<int>(g.N);
  for (int at = tile.first; at < tile.end; ++at) {
    for (int k0 = 0; k0 < K; k0 += kDepth) {
      ptx::copy_wait<kStages - 2>();
      __syncthreads();  // the stage is complete, and nobody reads the one before it any more: that is filled next
      loader.next(g, tile, widths, filled, thread);
      multiply<V, Backward>(acc, stage, warp_row, warp_column, lane);
      if (k0 + kDepth < K) {
        filled = stage;
        stage = stage + 1 < kStages ? stage + 1 : 0;
      }
    }
    if (K == 0) break;
    const int p = tile.pattern(g, at);
    float dots[kMmaRows * 2];
#pragma unroll
    for (int i = 0; i < kMmaRows * 2; ++i) {
      const float weight = shared_weights[stage * kRows + row + 8 * i];
      dots[i] = 0;
#pragma unroll
      for (int j = 0; j < kMmaColumns * 2; ++j) {
        if constexpr (Backward)
          if (j % 2 == 0) ptx::keep_here(x[i][j / 2]);  // not unpacked before
        float& sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
        if constexpr (Backward) dots[i] += sum * widen<V>(x[i][j / 2] >> j % 2 * 16);
        total[i / 2][j / 2][i % 2 * 2 + j % 2] += weight * sum;
        sum = 0;
      }
    }
    filled = stage;
    stage = stage + 1 < kStages ? stage + 1 : 0;
    if constexpr (Backward) {  // the four lanes of a row, then the warps across, from the left
#pragma unroll
      for (int i = 0; i < kMmaRows * 2; ++i) {
        dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], 1);
        dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], 2);
        if (warp_column > 0 && lane % 4 == 0)
          shared_dots[(warp_column / kWarpColumns - 1) * kRows + row + 8 * i] = dots[i];
      }
      __syncthreads();
      if (warp_column == 0) {
        if (lane % 4 == 0)
#pragma unroll
          for (int i = 0; i < kMmaRows * 2; ++i) {
            float* others = shared_dots + row + 8 * i;
            *others = dots[i] + others[0] + others[kRows] + others[2 * kRows];
          }
        __syncwarp();
        for (unsigned r = warp_row + lane; r < warp_row + kWarpRows; r += 32) {
          const int t = tile.token(g, r);
          if (t >= 0) g.parts[(int64_t{tile.column} * g.T + t) * g.P + p] = shared_dots[r];
        }
      }
    }
  }

  unsigned late = thread;  // else the tokens and columns found above stay in registers until here
  ptx::keep_here(late);
#pragma unroll
  for (int i = 0; i < kMmaRows * 2; ++i) {
    const int t = tile.token(g, row_of(late) + 8 * i);
    if (t < 0) continue;
#pragma unroll
    for (int j = 0; j < kMmaColumns * 2; ++j) {
      const int n = tile.column0 + column_of(late) + j / 2 * 8 + j % 2;
      const float sum = total[i / 2][j / 2][i % 2 * 2 + j % 2];
      if (n >= N) continue;
      if (plan.splits > 1)
        g.workspace[(int64_t{tile.split} * g.T + t) * g.N + n] = sum;
      else
        from_float(sum + (g.bias ? g.bias[n] : 0.0f), static_cast<Y*>(g.y) + t * g.N + n);
    }
  }
}

// y = the sum of the splits in order, and bias.
template <class Y>
__global__ void __launch_bounds__(kThreads) add_splits_kernel(const __grid_constant__ Problem g,
                                                              const __grid_constant__ Plan plan) {
  const int64_t e = blockIdx.x * int64_t{kThreads} + threadIdx.x, size = g.T * g.N;
  if (e >= size) return;
  float sum = 0;
  for (int64_t split = 0; split < plan.splits; ++split) sum += g.workspace[split * size + e];
  from_float(sum + (g.bias ? g.bias[e % g.N] : 0.0f), static_cast<Y*>(g.y) + e);
}

}  // namespace dfn::route::sm80
