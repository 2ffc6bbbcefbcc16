// Orders and transposed lists by counting: how many things point to each place, where its list begins, the things filled
// in, each list sorted. Atomics only count, and what their order changes the sort puts right: the same bits in every run.
// A spatial order is the same of points that point to cells. Static shapes, nothing for the host to wait for. On a
// GPU (H200) it was right while things came in their own order; with one given it has run in the tests' emulator only.
#include "cuda/gaussian_gather.h"

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace dfn::gather {
namespace {

constexpr int kThreads = 256;
constexpr int kScanItems = 16;                    // of a thread
constexpr int kScanTile = kThreads * kScanItems;  // places of a block
constexpr int kSortLanes = 8;                     // that sort a list together
constexpr int kLong = 1024;                       // a longer list is left to long_lists_kernel

template <class T>
__device__ T* as(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

// The place that a thing of any list points to, counted over all lists; -1: none.
template <class Index, class Target>
__device__ int64_t place_of(const Lists& g, Index thing) {
  const int64_t target = static_cast<const Target*>(g.targets)[thing], list = thing / static_cast<Index>(g.things);
  return static_cast<uint64_t>(target) < static_cast<uint64_t>(g.places) ? list * g.places + target : -1;
}

// The thing whose turn it is. In the order of a list's rows, neighbours in space come together, and so do the places that
// they point to: what is written to them one by one meets in the cache.
template <class Index>
__device__ Index thing_of(const Lists& g, Index turn) {
  if (!g.order) return turn;
  using Unsigned = std::make_unsigned_t<Index>;
  const Unsigned things = static_cast<Unsigned>(g.things), per = static_cast<Unsigned>(g.per);
  const Unsigned list = static_cast<Unsigned>(turn) / things, inside = static_cast<Unsigned>(turn) - list * things;
  const Unsigned row = inside / per;
  return static_cast<Index>(list * things + g.order[list * (things / per) + row] * per + inside - row * per);
}

// How many pointed to the place before this thing; in the order in which the GPU happens to come by.
template <class Index, class Target>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Lists g) {
  const int64_t turn = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (turn >= g.lists * g.things) return;
  const Index thing = thing_of(g, static_cast<Index>(turn));
  const int64_t place = place_of<Index, Target>(g, thing);
  if (place >= 0) as<Index>(g.edges)[thing] = ptx::add_atomically(as<Index>(g.counts) + place, Index{1});
}

template <class Index>
__device__ Index largest_of_warp(Index x) {
  for (int step = 16; step > 0; step /= 2) {
    const Index other = __shfl_xor_sync(0xffffffffu, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// Over the threads of a block: the sums of those before, and of all, in `total`.
template <class Index>
__device__ Index sum_before(Index x, Index& total) {
  Index* warps = reinterpret_cast<Index*>(ptx::shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Index sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const Index other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Index before = 0;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return before + sum - x;
}

// Of each tile of places: the sum of the counts, and the largest.
template <class Index>
__global__ void __launch_bounds__(kThreads) tiles_kernel(const __grid_constant__ Lists g) {
  const int64_t first = int64_t{blockIdx.x} * kScanTile, all = g.lists * g.places;
  Index sum = 0, largest = 0;
  for (int i = 0; i < kScanItems; ++i) {
    const int64_t place = first + i * kThreads + threadIdx.x;
    const Index count = place < all ? as<const Index>(g.counts)[place] : 0;
    sum += count, largest = count > largest ? count : largest;
  }
  largest = largest_of_warp(largest);
  Index* most = reinterpret_cast<Index*>(ptx::shared_memory()) + kThreads / 32;
  if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = largest;
  Index total;
  sum_before(sum, total);  // its barriers make `most` known
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kThreads / 32; ++w) most[0] = most[w] > most[0] ? most[w] : most[0];
  as<Index>(g.tiles)[blockIdx.x] = total;
  as<Index>(g.tiles)[gridDim.x + blockIdx.x] = most[0];
}

// Where each list begins. Every block adds up the tiles before its own.
template <class Index>
__global__ void __launch_bounds__(kThreads) starts_kernel(const __grid_constant__ Lists g) {
  const int64_t first = int64_t{blockIdx.x} * kScanTile + threadIdx.x * kScanItems, all = g.lists * g.places;
  const Index* tiles = as<const Index>(g.tiles);
  Index* starts = as<Index>(g.starts);
  Index before = 0, base, total;
  for (unsigned tile = threadIdx.x; tile < blockIdx.x; tile += kThreads) before += tiles[tile];
  sum_before(before, base);
  Index counts[kScanItems], sum = 0;
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    counts[i] = first + i < all ? as<const Index>(g.counts)[first + i] : 0;
    sum += counts[i];
  }
  Index start = base + sum_before(sum, total);
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    if (first + i < all) starts[first + i] = start;
    start += counts[i];
  }
  if (blockIdx.x + 1 < gridDim.x || threadIdx.x >= 32) return;
  Index longest = 0;
  for (unsigned tile = threadIdx.x; tile < gridDim.x; tile += 32)
    longest = tiles[gridDim.x + tile] > longest ? tiles[gridDim.x + tile] : longest;
  longest = largest_of_warp(longest);
  if (threadIdx.x == 0) starts[all] = base + total, starts[all + 1] = longest;
}

template <class Index, class Target>
__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ Lists g) {
  const int64_t turn = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (turn >= g.lists * g.things) return;
  const Index thing = thing_of(g, static_cast<Index>(turn));
  const int64_t place = place_of<Index, Target>(g, thing);
  if (place < 0) return;
  const Index to = as<const Index>(g.starts)[place] + as<const Index>(g.edges)[thing];
  as<Index>(g.scratch)[to] = thing % static_cast<Index>(g.things);
}

// Each thing goes to where the number of smaller ones says.
template <class Index>
__global__ void __launch_bounds__(kThreads) sort_kernel(const __grid_constant__ Lists g) {
  const int64_t place = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kSortLanes;
  if (place >= g.lists * g.places) return;
  const Index* starts = as<const Index>(g.starts);
  const Index start = starts[place], count = starts[place + 1] - start;
  if (count > kLong) return;
  const Index* things = as<const Index>(g.scratch) + start;
  for (int i = threadIdx.x % kSortLanes; i < count; i += kSortLanes) {
    const Index mine = things[i];
    int smaller = 0;
    for (int t = 0; t < count; ++t) smaller += things[t] < mine;
    as<Index>(g.edges)[start + smaller] = mine;
  }
}

// ---- long lists: a block sorts one by its digits, the least first ---------------------------------------------------
constexpr int kLongThreads = 512, kLongWarps = kLongThreads / 32;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kLongItems = 4;  // of a thread, in a tile

struct LongMemory {
  int next[kDigits];                // where the next of each digit goes
  int counts[kLongWarps][kDigits];  // of a tile
};

// From `from` to `to`, stable: by one digit.
template <class Index>
__device__ void sort_by_digit(LongMemory& s, const Index* from, Index* to, int64_t count, int shift) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned below = (1u << lane) - 1;
  const auto digit_of = [&](Index thing) { return static_cast<int>(thing >> shift & (kDigits - 1)); };
  for (int d = threadIdx.x; d < kDigits; d += kLongThreads) s.next[d] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += kLongThreads) ptx::add_atomically(&s.next[digit_of(from[i])], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int d = 0; d < kDigits; ++d) {
      const int own = s.next[d];
      s.next[d] = sum;
      sum += own;
    }
  }
  for (int64_t tile = 0; tile < count; tile += kLongThreads * kLongItems) {
    for (int d = lane; d < kDigits; d += 32) s.counts[warp][d] = 0;
    __syncwarp();
    Index things[kLongItems];
    int digits[kLongItems], ranks[kLongItems];  // among the warp's things of this digit
#pragma unroll
    for (int i = 0; i < kLongItems; ++i) {
      const int64_t at = tile + (warp * kLongItems + i) * 32 + lane;
      const bool there = at < count;
      things[i] = there ? from[at] : 0;
      digits[i] = digit_of(things[i]);
      unsigned same = __ballot_sync(0xffffffffu, there);
#pragma unroll
      for (int bit = 0; bit < kDigitBits; ++bit) {
        const bool set = digits[i] >> bit & 1;
        const unsigned votes = __ballot_sync(0xffffffffu, set);
        same &= set ? votes : ~votes;
      }
      ranks[i] = there ? s.counts[warp][digits[i]] + __popc(same & below) : -1;
      __syncwarp();
      if (there && (same & below) == 0) s.counts[warp][digits[i]] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    for (int d = threadIdx.x; d < kDigits; d += kLongThreads) {
      int sum = s.next[d];
      for (int w = 0; w < kLongWarps; ++w) {
        const int own = s.counts[w][d];
        s.counts[w][d] = sum;
        sum += own;
      }
      s.next[d] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLongItems; ++i)
      if (ranks[i] >= 0) to[s.counts[warp][digits[i]] + ranks[i]] = things[i];
    __syncthreads();
  }
}

template <class Index>
__global__ void __launch_bounds__(kLongThreads) long_lists_kernel(const __grid_constant__ Lists g, int passes) {
  const Index* starts = as<const Index>(g.starts);
  const int64_t all = g.lists * g.places;
  if (starts[all + 1] <= kLong) return;
  LongMemory& s = *reinterpret_cast<LongMemory*>(ptx::shared_memory());
  // A long list lies across some multiple of kLong: the block of the first such multiple sorts it.
  for (int64_t cut = blockIdx.x * int64_t{kLong}; cut < starts[all]; cut += gridDim.x * int64_t{kLong}) {
    int64_t low = 0, high = all;  // the last place whose list begins at or before the cut
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle] <= cut)
        low = middle;
      else
        high = middle;
    }
    const int64_t start = starts[low], count = starts[low + 1] - start;
    if (count <= kLong || start <= cut - kLong) continue;
    Index *from = as<Index>(g.scratch) + start, *to = as<Index>(g.edges) + start;
    for (int pass = 0; pass < passes; ++pass) {  // an odd number: the last one ends in edges
      sort_by_digit(s, from, to, count, pass * kDigitBits);
      Index* other = from;
      from = to, to = other;
    }
  }
}

// ---- cells ----------------------------------------------------------------------------------------------------------
constexpr int kSamples = 4096;  // points of a list that decide where the grid lies

// The grid spans the bulk of the points; what lies outside belongs to its border. So outliers do no harm. By axis: the low
// end, and cells per unit of length.
template <class A>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const __grid_constant__ Cells g) {
  const int64_t list = blockIdx.x, step = g.n > kSamples ? g.n / kSamples : 1;
  const A* points = as<const A>(g.points) + list * g.n * g.D;
  double* sums = reinterpret_cast<double*>(ptx::shared_memory());  // [3][kThreads]
  for (int axis = 0; axis < 3 && axis < g.D; ++axis) {
    double sum = 0, squares = 0, count = 0;
    for (int64_t i = threadIdx.x * step; i < g.n; i += kThreads * step) {
      const double x = points[i * g.D + axis];
      if (x - x != 0) continue;  // NaN or infinite
      sum += x, squares += x * x, count += 1;
    }
    __syncthreads();
    sums[threadIdx.x] = sum, sums[kThreads + threadIdx.x] = squares, sums[2 * kThreads + threadIdx.x] = count;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half)
        for (int i = 0; i < 3; ++i) sums[i * kThreads + threadIdx.x] += sums[i * kThreads + threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      const double n = sums[2 * kThreads] > 0 ? sums[2 * kThreads] : 1, mean = sums[0] / n;
      const double variance = sums[kThreads] / n - mean * mean, deviation = variance > 0 ? sqrt(variance) : 0;
      g.bounds[list * 6 + axis] = mean - 2.2 * deviation;
      g.bounds[list * 6 + 3 + axis] = deviation > 0 ? (1 << g.bits) / (4.4 * deviation) : 0;
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) cells_kernel(const __grid_constant__ Cells g) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= g.lists * g.n) return;
  const int dims = g.D < 3 ? static_cast<int>(g.D) : 3, cells = 1 << g.bits;
  const double* bounds = g.bounds + i / g.n * 6;
  const A* point = as<const A>(g.points) + i * g.D;
  int32_t number = 0;
  bool spread = false;
  for (int axis = 0; axis < dims; ++axis) {
    const double scale = bounds[3 + axis], x = (point[axis] - bounds[axis]) * scale;
    const int at = !(x > 0) ? 0 : x >= cells ? cells - 1 : static_cast<int>(x);
    for (int bit = 0; bit < g.bits; ++bit) number |= (at >> bit & 1) << (bit * dims + axis);
    spread |= scale > 0;
  }
  // All in one place: as they come, not one cell with a long list.
  g.cells[i] = spread ? number : static_cast<int32_t>((i % g.n) * (int64_t{1} << (g.bits * dims)) / g.n);
}

int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }

template <class Index, class Target>
void make_lists_of(const Lists& g) {
  const int64_t things = g.lists * g.things, places = g.lists * g.places;
  const auto grid = [&](int64_t count, size_t shared) { return Grid{count, kThreads, shared, g.stream}; };
  const size_t sums = 2 * kThreads / 32 * sizeof(Index);
  const char* op = "gather_lists";
  if (things > 0) launch(op, count_kernel<Index, Target>, grid(blocks(things, kThreads), 0), g);
  launch(op, tiles_kernel<Index>, grid(scan_tiles(g), sums), g);
  launch(op, starts_kernel<Index>, grid(scan_tiles(g), sums), g);
  if (things * places == 0) return;
  launch(op, fill_kernel<Index, Target>, grid(blocks(things, kThreads), 0), g);
  launch(op, sort_kernel<Index>, grid(blocks(places, kThreads / kSortLanes), 0), g);
  if (g.things <= kLong) return;
  int passes = 1;
  while ((g.things - 1) >> (passes * kDigitBits)) passes += 2;
  const int64_t cuts = blocks(things, kLong), most = 2 * multiprocessors();
  launch(op, long_lists_kernel<Index>, Grid{cuts < most ? cuts : most, kLongThreads, sizeof(LongMemory), g.stream}, g, passes);
}

template <class A>
void find_cells_of(const Cells& g) {
  launch("gather_order", bounds_kernel<A>, Grid{g.lists, kThreads, 3 * kThreads * sizeof(double), g.stream}, g);
  launch("gather_order", cells_kernel<A>, Grid{blocks(g.lists * g.n, kThreads), kThreads, 0, g.stream}, g);
}

}  // namespace

int64_t scan_tiles(const Lists& g) {
  const int64_t tiles = blocks(g.lists * g.places, kScanTile);
  return tiles > 0 ? tiles : 1;
}

void make_lists(const Lists& g) {
  if (g.narrow_targets)
    g.wide ? make_lists_of<int64_t, int32_t>(g) : make_lists_of<int32_t, int32_t>(g);
  else
    g.wide ? make_lists_of<int64_t, int64_t>(g) : make_lists_of<int32_t, int64_t>(g);
}

void find_cells(const Cells& g) { g.dtype == Dtype::f64 ? find_cells_of<double>(g) : find_cells_of<float>(g); }

}  // namespace dfn::gather
