// What pattern routing does before and after PyTorch's own products: pattern_route.h says what. Both kernels should run at the
// memory's speed.
#include "cuda/half.h"
#include "cuda/launch.h"
#include "cuda/pattern_route.h"

namespace dfn::route {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int64_t kOwn = kStrip / kWarp;  // columns of a thread, a warp's width apart

int64_t ceil_div(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

__device__ inline float to_sum(float x) { return x; }
__device__ inline double to_sum(double x) { return x; }
template <class V>
__device__ inline float to_sum(V x) {
  return to_float(x);
}
__device__ inline void from_sum(double x, double* y) { *y = x; }
template <class V>
__device__ inline void from_sum(float x, V* y) {
  from_float(x, y);
}

// ---- scaled rows ----------------------------------------------------------------------------------------------------
template <class V, int Unit>
struct alignas(Unit * sizeof(V)) Values {
  V at[Unit];
};

// A thread multiplies `Unit` values by the weights of all patterns.
template <class V, class A, int Unit>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Scaling g) {
  using Few = Values<V, Unit>;
  const int64_t units = g.E / Unit, at = blockIdx.x * int64_t{kThreads} + threadIdx.x, t = at / units;
  if (t >= g.T) return;
  const int64_t e = (at - t * units) * Unit;
  const Few few = *reinterpret_cast<const Few*>(static_cast<const V*>(g.rows) + t * g.rows_stride + e);
  const A* weights = static_cast<const A*>(g.weights) + t * g.weights_stride;
  V* out = static_cast<V*>(g.out) + t * g.P * g.E + e;
#pragma unroll 4
  for (int64_t p = 0; p < g.P; ++p) {
    const A weight = __ldg(weights + p);
    Few scaled;
#pragma unroll
    for (int i = 0; i < Unit; ++i) from_sum(weight * to_sum(few.at[i]), &scaled.at[i]);
    *reinterpret_cast<Few*>(out + p * g.E) = scaled;
  }
}

// ---- sums of products -----------------------------------------------------------------------------------------------
// A warp has a strip of columns of one token. Patterns pass by: their loads do not wait for each other.
template <bool Backward, class V, class A>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Combination g) {
  const int64_t strips = (g.N + kStrip - 1) / kStrip;
  const int64_t unit = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp, t = unit / strips;
  if (t >= g.T) return;
  const int64_t strip = unit - t * strips, n0 = strip * kStrip + threadIdx.x % kWarp;
  A total[kOwn] = {}, x[Backward ? kOwn : 1];
  if constexpr (Backward) {
    const V* row = static_cast<const V*>(g.x) + t * g.x_stride;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = n0 + i * kWarp < g.N ? to_sum(row[n0 + i * kWarp]) : A(0);
  }
  const A* weights = static_cast<const A*>(g.weights) + t * g.P;
#pragma unroll 2
  for (int64_t p = 0; p < g.P; ++p) {
    const A* sums = static_cast<const A*>(g.sums) + (p * g.T + t) * g.N;
    const A weight = __ldg(weights + p);
    A dot = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const A sum = n0 + i * kWarp < g.N ? sums[n0 + i * kWarp] : A(0);
      total[i] += weight * sum;
      if constexpr (Backward) dot += sum * x[i];
    }
    if constexpr (Backward) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
      if (threadIdx.x % kWarp == 0) static_cast<A*>(g.parts)[strip * g.parts_stride + t * g.P + p] = dot;
    }
  }
  const A* bias = static_cast<const A*>(g.bias);
  V* y = static_cast<V*>(g.y) + t * g.N;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t n = n0 + i * kWarp;
    if (n < g.N) from_sum(total[i] + (bias ? __ldg(bias + n) : A(0)), y + n);
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------
// body(a value of the tensors' type, one of the sums')
template <class Body>
void by_dtype(Dtype dtype, Body body) {
  if (dtype == Dtype::bf16) body(__nv_bfloat16{}, float{});
  else if (dtype == Dtype::f16) body(__half{}, float{});
  else if (dtype == Dtype::f32) body(float{}, float{});
  else body(double{}, double{});
}

}  // namespace

void scale_rows(const Scaling& g) {
  by_dtype(g.dtype, [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    constexpr int kUnit = 16 / sizeof(V);
    const bool aligned = g.E % kUnit == 0 && (g.T == 1 || g.rows_stride % kUnit == 0) &&
                         reinterpret_cast<uintptr_t>(g.rows) % 16 == 0 && reinterpret_cast<uintptr_t>(g.out) % 16 == 0;
    const Grid grid{ceil_div(g.T * (aligned ? g.E / kUnit : g.E), kThreads), kThreads, 0, g.stream};
    launch("pattern_route", aligned ? scale_kernel<V, A, kUnit> : scale_kernel<V, A, 1>, grid, g);
  });
}

void combine_products(const Combination& g) {
  by_dtype(g.dtype, [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    const Grid grid{ceil_div(g.T * ceil_div(g.N, kStrip), kThreads / kWarp), kThreads, 0, g.stream};
    launch("pattern_route", g.parts ? combine_kernel<true, V, A> : combine_kernel<false, V, A>, grid, g);
  });
}

}  // namespace dfn::route
