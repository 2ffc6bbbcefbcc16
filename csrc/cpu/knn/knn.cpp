// dfn_cpu::knn: batches, ragged lengths and threads around the engine of knn/. Meaning: dfn_kernels/knn.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common/tensors.h"
#include "cpu/knn/engine.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

knn::Pool torch_pool() {
  knn::Pool pool;
  pool.threads = static_cast<int>(std::max<uint32_t>(1, torch::stable::get_num_threads()));
  pool.run = [](int count, const std::function<void(int)>& body) {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
    });
  };
  return pool;
}

int64_t length_of(const std::optional<Tensor>& lengths, int64_t b, int64_t most) {
  if (!lengths) return most;
  return std::clamp<int64_t>(static_cast<const int64_t*>(lengths->data_ptr())[b], 0, most);
}

template <class T>
void fill(knn::Request<T>& r, int64_t from, int64_t rows) {
  std::fill(r.ids + from * r.k, r.ids + rows * r.k, int64_t(-1));
  std::fill(r.dists + from * r.k, r.dists + rows * r.k, std::numeric_limits<T>::infinity());
}

// What a KNNIndex has had built, one per batch entry; null where a grid does not pay.
template <class T>
using Grids = std::vector<std::unique_ptr<knn::Prepared<T>>>;

struct Index {
  Tensor points;
  Grids<float> f32;
  Grids<double> f64;
};

std::mutex index_mutex;
std::unordered_map<int64_t, std::shared_ptr<Index>> indexes;  // by the number that Python holds
int64_t next_index = 1;

template <class T>
void run(const Tensor& points, const std::optional<Tensor>& queries, const std::optional<Tensor>& lengths,
         const std::optional<Tensor>& query_lengths, int64_t k, bool causal, bool include_self,
         const Grids<T>* grids, Tensor& ids, Tensor& dists) {
  const int64_t B = points.size(0), N = points.size(1), D = points.size(2), M = ids.size(1);
  const knn::Pool pool = torch_pool();
  auto one = [&](int64_t b, const knn::Pool& threads) {
    knn::Request<T> r{};
    r.points = static_cast<const T*>(points.data_ptr()) + b * N * D;
    r.n = length_of(lengths, b, N);
    r.queries = queries ? static_cast<const T*>(queries->data_ptr()) + b * M * D : nullptr;
    r.m = queries ? length_of(query_lengths, b, M) : r.n;
    r.dims = static_cast<int>(D);
    r.k = static_cast<int>(k);
    r.causal = causal;
    r.include_self = include_self;
    r.ids = static_cast<int64_t*>(ids.data_ptr()) + b * M * k;
    r.dists = static_cast<T*>(dists.data_ptr()) + b * M * k;
    knn::search(r, grids ? (*grids)[b].get() : nullptr, threads);
    fill(r, r.m, M);
  };
  // Many small sets: one thread each. Few or large ones: all threads on each in turn.
  if (B >= pool.threads && std::max(N, M) <= 65536) {
    knn::for_pieces(pool, B, 1, [&](int, int64_t b, int64_t) { one(b, knn::Pool{}); });
  } else {
    for (int64_t b = 0; b < B; ++b) one(b, pool);
  }
}

// -> indices [B, M, k] int64, squared distances [B, M, k]
std::tuple<Tensor, Tensor> knn_op(const Tensor& points, const std::optional<Tensor>& queries,
                                  const std::optional<Tensor>& lengths, const std::optional<Tensor>& query_lengths,
                                  int64_t k, bool causal, bool include_self, int64_t index) {
  STD_TORCH_CHECK(points.dim() == 3, "points: expected 3 dimensions");
  const int64_t B = points.size(0), N = points.size(1), D = points.size(2);
  const ScalarType real = points.scalar_type();
  STD_TORCH_CHECK(real == ScalarType::Float || real == ScalarType::Double, "points: expected float32 or float64");
  STD_TORCH_CHECK(k >= 1 && k <= knn::kMaxK && D >= 1, "k or D out of range");
  check_dense(points, "points", real, {B, N, D});
  const int64_t M = queries ? queries->size(1) : N;
  // With as many queries as points, query i belongs to point i (flow_attention's receivers).
  STD_TORCH_CHECK(M == N || (!causal && include_self), "queries: neither causal nor without self");
  STD_TORCH_CHECK(N < (int64_t(1) << 31) && M < (int64_t(1) << 31), "points: expected fewer than 2^31");
  if (queries) check_dense(*queries, "queries", real, {B, M, D});
  if (lengths) check_dense(*lengths, "lengths", ScalarType::Long, {B});
  if (query_lengths) check_dense(*query_lengths, "query_lengths", ScalarType::Long, {B});
  Tensor ids = allocate(points, {B, M, k}, ScalarType::Long);
  Tensor dists = allocate(points, {B, M, k});
  knn::prefer_large_pages(ids.data_ptr(), B * M * k * 8);
  knn::prefer_large_pages(dists.data_ptr(), B * M * k * (real == ScalarType::Float ? 4 : 8));
  std::shared_ptr<Index> built;
  if (index) {
    const std::lock_guard lock(index_mutex);
    const auto at = indexes.find(index);
    // Forgotten, or other points by now: the plain search gives the same result.
    if (at != indexes.end() && at->second->points.data_ptr() == points.data_ptr()) built = at->second;
  }
  if (real == ScalarType::Float)
    run<float>(points, queries, lengths, query_lengths, k, causal, include_self, built ? &built->f32 : nullptr, ids, dists);
  else
    run<double>(points, queries, lengths, query_lengths, k, causal, include_self, built ? &built->f64 : nullptr, ids,
                dists);
  return {ids, dists};
}

template <class T>
Grids<T> grids_of(const Tensor& points, const std::optional<Tensor>& lengths) {
  const int64_t B = points.size(0), N = points.size(1), D = points.size(2);
  const knn::Pool pool = torch_pool();
  Grids<T> grids(B);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t n = length_of(lengths, b, N);
    if (!knn::worth_a_grid(n, static_cast<int>(D))) continue;
    const knn::Rows<T> rows{static_cast<const T*>(points.data_ptr()) + b * N * D, n, static_cast<int>(D)};
    grids[b] = std::make_unique<knn::Prepared<T>>(rows, pool);
  }
  return grids;
}

// Sorts the points of a KNNIndex; the number stands for the result until knn_forget.
int64_t knn_index(const Tensor& points, const std::optional<Tensor>& lengths) {
  STD_TORCH_CHECK(points.dim() == 3 && points.size(2) >= 1 && points.size(1) < (int64_t(1) << 31), "points: bad shape");
  const ScalarType real = points.scalar_type();
  STD_TORCH_CHECK(real == ScalarType::Float || real == ScalarType::Double, "points: expected float32 or float64");
  check_dense(points, "points", real, {points.size(0), points.size(1), points.size(2)});
  if (lengths) check_dense(*lengths, "lengths", ScalarType::Long, {points.size(0)});
  auto index = std::make_shared<Index>(Index{points, {}, {}});
  if (real == ScalarType::Float)
    index->f32 = grids_of<float>(points, lengths);
  else
    index->f64 = grids_of<double>(points, lengths);
  const std::lock_guard lock(index_mutex);
  indexes[next_index] = std::move(index);
  return next_index++;
}

void knn_forget(int64_t index) {
  const std::lock_guard lock(index_mutex);
  indexes.erase(index);
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("knn(Tensor points, Tensor? queries, Tensor? lengths, Tensor? query_lengths, int k, bool causal, "
        "bool include_self, int index=0) -> (Tensor, Tensor)");
  m.def("knn_index(Tensor points, Tensor? lengths) -> int");
  m.def("knn_forget(int index) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("knn", TORCH_BOX(&dfn::knn_op));
  m.impl("knn_index", TORCH_BOX(&dfn::knn_index));
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CompositeExplicitAutograd, m) { m.impl("knn_forget", TORCH_BOX(&dfn::knn_forget)); }
