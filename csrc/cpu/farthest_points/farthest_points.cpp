// dfn_cpu::farthest_points: sets and threads around the kernel. Meaning: dfn_kernels/farthest_points.py.
#include "cpu/farthest_points/farthest_points.h"

#include <limits>
#include <vector>

#include "cpu/common/torch_pool.h"

namespace dfn {
namespace {

constexpr int64_t kLarge = 32768;  // points that are worth several threads in every step

template <class T>
void one_set(const T* points, int64_t n, int D, int64_t first_id, int64_t start, int64_t count, const knn::Pool& pool,
             int64_t* out) {
  std::vector<T> coords(n * D), dists(n);
  std::vector<bool> finite(n);
  for (int64_t i = 0; i < n; ++i) {
    T zero = 0;  // 0 * x is 0 for finite x, NaN otherwise
    for (int a = 0; a < D; ++a) zero += points[i * D + a] * T(0);
    finite[i] = zero == T(0);
    dists[i] = finite[i] ? std::numeric_limits<T>::infinity() : T(0);
    for (int a = 0; a < D; ++a) coords[a * n + i] = finite[i] ? points[i * D + a] : T(0);
  }
  const FarthestPoints g{coords.data(), dists.data(), n, D, sizeof(T) == 8};
  const int64_t pieces = n > kLarge ? pool.threads : 1;
  std::vector<Farthest> found(pieces);
  int64_t next = std::min(std::max<int64_t>(start, 0), n - 1);
  for (int64_t step = 0; step < std::min(count, n); ++step) {
    out[step] = first_id + next;
    dists[next] = T(-1);
    const int64_t chosen = finite[next] ? next : -1;
    knn::for_pieces(pieces > 1 ? pool : knn::Pool{}, pieces, 1, [&](int, int64_t piece, int64_t) {
      found[piece] = DFN_CALL_ISA(farthest_point, g, chosen, n * piece / pieces, n * (piece + 1) / pieces);
    });
    Farthest best = found[0];
    for (const Farthest& one : found)
      if (one.dist > best.dist) best = one;
    next = best.index;
  }
}

template <class T>
void run(const Tensor& points, const int64_t* ptr, const int64_t* out_ptr, const int64_t* start, int64_t S, Tensor& out) {
  const knn::Pool pool = torch_pool();
  const int D = static_cast<int>(points.size(1));
  auto one = [&](int64_t s, const knn::Pool& threads) {
    const int64_t n = ptr[s + 1] - ptr[s], count = out_ptr[s + 1] - out_ptr[s];
    int64_t* to = static_cast<int64_t*>(out.data_ptr()) + out_ptr[s];
    if (n > 0 && count > 0) {
      const T* first = static_cast<const T*>(points.data_ptr()) + ptr[s] * D;
      one_set(first, n, D, ptr[s], start ? start[s] : 0, count, threads, to);
    }
    for (int64_t i = std::min(n, count); i < count; ++i) to[i] = -1;
  };
  for (int64_t s = 0; s < S; ++s)
    if (ptr[s + 1] - ptr[s] > kLarge) one(s, pool);
  knn::for_pieces(pool, S, 1, [&](int, int64_t s, int64_t) {
    if (ptr[s + 1] - ptr[s] <= kLarge) one(s, knn::Pool{});
  });
}

// -> indices [total] int64; set s has those from out_ptr[s] to out_ptr[s + 1]
Tensor farthest_points(const Tensor& points, const Tensor& ptr, const Tensor& out_ptr,
                       const std::optional<Tensor>& start, int64_t total) {
  STD_TORCH_CHECK(points.dim() == 2 && points.size(1) >= 1, "points: expected [N, D]");
  const ScalarType real = points.scalar_type();
  STD_TORCH_CHECK(real == ScalarType::Float || real == ScalarType::Double, "points: expected float32 or float64");
  check_dense(points, "points", real, {points.size(0), points.size(1)});
  STD_TORCH_CHECK(points.size(0) < (int64_t(1) << 31), "points: expected fewer than 2^31");
  check_offsets(ptr, "ptr", points.size(0));
  check_offsets(out_ptr, "out_ptr", total);
  const int64_t S = ptr.size(0) - 1;
  STD_TORCH_CHECK(out_ptr.size(0) == S + 1, "out_ptr: expected as many as ptr");
  if (start) check_dense(*start, "start", ScalarType::Long, {S});
  Tensor out = allocate(points, {total}, ScalarType::Long);
  const auto ints = [](const Tensor& x) { return static_cast<const int64_t*>(x.data_ptr()); };
  const auto sets = real == ScalarType::Float ? run<float> : run<double>;
  sets(points, ints(ptr), ints(out_ptr), start ? ints(*start) : nullptr, S, out);
  return out;
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("farthest_points(Tensor points, Tensor ptr, Tensor out_ptr, Tensor? start, int total) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) { m.impl("farthest_points", TORCH_BOX(&dfn::farthest_points)); }
