// dfn_cpu::knn_backward: batches and threads around the kernel.
#include "cpu/knn/gradient.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/tensors.h"
#include "cpu/common/memory.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

// Blocks of queries add side by side, each to an array of its own, and these are added up in their order. How many there
// are is a matter of sizes alone, so that the threads do not show in the result: not so many that clearing and adding up
// costs more than the edges do.
int64_t blocks_of(int64_t N, int64_t M, int64_t k) {
  return std::clamp<int64_t>(M * k / std::max<int64_t>(N, 32768), 1, 8);
}

template <class T>
void run(const Tensor& grad, const Tensor& points, const std::optional<Tensor>& queries, const Tensor& indices, bool absolute,
         Tensor* to_points, Tensor* to_queries) {
  const int64_t B = points.size(0), N = points.size(1), D = points.size(2), M = indices.size(1), k = indices.size(2);
  const auto entry = [](const Tensor& x, int64_t b) { return static_cast<T*>(x.data_ptr()) + b * x.stride(0); };
  const int64_t blocks = to_points ? blocks_of(N, M, k) : std::clamp<int64_t>(M * k >> 15, 1, 64), size = N * D;
  const Array<T> others(to_points ? B * (blocks - 1) * size : 0);  // the first block adds to the result
  const auto sums_of = [&](int64_t b, int64_t block) {
    return block == 0 ? entry(*to_points, b) : others.data() + (b * (blocks - 1) + block - 1) * size;
  };
  std::atomic<bool> valid{true};
  parallel_for(0, B * blocks, grain_size(M * k * D / blocks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, block = i % blocks;
      knn::Gradient<T> g{};
      g.points = entry(points, b);
      g.queries = queries ? entry(*queries, b) : nullptr;
      g.indices = static_cast<const int64_t*>(indices.data_ptr()) + b * M * k;
      g.grad = entry(grad, b);
      g.grad_row = grad.stride(1), g.grad_column = grad.stride(2);
      g.N = N, g.D = D, g.k = k;
      g.absolute = absolute;
      if (to_points) std::fill_n(g.to_points = sums_of(b, block), size, T(0));
      if (to_queries) g.to_queries = entry(*to_queries, b);
      if (!DFN_CALL_ISA(knn_gradient, g, M * block / blocks, M * (block + 1) / blocks)) valid = false;
    }
  });
  if (!valid) throw std::out_of_range("knn_backward: indices must be -1 or between 0 and " + std::to_string(N - 1));
  if (!to_points || blocks == 1) return;
  parallel_for(0, B * N, grain_size(blocks * D), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t b = i / N, first = i % N * D, last = std::min(end - b * N, N) * D;
      T* total = sums_of(b, 0);
      for (int64_t block = 1; block < blocks; ++block) {
        const T* sums = sums_of(b, block);
        for (int64_t at = first; at < last; ++at) total[at] += sums[at];
      }
      i = b * N + last / D;
    }
  });
}

// grad [B, M, k], with any strides; queries: null where query i is point i. -> gradients to points [B, N, D] and queries
// [B, M, D], empty where they are not wanted; without queries that to points is all there is.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& points, const std::optional<Tensor>& queries,
                                    const Tensor& indices, bool absolute, bool of_points, bool of_queries) {
  STD_TORCH_CHECK(points.dim() == 3 && indices.dim() == 3, "points and indices: expected 3 dimensions");
  const int64_t B = points.size(0), N = points.size(1), D = points.size(2), M = indices.size(1), k = indices.size(2);
  const ScalarType real = points.scalar_type();
  STD_TORCH_CHECK(real == ScalarType::Float || real == ScalarType::Double, "points: expected float32 or float64");
  check_dense(points, "points", real, {B, N, D});
  if (queries) check_dense(*queries, "queries", real, {B, M, D});
  check_dense(indices, "indices", ScalarType::Long, {B, M, k});
  STD_TORCH_CHECK(queries || M == N, "indices: expected a row for every point");
  STD_TORCH_CHECK(queries || (of_points && !of_queries), "queries: expected, or a gradient to points alone");
  check_shape(grad, "grad", {B, M, k});
  STD_TORCH_CHECK(grad.scalar_type() == real, "grad: expected the dtype of points");
  Tensor to_points = of_points ? allocate(points, {B, N, D}) : allocate(points, {0});
  Tensor to_queries = of_queries ? allocate(points, {B, M, D}) : allocate(points, {0});
  if (of_points) prefer_huge_pages(to_points);
  if (of_queries) prefer_huge_pages(to_queries);
  Tensor *a = of_points ? &to_points : nullptr, *b = of_queries ? &to_queries : nullptr;
  real == ScalarType::Float ? run<float>(grad, points, queries, indices, absolute, a, b)
                            : run<double>(grad, points, queries, indices, absolute, a, b);
  return {to_points, to_queries};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("knn_backward(Tensor grad, Tensor points, Tensor? queries, Tensor indices, bool absolute, bool of_points, "
        "bool of_queries) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) { m.impl("knn_backward", TORCH_BOX(&dfn::backward)); }
