// pattern_route on Hopper: device code. Host side and choice of tiles: pattern_route_sm90.cu.
//
// What is computed: pattern_route.h; forward k runs over I and n over O, backward k over O and n over I.
//
// A block computes tiles of 128 tokens x N columns, one after the other. Its first two warpgroups multiply, 64 tokens each;
// one thread of the third keeps shared memory full. All patterns pass by for the tile, 64 deep at a time, while the tile of
// `left` stays: up to 512 deep of it, which is why deeper products are cut into even chunks. Streaming both operands would
// ask for 160 bytes a clock of shared memory, which gives 128 (N = 128: wgmma reads 96, 32 are written for each operand);
// so it is 128, and 117 with N = 192. Two neighbouring blocks, a cluster, work on the same columns: each loads half of
// every pattern tile and sends it to both, which halves what the L2 cache is asked for.
// Checked in an emulator, too: tests/kernels/test_cuda_emulated_sm90.py.
#pragma once

#include <cstring>

#include "cuda/half.h"
#include "cuda/pattern_route.h"
#include "cuda/ptx_sm90.h"

namespace dfn::route::sm90 {

constexpr int kWarp = 32;
constexpr int kGroup = 128;                 // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kRows = 128;                  // tokens of a tile
constexpr int kDepth = 64;                  // values of a line: 128 bytes
constexpr int kLine = 2 * kDepth;           // bytes
constexpr int kPair = 2;                    // blocks of a cluster
constexpr int kTokenSlots = 8;              // 16 KB each
constexpr int kPatternBytes = 96 * 1024;    // with the slots of tokens 224 of the 227 KB that a block may have
constexpr int kReaders = 2 * kGroup / kWarp;  // warps of a block that release a stage

template <int N>
struct Storage {
  static constexpr int kStages = kPatternBytes / (N * kLine);
  uint8_t tokens[kTokenSlots][kRows * kLine];
  uint8_t patterns[kStages][N * kLine];  // forward [n][k]; backward [n / 64][k][n % 64]
  ptx::Barrier tokens_full[kTokenSlots], patterns_full[kStages], patterns_empty[kStages];
};

// Which slot is next, and the parity of the phase in which it is filled.
template <int Slots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == Slots) slot = 0, parity ^= 1;
  }
};

// The work of a block, the same for all its roles.
struct Tile {
  int t0, column, split;  // its first token, its block of columns
  int p_begin, p_end;
};

template <int N>
struct Schedule {
  int T, P, splits, columns, tiles, depth, chunks;
  __device__ Schedule(const Problem& g, const Plan& plan)
      : T(static_cast<int>(g.T)), P(static_cast<int>(g.P)), splits(static_cast<int>(plan.splits)),
        columns((static_cast<int>(g.N) + N - 1) / N), tiles((T + kPair * kRows - 1) / (kPair * kRows) * columns * splits),
        depth((static_cast<int>(g.K) + kDepth - 1) / kDepth), chunks((depth + kTokenSlots - 1) / kTokenSlots) {}

  // body(tile) for the tiles of this block. Those of neighbouring clusters have the same tokens, for the sake of the cache.
  template <class Body>
  __device__ void each_tile(Body body) const {
    const int rank = static_cast<int>(ptx::cluster_rank());
    for (int i = blockIdx.x / kPair; i < tiles; i += gridDim.x / kPair) {  // pairs of tiles
      const int split = i % splits, column = i / splits % columns, pair = i / splits / columns;
      body(Tile{(pair * kPair + rank) * kRows, column, split, part(split, P, splits), part(split + 1, P, splits)});
    }
  }
  __device__ int chunk_begin(int chunk) const { return part(chunk, depth, chunks); }

 private:
  __device__ static int part(int i, int size, int parts) { return i * (size / parts) + min(i, size % parts); }
};

// ---- producer: one thread ------------------------------------------------------------------------------------------
template <bool Backward, int N>
__device__ __forceinline__ void produce(Storage<N>& s, const TensorMap& tokens, const TensorMap& patterns,
                                        const Schedule<N>& schedule) {
  const int half = static_cast<int>(ptx::cluster_rank());
  Ring<kTokenSlots> token;
  Ring<Storage<N>::kStages> stage;
  schedule.each_tile([&](const Tile& tile) {
    for (int chunk = 0; chunk < schedule.chunks; ++chunk)
      for (int p = tile.p_begin; p < tile.p_end; ++p)
        for (int k = schedule.chunk_begin(chunk); k < schedule.chunk_begin(chunk + 1); ++k) {
          // Empty in both blocks: this thread writes to both. The other block's half may land here before this line.
          ptx::wait(s.patterns_empty[stage.slot], stage.parity ^ 1);
          // So all steps but the last kStages are over, in this block too, and with them the last use of what is in this
          // slot: kTokenSlots steps back or more.
          static_assert(Storage<N>::kStages <= kTokenSlots);
          if (p == tile.p_begin) {
            ptx::arrive_expecting(s.tokens_full[token.slot], kRows * kLine);
            ptx::copy_box(s.tokens[token.slot], tokens, k * kDepth, tile.t0, s.tokens_full[token.slot]);
            token.advance();
          }
          ptx::arrive_expecting(s.patterns_full[stage.slot], N * kLine);
          const int n = tile.column * N + half * (N / kPair);
          ptx::copy_box_to_all(s.patterns[stage.slot] + half * (N / kPair * kLine), patterns, Backward ? n : k * kDepth,
                               Backward ? k * kDepth : n, p, s.patterns_full[stage.slot], (1 << kPair) - 1);
          stage.advance();
        }
  });
}

// ---- consumers: two warpgroups -------------------------------------------------------------------------------------
// Two values in one register.
template <class V>
__device__ inline uint32_t bits_of(V x) {
  uint16_t bits;
  memcpy(&bits, &x, 2);
  return bits;
}
template <class V>
__device__ inline float low(uint32_t pair) {
  const uint16_t bits = static_cast<uint16_t>(pair);
  V x;
  memcpy(&x, &bits, 2);
  return to_float(x);
}
template <class V>
__device__ inline uint32_t pack(float low, float high) {
  V pair[2];
  from_float(low, &pair[0]);
  from_float(high, &pair[1]);
  return bits_of(pair[0]) | bits_of(pair[1]) << 16;
}
struct alignas(16) Sixteen {
  uint32_t words[4];
};

// Thread (row, quad) of a warp holds rows t and t + 8 of its tile, columns n0 + 8 j + {0, 1}.
struct Place {
  int group, lane, quad, row;
  __device__ Place()
      : group(threadIdx.x / kGroup), lane(threadIdx.x % kWarp), quad(lane % 4),
        row(group * 64 + threadIdx.x % kGroup / kWarp * 16 + lane / 4) {}
};

// Where wgmma finds an operand in lines of 128 bytes as TMA leaves them: eight lines make an atom of 1024 bytes, in which
// the 16-byte units are swizzled by address bits, so a step within a line is plain addition. PTX ISA, "Matrix descriptor".
__device__ inline uint64_t describe(const uint8_t* start, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return (ptx::shared_address(start) & 0x3ffff) >> 4 | uint64_t{leading_bytes >> 4} << 16 |
         uint64_t{stride_bytes >> 4} << 32 | kSwizzle128 << 62;
}
// Lines along the depth: the stride leads to the next 8 rows, the leading offset is not used.
__device__ inline uint64_t along_depth(const uint8_t* start) { return describe(start, 16, 8 * kLine); }
// Lines along the columns: the stride leads 8 deeper, the leading offset to the next 64 columns.
__device__ inline uint64_t along_columns(const uint8_t* start) { return describe(start, kDepth * kLine, 8 * kLine); }

// The sums of one chunk of one pattern.
template <bool Backward, class V, int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 2], Storage<N>& s, const Place& at, int depth, bool first,
                                         Ring<kTokenSlots> token, Ring<Storage<N>::kStages>& stage) {
  const auto release = [&](int slot) {  // to the producers of both blocks: they fill it together
    if (at.lane < kPair) ptx::arrive_at(s.patterns_empty[slot], at.lane);
  };
  int previous = 0;
  for (int k = 0; k < depth; ++k) {
    if (first) ptx::wait(s.tokens_full[token.slot], token.parity);
    ptx::wait(s.patterns_full[stage.slot], stage.parity);
    const uint8_t* left = s.tokens[token.slot] + at.group * (64 * kLine);
    const uint8_t* right = s.patterns[stage.slot];
    ptx::pin(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int part = 0; part < kDepth / 16; ++part) {
      const uint64_t b = Backward ? along_columns(right + part * (16 * kLine)) : along_depth(right + part * 32);
      ptx::wgmma<V, N, Backward>(sums, along_depth(left + part * 32), b, k + part > 0);
    }
    ptx::wgmma_commit();
    ptx::pin(sums);
    if (k > 0) {  // the step before is done; this one keeps the tensor cores busy meanwhile
      ptx::wgmma_wait<1>();
      release(previous);
    }
    previous = stage.slot;
    token.advance(), stage.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::pin(sums);
  release(previous);
}

// As below, for every type and number of columns. In float32 the four threads of a row fill 32 bytes.
template <class Y, int N>
__device__ __forceinline__ void store_singly(const float (&total)[N / 2], int half, Y* y, int n0, int64_t columns, int quad) {
  if (!y) return;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = n0 + 8 * j + 2 * quad + e;
      if (n < columns) from_float(total[4 * j + half + e], y + n);
    }
}

// A row, which lies in total[4 j + half + {0, 1}], to y, where its first column is; null: there is no such row.
template <class V, int N>
__device__ __forceinline__ void store(const float (&total)[N / 2], int half, V* y, int n0, int64_t columns, int quad) {
  if (columns % 8 == 0) {  // 4 x 4 pairs change places among four threads, so that each stores 16 bytes of the row
#pragma unroll
    for (int j = 0; j < N / 8; j += 4) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = pack<V>(total[4 * (j + i) + half], total[4 * (j + i) + half + 1]);
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const bool high = quad & step;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!(i & step)) {
            const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + step], step);
            (high ? v[i] : v[i + step]) = got;
          }
      }
      const int n = n0 + 8 * (j + quad);
      if (y && n < columns) *reinterpret_cast<Sixteen*>(y + n) = {v[0], v[1], v[2], v[3]};
    }
  } else {
    store_singly<V, N>(total, half, y, n0, columns, quad);
  }
}

template <bool Backward, class V, int N>
__device__ __forceinline__ void consume(Storage<N>& s, const Problem& g, const Plan& plan, const Schedule<N>& schedule) {
  const Place at;
  Ring<kTokenSlots> token;
  Ring<Storage<N>::kStages> stage;
  schedule.each_tile([&](const Tile& tile) {
    const int n0 = tile.column * N, t = tile.t0 + at.row;
    float total[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) total[i] = 0;
    uint32_t x[Backward ? N / 4 : 1];  // pairs, where the sums lie: every pattern's sums meet all of them
    if (Backward) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int row = t + i % 2 * 8, n = n0 + i / 2 * 8 + 2 * at.quad;
        const V* from = static_cast<const V*>(g.x) + row * g.x_stride + n;
        x[i] = (row < g.T && n < g.N ? bits_of(from[0]) : 0) | (row < g.T && n + 1 < g.N ? bits_of(from[1]) : 0) << 16;
      }
    }
    for (int chunk = 0; chunk < schedule.chunks; ++chunk) {
      const int depth = schedule.chunk_begin(chunk + 1) - schedule.chunk_begin(chunk);
      for (int p = tile.p_begin; p < tile.p_end; ++p) {
        float weight[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) weight[h] = t + 8 * h < g.T ? __ldg(g.weights + int64_t{t + 8 * h} * g.P + p) : 0.f;
        float sums[N / 2];
        multiply<Backward, V, N>(sums, s, at, depth, p == tile.p_begin, token, stage);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) total[i] += weight[i / 2 % 2] * sums[i];
        if (Backward) {
          float dot[2] = {0, 0};
          ptx::pin(x);  // else they are unpacked once for all patterns, into twice the registers
#pragma unroll
          for (int i = 0; i < N / 4; ++i) {
            dot[i % 2] += sums[2 * i] * low<V>(x[i]);
            dot[i % 2] += sums[2 * i + 1] * low<V>(x[i] >> 16);
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            dot[h] += __shfl_xor_sync(0xffffffffu, dot[h], 1);
            dot[h] += __shfl_xor_sync(0xffffffffu, dot[h], 2);
            float* part = g.parts + (int64_t{tile.column} * g.T + t + 8 * h) * g.P + p;
            if (at.quad == 0 && t + 8 * h < g.T) *part = chunk == 0 ? dot[h] : *part + dot[h];  // always this thread
          }
        }
      }
      for (int k = 0; k < depth; ++k) token.advance();
    }
    if (!Backward && g.bias && plan.splits == 1) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const int n = n0 + i / 4 * 8 + 2 * at.quad + i % 2;
        if (n < g.N) total[i] += __ldg(g.bias + n);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = t + 8 * h;
      const auto at_row = [&](auto* y, int64_t before) { return row < g.T ? y + (before + row) * g.N : nullptr; };
      if (plan.splits > 1) store_singly<float, N>(total, 2 * h, at_row(g.workspace, tile.split * g.T), n0, g.N, at.quad);
      else if (g.wide) store_singly<float, N>(total, 2 * h, at_row(static_cast<float*>(g.y), 0), n0, g.N, at.quad);
      else store<V, N>(total, 2 * h, at_row(static_cast<V*>(g.y), 0), n0, g.N, at.quad);
    }
  });
}

// ---- kernel --------------------------------------------------------------------------------------------------------
template <bool Backward, class V, int N>
__global__ void __launch_bounds__(kThreads, 1)
    route_kernel(const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap patterns,
                 const __grid_constant__ Problem g, const __grid_constant__ Plan plan) {
#ifdef DFN_SM90A
  Storage<N>& s = *reinterpret_cast<Storage<N>*>(ptx::shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTokenSlots; ++i) ptx::init(s.tokens_full[i], 1);
    for (int i = 0; i < Storage<N>::kStages; ++i)
      ptx::init(s.patterns_full[i], 1), ptx::init(s.patterns_empty[i], kPair * kReaders);
    ptx::publish_barriers();
  }
  ptx::cluster_sync();
  if (__shfl_sync(0xffffffffu, threadIdx.x / kGroup, 0) == 2) {
    ptx::keep_registers<40>();
    if (threadIdx.x == 2 * kGroup) produce<Backward, N>(s, tokens, patterns, Schedule<N>(g, plan));
    __syncwarp();
    ptx::cluster_sync();  // a block that ended could not take what the other one still sends
  } else {
    ptx::take_registers<232>();
    consume<Backward, V, N>(s, g, plan, Schedule<N>(g, plan));
    ptx::cluster_sync();
  }
#endif
}

}  // namespace dfn::route::sm90
