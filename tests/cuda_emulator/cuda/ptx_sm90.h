// In place of csrc/cuda/ptx_sm90.h: the same functions on the CPU, after the PTX ISA.
//
// What makes mistakes show, beyond emulator.h: a copy lands in pieces, at any time after its issue, and until then its
// target is NaN; a wgmma reads shared memory and writes its sums at once or only when it is waited for, as a coin falls,
// each warp for itself. So too early a read, too early a release and a forgotten wait change the numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <deque>

#include "cuda/ptx.h"
#include "cuda/tensor_map.h"

#define DFN_SM90A 1

namespace dfn::ptx {

// Addresses in the shared window: not 0 for the first byte of a kernel's own, as on the device.
constexpr uint32_t kSharedStart = 1024;
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulator::block().shared) + kSharedStart;
}

namespace detail {
constexpr int kLineBytes = 128;

// 128-byte swizzle: address bits 4-6 are XORed with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

template <class T>
T* there(T* here, const emulator::Block& block) {  // the same place in another block of the cluster
  return reinterpret_cast<T*>(block.shared + (reinterpret_cast<const char*>(here) - emulator::block().shared));
}
}  // namespace detail

// ---- cluster --------------------------------------------------------------------------------------------------------
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulator::block().rank); }

inline void cluster_sync() {
  const auto& cluster = *emulator::block().cluster;
  const int members = static_cast<int>(cluster.size() * blockDim.x);
  emulator::Meeting& meeting = cluster[0]->barriers[15];
  emulator::collective(meeting, "barrier.cluster", meeting.arrived, members, nullptr, [](void**) {});
}

// ---- registers ------------------------------------------------------------------------------------------------------
template <int Count>
void keep_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256);
  emulator::warp_collective("setmaxnreg.dec", nullptr, [](void**) {});
}
template <int Count>
void take_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256);
  emulator::warp_collective("setmaxnreg.inc", nullptr, [](void**) {});
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------
using Barrier = uint64_t;

namespace detail {
// What the 64 bits hold. All ones, as shared memory begins: no barrier.
struct State {
  uint64_t expected : 20, pending : 20, phase : 1, published : 1;
  int64_t bytes : 22;
};
constexpr uint64_t kNone = (1 << 20) - 1;

inline void complain(const char* what) {  // also where no thread runs, so that fail() cannot be called
  if (emulator::world.running) emulator::fail(what);
  if (emulator::world.error.empty()) emulator::world.error = what;
}

// The peer's memory is gone when the peer has ended.
inline bool has_ended(const char* p) {
  for (const auto& t : emulator::world.threads) {
    const emulator::Block& b = *t->block;
    if (p >= b.shared && p < b.shared + b.shared_bytes && !t->done) return false;
  }
  return true;
}

// Adds to what is open, and ends the phase if nothing is.
inline void update(Barrier& barrier, int arrivals, int64_t bytes) {
  State state;
  memcpy(&state, &barrier, sizeof state);
  if (has_ended(reinterpret_cast<const char*>(&barrier))) return complain("mbarrier: its block has ended");
  if (state.expected == kNone) return complain("mbarrier: not initialised");
  if (!state.published) return complain("mbarrier: used by others before fence.mbarrier_init");
  if (static_cast<int64_t>(state.pending) < arrivals) return complain("mbarrier: more arrivals than the phase expects");
  if (std::abs(state.bytes + bytes) >= 1 << 20) return complain("mbarrier: tx-count out of range");
  state.pending -= arrivals;
  state.bytes += bytes;
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
    emulator::wake(&barrier);
  }
  memcpy(&barrier, &state, sizeof state);
}
inline std::vector<Barrier*> unpublished;
}  // namespace detail

inline void init(Barrier& barrier, uint32_t arrivals) {
  emulator::check_shared(&barrier, 8, 8, "mbarrier.init");
  detail::State state{arrivals, arrivals, 0, 0, 0};
  memcpy(&barrier, &state, sizeof state);
  detail::unpublished.push_back(&barrier);
}
inline void publish_barriers() {
  for (Barrier* barrier : detail::unpublished) {
    detail::State state;
    memcpy(&state, barrier, sizeof state);
    state.published = 1;
    memcpy(barrier, &state, sizeof state);
  }
  detail::unpublished.clear();
}

inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  emulator::check_shared(&barrier, 8, 8, "mbarrier.arrive.expect_tx");
  detail::update(barrier, 0, bytes);
  detail::update(barrier, 1, 0);
}
inline void arrive_at(Barrier& barrier, uint32_t rank) {
  emulator::check_shared(&barrier, 8, 8, "mbarrier.arrive");
  const auto& cluster = *emulator::block().cluster;
  if (rank >= cluster.size()) emulator::fail("mapa: no such block in the cluster");
  detail::update(*detail::there(&barrier, *cluster[rank]), 1, 0);
}
inline void wait(Barrier& barrier, uint32_t parity) {
  emulator::check_shared(&barrier, 8, 8, "mbarrier.try_wait");
  for (;;) {
    detail::State state;
    memcpy(&state, &barrier, sizeof state);
    if (state.expected == detail::kNone) emulator::fail("mbarrier.try_wait: not initialised");
    if (state.phase != parity) return;  // the phase of this parity is over
    emulator::wait(&barrier, "an mbarrier");
  }
}

// ---- TMA ------------------------------------------------------------------------------------------------------------
namespace detail {
// Writes lines [begin, end) of the box into `block`.
inline void land(emulator::Block& block, uint32_t to, const TensorMap& map, const int (&corner)[3], int begin, int end) {
  for (int line = begin; line < end; ++line) {
    const int64_t at[3] = {0, corner[1] + line % map.axes[1].box, map.rank < 3 ? 0 : corner[2] + line / map.axes[1].box};
    for (int e = 0; e < map.axes[0].box; ++e) {
      bool inside = corner[0] + e >= 0 && corner[0] + e < map.axes[0].size;
      int64_t from = corner[0] + e;
      for (int axis = 1; axis < map.rank; ++axis) {
        inside = inside && at[axis] >= 0 && at[axis] < map.axes[axis].size;
        from += at[axis] * map.axes[axis].stride;
      }
      char* target = block.shared + (swizzled(to + line * kLineBytes + e * 2) - kSharedStart);
      if (inside) memcpy(target, map.data + from * 2, 2);
      else memset(target, 0, 2);
    }
  }
}

inline void copy(void* to, const TensorMap& map, const int (&corner)[3], Barrier& barrier, unsigned blocks) {
  const int lines = map.axes[1].box * (map.rank < 3 ? 1 : map.axes[2].box);
  if (map.axes[0].box * 2 != kLineBytes) emulator::fail("TMA: the emulator knows lines of 128 bytes alone");
  emulator::check_shared(to, lines * kLineBytes, 1024, "TMA");  // 128 by the ISA; 1024 for the swizzle to start anew
  emulator::check_shared(&barrier, 8, 8, "TMA: mbarrier");
  const auto& cluster = *emulator::block().cluster;
  if (blocks >> cluster.size()) emulator::fail("TMA: no such block in the cluster");
  const uint32_t address = shared_address(to);
  for (emulator::Block* block : cluster) {
    if (!(blocks >> block->rank & 1)) continue;
    memset(there(static_cast<char*>(to), *block), emulator::kPoison, lines * kLineBytes);
    Barrier* signal = there(&barrier, *block);
    for (int piece = 0; piece < 2; ++piece) {
      const int begin = piece * lines / 2, end = (piece + 1) * lines / 2;
      emulator::defer([=, first = corner[0], second = corner[1], third = corner[2]] {
        land(*block, address, map, {first, second, third}, begin, end);
        update(*signal, 0, -int64_t{end - begin} * kLineBytes);
      });
    }
  }
}
}  // namespace detail

inline void copy_box(void* to, const TensorMap& from, int c0, int c1, Barrier& barrier) {
  if (from.rank != 2) emulator::fail("TMA: expected a tensor of 2 axes");
  detail::copy(to, from, {c0, c1, 0}, barrier, 1u << emulator::block().rank);
}
inline void copy_box_to_all(void* to, const TensorMap& from, int c0, int c1, int c2, Barrier& barrier, uint16_t blocks) {
  if (from.rank != 3) emulator::fail("TMA: expected a tensor of 3 axes");
  detail::copy(to, from, {c0, c1, c2}, barrier, blocks);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
namespace detail {
// Values of an operand that a descriptor names: bits 0-13 start / 16, 16-29 leading offset / 16, 32-45 stride offset / 16,
// 49-51 base offset, 62-63 swizzle (1: 128 bytes). Tables "Leading / Stride dimension byte offset" of the ISA, swizzled:
//   K-major: stride offset from 8 rows to the next 8.  MN-major: leading offset from 64 values to the next, stride
//   offset from 8 deep to the next 8.
struct Operand {
  uint32_t start, leading, stride;
  const emulator::Block* block;
  Operand(uint64_t bits, const emulator::Block* of)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4), block(of) {
    if (bits >> 62 != 1) complain("wgmma: the emulator knows the 128-byte swizzle alone");
    if ((start >> 7 & 7) != (bits >> 49 & 7)) complain("wgmma: the base offset does not fit the start address");
  }
  uint16_t read(uint32_t address) const {
    const uint32_t at = swizzled(address) - kSharedStart;
    if (at + 2 > block->shared_bytes) return complain("wgmma: outside of shared memory"), 0;
    uint16_t bits;
    memcpy(&bits, block->shared + at, 2);
    return bits;
  }
  uint16_t along_depth(int mn, int k) const { return read(start + mn / 8 * stride + mn % 8 * kLineBytes + k * 2); }
  uint16_t along_columns(int mn, int k) const {
    return read(start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * kLineBytes);
  }
};

struct MatrixQueue {  // of a warp; kept by its first thread
  bool fenced = false;
  int pending = 0;
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};
inline MatrixQueue& queue_of(emulator::Thread& first) {
  if (!first.more) first.more = std::make_shared<MatrixQueue>();
  return *static_cast<MatrixQueue*>(first.more.get());
}
struct MatrixCall {
  emulator::Thread* thread;
  float* d;
  uint64_t a, b;
  bool add;
};

// The 16 rows of one warp. Thread `lane` has of row lane / 4 (d[4 j + 0, 1]) and the 8th below (d[4 j + 2, 3]) the columns
// 8 j + 2 (lane % 4) and the next.
template <class V, int N, bool AlongColumns>
void multiply(const std::vector<MatrixCall>& lanes) {
  const emulator::Thread& first = *lanes[0].thread;
  const Operand a(lanes[0].a, first.block), b(lanes[0].b, first.block);
  const int row0 = first.index / 32 % 4 * 16;
  static float A[16][16], B[16][N];
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 16; ++m) A[m][k] = widen(a.along_depth(row0 + m, k), V{});
    for (int n = 0; n < N; ++n) B[k][n] = widen(AlongColumns ? b.along_columns(n, k) : b.along_depth(n, k), V{});
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < N / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = lanes[0].add ? lanes[lane].d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
      lanes[lane].d[i] = sum;
    }
}
}  // namespace detail

inline void wgmma_fence() {
  if (emulator::self().lane == 0) detail::queue_of(emulator::self()).fenced = true;
}

template <class V, int N, bool AlongColumns>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  detail::MatrixCall call{&emulator::self(), d, a, b, add};
  emulator::warp_collective("wgmma.mma_async", &call, [](void** slots) {
    std::vector<detail::MatrixCall> lanes;
    for (int lane = 0; lane < 32; ++lane) lanes.push_back(*static_cast<detail::MatrixCall*>(slots[lane]));
    for (const auto& other : lanes)
      if (other.a != lanes[0].a || other.b != lanes[0].b || other.add != lanes[0].add)
        emulator::fail("wgmma: threads of a warp give different descriptors");
    detail::MatrixQueue& queue = detail::queue_of(*lanes[0].thread);
    if (!queue.fenced) emulator::fail("wgmma: accumulators were touched since the last wgmma.fence");
    const unsigned order = emulator::world.order;
    if (queue.pending == 0 && (order == 1 || (order > 1 && emulator::world.random() % 2)))
      return detail::multiply<V, N, AlongColumns>(lanes);
    ++queue.pending;
    queue.open.push_back([lanes] { detail::multiply<V, N, AlongColumns>(lanes); });
  });
}

inline void wgmma_commit() {
  if (emulator::self().lane != 0) return;
  detail::MatrixQueue& queue = detail::queue_of(emulator::self());
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

template <int Pending>
void wgmma_wait() {
  emulator::Thread* thread = &emulator::self();
  emulator::warp_collective("wgmma.wait_group", thread, [](void** slots) {
    detail::MatrixQueue& queue = detail::queue_of(*static_cast<emulator::Thread*>(slots[0]));
    while (queue.groups.size() > Pending) {
      for (const auto& multiply : queue.groups.front()) multiply(), --queue.pending;
      queue.groups.pop_front();
    }
    if (Pending == 0) queue.fenced = false;  // now the accumulators are free to be touched
  });
}

template <int Count>
void pin(float (&)[Count]) {}
template <int Count>
void pin(uint32_t (&)[Count]) {}

}  // namespace dfn::ptx
