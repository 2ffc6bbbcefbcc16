// A GPU for tests, on one CPU thread: runs a kernel's blocks one after the other (those of a cluster together), each
// CUDA thread as a fiber. It finds what a wrong index, mask, barrier or wait does to the numbers; it says nothing of time.
//
// How to run a kernel here
//   1. The kernel and its launcher include only <cuda_runtime.h>, <cuda_bf16.h>, <cuda_fp16.h>, "cuda/ptx.h" and
//      "cuda/launch.h" (and plain headers), call every PTX instruction through a function of ptx.h, take shared memory
//      from ptx::shared_memory() alone, and start with launch(). Then g++ compiles the same source, unchanged, once
//      this folder comes before csrc/ in the include path: the headers of those names here take the place of the real
//      ones (`g++ -std=c++20 -O1 -Itests/cuda_emulator -Icsrc -x c++ kernel.cu`).
//   2. A new instruction gets a wrapper in csrc/cuda/ptx.h (or a header of its own) and one of the same name and
//      arguments here, written from the PTX ISA's tables, not from the kernel:
//        - what a warp (or warpgroup) does together: `collective`. The last thread to arrive sees everybody's
//          arguments and writes everybody's results;
//        - what completes later (a bulk copy, wgmma): `defer(action)` and, where somebody waits, `wait(channel)` in a
//          loop until the condition holds; the action calls `wake(channel)`;
//        - where the ISA demands something (alignment, range), `fail(...)` if it does not hold.
//   3. A driver with a C interface (pattern_route.cpp) is compiled by the test and called through ctypes.
//
// What makes mistakes show
//   - Threads run to their next meeting point in an order of priority, given to `emulator_reset`: ascending, descending, or
//     shuffled by a seed. The first warp so runs ahead as far as the barriers let it: a missing one shows.
//   - Shared memory starts as NaN. The target of an asynchronous copy becomes NaN when the copy is issued and gets its
//     data when the issuing thread waits for it; deferred actions come when nobody can run, the oldest first (ascending) or
//     the newest (descending), or at random, soon (odd seeds) or late. Too early a read finds NaN, and so does a reader
//     that was overtaken.
//   - allocate() ends at a page that faults; an access beyond it, a deadlock, a divergent collective, a misaligned
//     address end the launch with a message. Conflicts of shared-memory banks in ldmatrix are counted.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running thread

namespace emulator {

// ---- memory that ends where it ends -----------------------------------------------------------------------------------
constexpr size_t kPage = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN as float16, bfloat16, float32 and float64

// `bytes` of poison that end at an inaccessible page, or up to align - 1 bytes before it. Never freed: tests are short.
inline void* allocate(size_t bytes, size_t align) {
  const size_t rounded = (bytes + align - 1) / align * align, pages = (rounded + kPage - 1) / kPage * kPage + kPage;
  char* base = static_cast<char*>(mmap(nullptr, pages + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  mprotect(base, pages, PROT_READ | PROT_WRITE);
  memset(base, kPoison, pages);
  return base + pages - rounded;
}

// ---- threads, warps, blocks ---------------------------------------------------------------------------------------------
struct Copy {
  void* to;
  const void* from;
  int bytes, valid;  // the rest is filled with zeros
};

struct Meeting {  // where several threads wait for each other
  int arrived = 0;
  uint64_t round = 0;
  const char* what = nullptr;
  std::vector<void*> slots;
};

struct Block;
struct Thread {
  dim3 place;
  int index, lane;  // in the block, in the warp
  Block* block;
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false, ready = true;
  const void* channel = nullptr;
  const char* waits_for = "";
  std::vector<Copy> open_copies;                 // issued, not committed
  std::vector<std::vector<Copy>> copy_groups;    // committed, oldest first
  std::shared_ptr<void> more;                    // what headers of further instructions keep
};

struct Block {
  dim3 place;
  int rank;  // in its cluster
  size_t shared_bytes;
  char* shared;
  std::vector<Meeting> warps, warpgroups, barriers;
  std::vector<Block*>* cluster;
};

struct Grid {
  unsigned blocks, threads;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
};

struct World {
  unsigned order = 0;                            // 0: ascending, 1: descending, else the seed of a shuffle
  int multiprocessors = 4;                       // what launchers are told
  uint64_t bank_conflicts = 0, launches = 0;
  std::string error;
  std::mt19937 random;
  std::vector<std::unique_ptr<Thread>> threads;  // of the running cluster
  std::vector<Thread*> ranked;                   // by priority, the first runs first
  std::vector<std::function<void()>> deferred;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::function<void()> body;
  Thread* running = nullptr;
  jmp_buf scheduler;
};
inline World world;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedLimit = 227 << 10;

inline Thread& self() { return *world.running; }
inline Block& block() { return *self().block; }
inline Meeting& warp() { return block().warps[self().index / 32]; }

inline std::string name_of(const Thread& t) {
  return "block " + std::to_string(t.block->place.x) + " thread " + std::to_string(t.index);
}

// Ends the launch with a message.
[[noreturn]] inline void fail(const std::string& what) {
  if (world.error.empty()) world.error = (world.running ? name_of(self()) + ": " : std::string()) + what;
  _longjmp(world.scheduler, 1);
}

// Lets others run until somebody calls wake(channel). May return early: call it in a loop.
__attribute__((noinline)) inline void wait(const void* channel, const char* what) {
  Thread& me = self();
  me.ready = false;
  me.channel = channel;
  me.waits_for = what;
  if (!_setjmp(me.at)) _longjmp(world.scheduler, 1);
}

inline void wake(const void* channel) {
  for (auto& t : world.threads)
    if (!t->ready && t->channel == channel) t->ready = true;
}

// `action` happens some time later, at the latest when no thread can run.
inline void defer(std::function<void()> action) { world.deferred.push_back(std::move(action)); }

// `members` threads meet; the last one calls together(slots), where slots[i] is what member i gave.
template <class Together>
void collective(Meeting& meeting, const char* what, int member, int members, void* mine, Together together) {
  if (meeting.arrived > 0 && meeting.what != what && strcmp(meeting.what, what) != 0)
    fail(std::string("threads diverged: one in ") + what + ", another in " + meeting.what);
  meeting.what = what;
  meeting.slots.resize(members);
  meeting.slots[member] = mine;
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    ++meeting.round;
    together(meeting.slots.data());
    wake(&meeting);
  } else {
    const uint64_t round = meeting.round;
    while (meeting.round == round) wait(&meeting, what);
  }
}

// All 32 lanes; together(slots) with slots[lane].
template <class Together>
void warp_collective(const char* what, void* mine, Together together) {
  collective(warp(), what, self().lane, 32, mine, together);
}

// A barrier of `members` threads of the block; __syncthreads is number 0 of all of them. `stays` false: arrive only.
inline void barrier(int number, int members, bool stays = true) {
  Meeting& b = block().barriers[number];
  if (++b.arrived == members) {
    b.arrived = 0;
    ++b.round;
    wake(&b);
  } else if (stays) {
    const uint64_t round = b.round;
    while (b.round == round) wait(&b, "a barrier");
  }
}

// ---- asynchronous copies of a thread (cp.async) -------------------------------------------------------------------------
inline void check_shared(const void* p, size_t bytes, size_t align, const char* what) {
  const char* c = static_cast<const char*>(p);
  const Block& b = block();
  if (c < b.shared || c + bytes > b.shared + b.shared_bytes) fail(std::string(what) + ": outside of shared memory");
  if (reinterpret_cast<uintptr_t>(p) % align) fail(std::string(what) + ": misaligned in shared memory");
}

inline void copy_async(void* to, const void* from, int bytes, int valid) {
  check_shared(to, bytes, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("cp.async: misaligned in global memory");
  if (valid < 0 || valid > bytes) fail("cp.async: source size out of range");
  memset(to, kPoison, bytes);
  self().open_copies.push_back({to, from, bytes, valid});
}
inline void copy_commit() {
  self().copy_groups.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}
inline void copy_wait(int pending) {
  auto& groups = self().copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& c : groups.front()) {
      memset(c.to, 0, c.bytes);
      memcpy(c.to, c.from, c.valid);
    }
    groups.erase(groups.begin());
  }
}

// ---- the scheduler ------------------------------------------------------------------------------------------------------
inline void thread_main() {
  world.body();
  self().done = true;
  self().ready = false;
  _longjmp(world.scheduler, 1);
}

// Runs one thread until it waits, ends or fails.
__attribute__((noinline)) inline void resume(Thread& t) {
  world.running = &t;
  threadIdx = t.place;
  blockIdx = t.block->place;
  if (!_setjmp(world.scheduler)) {
    if (t.started) _longjmp(t.at, 1);
    t.started = true;
    setcontext(&t.start);
  }
  world.running = nullptr;
}

inline void on_fault(int) {
  if (world.running == nullptr) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  world.error = name_of(self()) + ": access outside of the memory it was given";
  _longjmp(world.scheduler, 1);
}

inline void run_deferred(size_t i) {
  auto action = std::move(world.deferred[i]);
  world.deferred.erase(world.deferred.begin() + i);
  action();
}

inline void run_cluster(std::vector<Block*>& blocks, unsigned threads) {
  world.threads.clear();
  world.deferred.clear();
  for (Block* b : blocks)
    for (unsigned i = 0; i < threads; ++i) {
      auto t = std::make_unique<Thread>();
      t->block = b;
      t->index = static_cast<int>(i);
      t->lane = static_cast<int>(i % 32);
      t->place = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      if (world.stacks.size() <= world.threads.size()) world.stacks.emplace_back(new char[kStack]);
      getcontext(&t->start);
      t->start.uc_stack.ss_sp = world.stacks[world.threads.size()].get();
      t->start.uc_stack.ss_size = kStack;
      t->start.uc_link = nullptr;
      makecontext(&t->start, thread_main, 0);
      world.threads.push_back(std::move(t));
    }
  // Whole warps take their turn; the order of lanes in a warp matters little.
  std::vector<std::vector<Thread*>> warps;
  for (auto& t : world.threads) {
    if (t->lane == 0) warps.emplace_back();
    warps.back().push_back(t.get());
  }
  if (world.order == 1) std::reverse(warps.begin(), warps.end());
  if (world.order > 1) std::shuffle(warps.begin(), warps.end(), world.random);
  world.ranked.clear();
  for (auto& w : warps) world.ranked.insert(world.ranked.end(), w.begin(), w.end());

  while (world.error.empty()) {
    if (world.order > 1 && !world.deferred.empty() && world.random() % (world.order % 2 ? 4 : 256) == 0)
      run_deferred(world.random() % world.deferred.size());
    Thread* next = nullptr;
    for (Thread* t : world.ranked)
      if (t->ready) {
        next = t;
        break;
      }
    if (next) {
      resume(*next);
    } else if (!world.deferred.empty()) {
      const size_t last = world.deferred.size() - 1;
      run_deferred(world.order == 0 ? 0 : world.order == 1 ? last : world.random() % (last + 1));
    } else {
      for (auto& t : world.threads)
        if (!t->done && world.error.empty()) world.error = name_of(*t) + ": deadlock, waits for " + t->waits_for;
      return;
    }
  }
}

// Runs `body` as every thread of the grid. After an error nothing more runs: world.error says what happened.
inline void run(const Grid& grid, dim3 block_shape, std::function<void()> body) {
  if (!world.error.empty()) return;
  if (grid.blocks == 0 || grid.threads == 0 || grid.threads > 1024 || grid.threads % 32 || grid.blocks % grid.cluster ||
      grid.shared_bytes > kSharedLimit) {
    world.error = "invalid launch configuration";
    return;
  }
  ++world.launches;
  world.body = std::move(body);
  world.random.seed(world.order);
  blockDim = block_shape;
  gridDim = {grid.blocks, 1, 1};
  static char signal_stack[64 << 10];
  const stack_t own{signal_stack, 0, sizeof signal_stack};
  stack_t before_stack;
  struct sigaction act = {}, before;
  act.sa_handler = on_fault;
  act.sa_flags = SA_ONSTACK | SA_NODEFER;
  sigaltstack(&own, &before_stack);
  sigaction(SIGSEGV, &act, &before);

  const size_t room = (grid.shared_bytes + 1023) / 1024 * 1024;  // aligned as wide as a swizzled tile needs
  std::vector<char*> memory;
  for (unsigned r = 0; r < grid.cluster; ++r) memory.push_back(static_cast<char*>(allocate(room, kPage)));
  for (unsigned first = 0; first < grid.blocks && world.error.empty(); first += grid.cluster) {
    std::vector<Block> blocks(grid.cluster);
    std::vector<Block*> cluster;
    for (unsigned r = 0; r < grid.cluster; ++r) {
      Block& b = blocks[r];
      b.place = {first + r, 0, 0};
      b.rank = static_cast<int>(r);
      b.shared_bytes = grid.shared_bytes;
      b.shared = memory[r];
      memset(b.shared, kPoison, room);
      b.warps.resize(grid.threads / 32);
      b.warpgroups.resize((grid.threads + 127) / 128);
      b.barriers.resize(16);
      b.cluster = &cluster;
      cluster.push_back(&b);
    }
    run_cluster(cluster, grid.threads);
    for (Block& b : blocks)
      for (size_t i = grid.shared_bytes; i < room; ++i)
        if (static_cast<unsigned char>(b.shared[i]) != kPoison && world.error.empty())
          world.error = "written beyond the end of shared memory";
  }
  world.threads.clear();
  sigaction(SIGSEGV, &before, nullptr);
  sigaltstack(&before_stack, nullptr);
}

}  // namespace emulator

// ---- what a driver shows to its test -------------------------------------------------------------------------------------
extern "C" {
inline __attribute__((used)) void* emulator_allocate(size_t bytes, size_t align) { return emulator::allocate(bytes, align); }
inline __attribute__((used)) void emulator_reset(unsigned order, int multiprocessors) {
  emulator::world.order = order;
  emulator::world.multiprocessors = multiprocessors;
  emulator::world.bank_conflicts = emulator::world.launches = 0;
  emulator::world.error.clear();
}
inline __attribute__((used)) const char* emulator_error() { return emulator::world.error.c_str(); }
inline __attribute__((used)) uint64_t emulator_bank_conflicts() { return emulator::world.bank_conflicts; }
inline __attribute__((used)) uint64_t emulator_launches() { return emulator::world.launches; }
}
