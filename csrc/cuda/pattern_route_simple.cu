// Pattern routing for float32 and float64: the plainest tiled kernel, without tensor cores. For problems so small that
// PyTorch's product and what follows it would mostly wait for their launches: dfn_kernels/cuda/pattern_route.py decides.
// What is computed: pattern_route.h. Run in the tests' emulator; as it stands, not yet run on a GPU.
#include "cuda/launch.h"
#include "cuda/pattern_route.h"
#include "cuda/ptx.h"

namespace dfn::route {
namespace {

constexpr int kTile = 64;            // rows and columns of sums of a block
constexpr int kDepth = 16;           // of the operands in shared memory
constexpr int kSide = 16;            // a block has kSide x kSide threads, each with kOwn x kOwn sums
constexpr int kOwn = kTile / kSide;  // rows ty + kSide * r and columns tx + kSide * c
constexpr int kThreads = kSide * kSide;

template <class A>
struct Operands {
  A left[kDepth][kTile + 1];  // the odd length spreads a column over the banks
  A right[kDepth][kTile + 1];
};

template <class A>
__device__ const A* as(const void* p) {
  return static_cast<const A*>(p);
}

template <bool Backward, class A>
__global__ void __launch_bounds__(kThreads, 1) simple_kernel(const __grid_constant__ Problem g) {
  Operands<A>& s = *reinterpret_cast<Operands<A>*>(ptx::shared_memory());
  const A *left = as<A>(g.left), *weights = as<A>(g.weights), *patterns = as<A>(g.patterns), *x = as<A>(g.x), *bias = as<A>(g.bias);
  const int64_t blocks_n = (g.N + kTile - 1) / kTile, block_n = blockIdx.x % blocks_n;
  const int64_t t0 = blockIdx.x / blocks_n * kTile, n0 = block_n * kTile, list = t0 / kTileRows;
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide;
  const auto token = [&](int64_t at) { return at >= g.T ? -1 : g.order ? g.order[at] : at; };
  A total[kOwn][kOwn] = {};
  const int64_t count = g.tile_counts ? g.tile_counts[list] : g.P;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = g.tile_patterns ? g.tile_patterns[list * g.P + i] : i;
    const A* pattern = patterns + p * g.pattern_stride;
    A acc[kOwn][kOwn] = {};
    for (int64_t k0 = 0; k0 < g.K; k0 += kDepth) {
      for (int e = thread; e < kTile * kDepth; e += kThreads) {
        const int64_t t = token(t0 + e / kDepth), k = k0 + e % kDepth;
        s.left[e % kDepth][e / kDepth] = t >= 0 && k < g.K ? left[t * g.left_stride + k] : A(0);
        if (Backward) {
          const int64_t row = k0 + e / kTile, n = n0 + e % kTile;
          s.right[e / kTile][e % kTile] = row < g.K && n < g.N ? pattern[row * g.row_stride + n] : A(0);
        } else {
          const int64_t n = n0 + e / kDepth;
          s.right[e % kDepth][e / kDepth] = n < g.N && k < g.K ? pattern[n * g.row_stride + k] : A(0);
        }
      }
      __syncthreads();
      A part[kOwn][kOwn] = {};  // a long sum in two levels: its error grows with the root of its length
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        A a[kOwn], b[kOwn];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) a[r] = s.left[k][ty + kSide * r];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) b[c] = s.right[k][tx + kSide * c];
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int c = 0; c < kOwn; ++c) part[r][c] += a[r] * b[c];
      }
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int c = 0; c < kOwn; ++c) acc[r][c] += part[r][c];
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t t = token(t0 + ty + kSide * r);
      const A weight = t >= 0 ? weights[t * g.P + p] : A(0);
      A dot = 0;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        total[r][c] += weight * acc[r][c];
        const int64_t n = n0 + tx + kSide * c;
        if (Backward && t >= 0 && n < g.N) dot += acc[r][c] * x[t * g.x_stride + n];
      }
      if (Backward) {  // the threads of a row are one half of a warp
#pragma unroll
        for (int step = kSide / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step, kSide);
        if (tx == 0 && t >= 0) static_cast<A*>(static_cast<void*>(g.parts))[(block_n * g.T + t) * g.P + p] = dot;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t t = token(t0 + ty + kSide * r), n = n0 + tx + kSide * c;
      if (t >= 0 && n < g.N) static_cast<A*>(g.y)[t * g.N + n] = total[r][c] + (bias ? bias[n] : A(0));
    }
}

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

}  // namespace

Plan plan_simple(const Problem& g) { return {1, tiles(g.N)}; }

void route_simple(const Problem& g, const Plan&) {
  const auto run = [&](auto a) {
    using A = decltype(a);
    const Grid grid{tiles(g.T) * tiles(g.N), kThreads, sizeof(Operands<A>), g.stream};
    launch("pattern_route", g.backward ? simple_kernel<true, A> : simple_kernel<false, A>, grid, g);
  };
  if (g.dtype == Dtype::f64) run(double{});
  else run(float{});
}

}  // namespace dfn::route
