// dfn_cuda::pattern_route and its backward: the plainest tiled kernels, for every dtype, size and stride, and where Triton
// is not installed. They multiply in float32 (float64) without tensor cores. Formula: dfn_kernels/pattern_route.py.
// Compiled, but not yet run on a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::new_empty;

constexpr int kTile = 64;            // rows and columns of sums of a block
constexpr int kDepth = 16;           // of the operands in shared memory
constexpr int kSide = 16;            // a block has kSide x kSide threads, each with kOwn x kOwn sums
constexpr int kOwn = kTile / kSide;  // rows ty + kSide * r and columns tx + kSide * c

__device__ inline float to_float(float x) { return x; }
__device__ inline double to_float(double x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(double x, double* out) { *out = x; }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

template <class A>
struct Operands {
  A left[kDepth][kTile + 1];  // the odd length spreads a column over the banks
  A right[kDepth][kTile + 1];
};

template <class A>
__device__ inline void multiply(const Operands<A>& s, A (&acc)[kOwn][kOwn]) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    A left[kOwn], right[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) left[r] = s.left[k][threadIdx.y + kSide * r];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) right[c] = s.right[k][threadIdx.x + kSide * c];
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
#pragma unroll
      for (int c = 0; c < kOwn; ++c) acc[r][c] += left[r] * right[c];
  }
}

// y[t][n] = bias[n] + sum_p w[t][p] * (sum_k left[t][k] * right_p[k][n]), where right_p[k][n] is patterns[p][n][k], or in
// the backward pass patterns[p][k][n]; there parts[block of n][t][p] = sum_n (the sum over k) * x[t][n].
template <bool Backward, class A, class L, class V, class Y>
__global__ void __launch_bounds__(kSide* kSide, 1) tokens_kernel(
    const L* __restrict__ left, int64_t left_stride,                              // [T, K]
    const A* __restrict__ weights,                                                // [T, P]
    const V* __restrict__ patterns, int64_t pattern_stride, int64_t row_stride,   // [P, O, I]
    const A* __restrict__ bias,                                                   // [N] or null
    const V* __restrict__ x, int64_t x_stride,                                    // [T, N], backward only
    Y* __restrict__ y,                                                            // [T, N]
    A* __restrict__ parts,                                                        // [ceil(N / kTile), T, P]
    int64_t T, int64_t P, int64_t K, int64_t N) {
  __shared__ Operands<A> s;
  const int64_t blocks_n = (N + kTile - 1) / kTile, block_n = blockIdx.x % blocks_n;
  const int64_t t0 = blockIdx.x / blocks_n * kTile, n0 = block_n * kTile;
  const int thread = threadIdx.y * kSide + threadIdx.x;
  A total[kOwn][kOwn] = {};
  for (int64_t p = 0; p < P; ++p) {
    const V* pattern = patterns + p * pattern_stride;
    A acc[kOwn][kOwn] = {};
    for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
      for (int e = thread; e < kTile * kDepth; e += kSide * kSide) {
        const int64_t t = t0 + e / kDepth, k = k0 + e % kDepth;
        s.left[e % kDepth][e / kDepth] = t < T && k < K ? to_float(left[t * left_stride + k]) : A(0);
        if (Backward) {
          const int64_t row = k0 + e / kTile, n = n0 + e % kTile;
          s.right[e / kTile][e % kTile] = row < K && n < N ? to_float(pattern[row * row_stride + n]) : A(0);
        } else {
          const int64_t n = n0 + e / kDepth;
          s.right[e % kDepth][e / kDepth] = n < N && k < K ? to_float(pattern[n * row_stride + k]) : A(0);
        }
      }
      __syncthreads();
      multiply(s, acc);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t t = t0 + threadIdx.y + kSide * r;
      const A weight = t < T ? weights[t * P + p] : A(0);
      A dot = 0;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        total[r][c] += weight * acc[r][c];
        const int64_t n = n0 + threadIdx.x + kSide * c;
        if (Backward && t < T && n < N) dot += acc[r][c] * to_float(x[t * x_stride + n]);
      }
      if (Backward) {  // the threads of a row are one half of a warp
#pragma unroll
        for (int step = kSide / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step, kSide);
        if (threadIdx.x == 0 && t < T) parts[(block_n * T + t) * P + p] = dot;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t t = t0 + threadIdx.y + kSide * r, n = n0 + threadIdx.x + kSide * c;
      if (t < T && n < N) from_float(total[r][c] + (bias ? bias[n] : A(0)), y + t * N + n);
    }
}

// grad_patterns[p][o][i] = sum_t (w[t][p] * grad[t][o]) * x[t][i]
template <class A, class V, class G>
__global__ void __launch_bounds__(kSide* kSide) patterns_kernel(
    const G* __restrict__ grad, int64_t grad_stride,  // [T, O]
    const A* __restrict__ weights,                    // [T, P]
    const V* __restrict__ x, int64_t x_stride,        // [T, I]
    V* __restrict__ grad_patterns,                    // [P, O, I]
    int64_t T, int64_t P, int64_t O, int64_t I) {
  __shared__ Operands<A> s;
  const int64_t blocks_o = (O + kTile - 1) / kTile, blocks_i = (I + kTile - 1) / kTile;
  const int64_t p = blockIdx.x / (blocks_o * blocks_i);
  const int64_t o0 = blockIdx.x / blocks_i % blocks_o * kTile, i0 = blockIdx.x % blocks_i * kTile;
  const int thread = threadIdx.y * kSide + threadIdx.x;
  A acc[kOwn][kOwn] = {};
  for (int64_t t0 = 0; t0 < T; t0 += kDepth) {
    for (int e = thread; e < kTile * kDepth; e += kSide * kSide) {
      const int64_t t = t0 + e / kTile, o = o0 + e % kTile, i = i0 + e % kTile;
      s.left[e / kTile][e % kTile] = t < T && o < O ? weights[t * P + p] * to_float(grad[t * grad_stride + o]) : A(0);
      s.right[e / kTile][e % kTile] = t < T && i < I ? to_float(x[t * x_stride + i]) : A(0);
    }
    __syncthreads();
    multiply(s, acc);
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t o = o0 + threadIdx.y + kSide * r, i = i0 + threadIdx.x + kSide * c;
      if (o < O && i < I) from_float(acc[r][c], grad_patterns + (p * O + o) * I + i);
    }
}

// grad_bias[o] = sum_t grad[t][o]: a block per kSide columns, in a fixed order
template <class A, class G>
__global__ void __launch_bounds__(kSide* kSide) bias_kernel(const G* __restrict__ grad, int64_t grad_stride,  // [T, O]
                                                            A* __restrict__ grad_bias, int64_t T, int64_t O) {
  __shared__ A sums[kSide][kSide + 1];
  const int64_t o = blockIdx.x * int64_t{kSide} + threadIdx.x;
  A total = 0;
  if (o < O)
    for (int64_t t = threadIdx.y; t < T; t += kSide) total += to_float(grad[t * grad_stride + o]);
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || o >= O) return;
  total = 0;
  for (int row = 0; row < kSide; ++row) total += sums[row][threadIdx.x];
  grad_bias[o] = total;
}

// ---- launchers -----------------------------------------------------------------------------------------------------
struct Problem {
  int64_t T, P, O, I;
  cudaStream_t stream;

  Problem(const Tensor& x, const Tensor& weights, const Tensor& patterns) {
    STD_TORCH_CHECK(x.dim() == 2 && patterns.dim() == 3, "expected x [T, I] and patterns [P, O, I]");
    T = x.size(0), I = x.size(1), P = patterns.size(0), O = patterns.size(1);
    const bool wide = dtype_of(x) == Dtype::f64;
    check_dense(weights, "weights", wide ? ScalarType::Double : ScalarType::Float, {T, P});
    check_rows(x, "x");
    check_shape(patterns, "patterns", {P, O, I});
    check_rows(patterns, "patterns");
    STD_TORCH_CHECK(patterns.scalar_type() == x.scalar_type(), "patterns: expected the dtype of x");
    void* current = nullptr;
    aoti_torch_get_current_cuda_stream(x.get_device_index(), &current);
    stream = static_cast<cudaStream_t>(current);
  }

  static void check_rows(const Tensor& t, const char* name) {
    const int64_t last = t.dim() - 1;
    STD_TORCH_CHECK(t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, name, ": expected a dense last dimension");
  }
};

unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "pattern_route: too many tiles for one launch");
  return static_cast<unsigned>(blocks);
}
int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T> T* mutable_data(Tensor& t) { return static_cast<T*>(t.data_ptr()); }

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "pattern_route: ", cudaGetErrorString(error));
}

// body(type of the sums, of x and patterns, of the output or its gradient), each given by a value
template <class Body>
void by_dtype(Dtype dtype, bool wide, Body body) {
  if (dtype == Dtype::f64) body(double{}, double{}, double{});
  else if (dtype == Dtype::f32) body(float{}, float{}, float{});
  else if (dtype == Dtype::bf16 && wide) body(float{}, __nv_bfloat16{}, float{});
  else if (dtype == Dtype::bf16) body(float{}, __nv_bfloat16{}, __nv_bfloat16{});
  else if (wide) body(float{}, __half{}, float{});
  else body(float{}, __half{}, __half{});
}

// `chosen` only saves time elsewhere: the weights of the other patterns are 0.
Tensor forward(const Tensor& x, const Tensor& weights, const Tensor& patterns, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& chosen, bool wide) {
  (void)chosen;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem g(x, weights, patterns);
  if (bias) check_dense(*bias, "bias", weights.scalar_type(), {g.O});
  Tensor out = new_empty(wide ? weights : x, {g.T, g.O});
  if (g.T * g.O == 0) return out;
  by_dtype(dtype_of(x), wide, [&](auto a, auto v, auto y) {
    using A = decltype(a);
    using V = decltype(v);
    using Y = decltype(y);
    tokens_kernel<false, A, V, V, Y><<<grid_size(tiles(g.T) * tiles(g.O)), dim3(kSide, kSide), 0, g.stream>>>(
        data<V>(x), x.stride(0), data<A>(weights), data<V>(patterns), patterns.stride(0), patterns.stride(1),
        bias ? data<A>(*bias) : nullptr, nullptr, 0, mutable_data<Y>(out), nullptr, g.T, g.P, g.I, g.O);
  });
  check_launch();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                                    const Tensor& patterns, const std::optional<Tensor>& chosen,
                                                    bool need_tokens, bool need_patterns, bool need_bias) {
  (void)chosen;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem g(x, weights, patterns);
  check_shape(grad, "grad", {g.T, g.O});
  Problem::check_rows(grad, "grad");
  const bool wide = grad.scalar_type() != x.scalar_type();
  STD_TORCH_CHECK(!wide || grad.scalar_type() == weights.scalar_type(), "grad: expected the dtype of x or of weights");
  Tensor grad_x = need_tokens ? new_empty(x, {g.T, g.I}) : new_empty(x, {0});
  Tensor grad_weights = new_empty(weights, {0});
  Tensor grad_patterns = need_patterns ? new_empty(patterns, {g.P, g.O, g.I}) : new_empty(patterns, {0});
  Tensor grad_bias = new_empty(weights, {need_bias ? g.O : 0});
  const dim3 threads(kSide, kSide);
  by_dtype(dtype_of(x), wide, [&](auto a, auto v, auto y) {
    using A = decltype(a);
    using V = decltype(v);
    using G = decltype(y);
    if (need_tokens) {
      Tensor parts = torch::stable::new_zeros(weights, {tiles(g.I), g.T, g.P});
      if (g.T * g.I > 0)
        tokens_kernel<true, A, G, V, V><<<grid_size(tiles(g.T) * tiles(g.I)), threads, 0, g.stream>>>(
            data<G>(grad), grad.stride(0), data<A>(weights), data<V>(patterns), patterns.stride(0), patterns.stride(1),
            nullptr, data<V>(x), x.stride(0), mutable_data<V>(grad_x), mutable_data<A>(parts), g.T, g.P, g.O, g.I);
      const std::vector<int64_t> blocks = {0};
      grad_weights = torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(blocks));
    }
    if (need_patterns && g.P * g.O * g.I > 0)
      patterns_kernel<A, V, G><<<grid_size(g.P * tiles(g.O) * tiles(g.I)), threads, 0, g.stream>>>(
          data<G>(grad), grad.stride(0), data<A>(weights), data<V>(x), x.stride(0), mutable_data<V>(grad_patterns), g.T,
          g.P, g.O, g.I);
    if (need_bias && g.O > 0)
      bias_kernel<A, G><<<grid_size((g.O + kSide - 1) / kSide), threads, 0, g.stream>>>(data<G>(grad), grad.stride(0),
                                                                                      mutable_data<A>(grad_bias), g.T, g.O);
  });
  check_launch();
  return {grad_x, grad_weights, grad_patterns, grad_bias};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cuda, m) {
  m.def("pattern_route(Tensor x, Tensor weights, Tensor patterns, Tensor? bias, Tensor? chosen, bool wide) -> Tensor");
  m.def("pattern_route_backward(Tensor grad, Tensor x, Tensor weights, Tensor patterns, Tensor? chosen, "
        "bool need_tokens, bool need_patterns, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cuda, CUDA, m) {
  m.impl("pattern_route", TORCH_BOX(&dfn::forward));
  m.impl("pattern_route_backward", TORCH_BOX(&dfn::backward));
}
