// dfn_cpu::knn: batches, ragged lengths, packed sets and threads around the engine. Meaning: dfn_kernels/knn.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common/tensors.h"
#include "cpu/common/torch_pool.h"
#include "cpu/knn/engine.h"

namespace dfn {
namespace {


// Which of the rows [B, N] and [B, M] belong together. Without offsets a batch entry is one set, as long as `lengths`
// says; with offsets, which all entries share, it is several, one after another.
struct Sets {
  int64_t B, N, M;
  bool own;  // the queries are the points
  const int64_t *lengths, *query_lengths;  // [B] or null
  const int64_t *ptr, *query_ptr;          // [S + 1] or null
  int64_t S;

  struct Set {
    int64_t b;
    int64_t first, n;        // its points
    int64_t first_query, m;  // its queries
    int64_t end;             // after its queries and their padding
  };

  int64_t count() const { return B * S; }
  Set at(int64_t i) const {
    const int64_t b = i / S, s = i % S;
    if (ptr == nullptr) {
      const int64_t n = lengths ? std::clamp<int64_t>(lengths[b], 0, N) : N;
      return {b, 0, n, 0, own ? n : query_lengths ? std::clamp<int64_t>(query_lengths[b], 0, M) : M, M};
    }
    const int64_t* q = own ? ptr : query_ptr;
    return {b, ptr[s], ptr[s + 1] - ptr[s], q[s], q[s + 1] - q[s], q[s + 1]};
  }
};

template <class T>
void fill_padding(knn::Request<T>& r, int64_t rows) {
  std::fill(r.ids + r.m * r.k, r.ids + rows * r.k, int64_t(-1));
  std::fill(r.dists + r.m * r.k, r.dists + rows * r.k, std::numeric_limits<T>::infinity());
}

const int64_t* ints(const std::optional<Tensor>& x) {
  return x ? static_cast<const int64_t*>(x->data_ptr()) : nullptr;
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
void run(const Tensor& points, const std::optional<Tensor>& queries, const Sets& sets, int64_t k, bool causal,
         bool include_self, std::optional<double> within, bool absolute, const Grids<T>* grids, Tensor& ids, Tensor& dists) {
  const int64_t N = sets.N, M = sets.M, D = points.size(2);
  const knn::Pool pool = torch_pool();
  auto request = [&](const Sets::Set& set) {
    knn::Request<T> r{};
    r.points = static_cast<const T*>(points.data_ptr()) + (set.b * N + set.first) * D;
    r.n = set.n;
    r.queries = queries ? static_cast<const T*>(queries->data_ptr()) + (set.b * M + set.first_query) * D : nullptr;
    r.m = set.m;
    r.dims = static_cast<int>(D);
    r.k = static_cast<int>(k);
    r.causal = causal;
    r.include_self = include_self;
    r.absolute = absolute;
    if (within) r.within = static_cast<T>(*within);
    r.first_id = set.first;
    r.ids = static_cast<int64_t*>(ids.data_ptr()) + (set.b * M + set.first_query) * k;
    r.dists = static_cast<T*>(dists.data_ptr()) + (set.b * M + set.first_query) * k;
    return r;
  };
  auto search = [&](int64_t i, const Sets::Set& set, const knn::Pool& threads) {
    knn::Request<T> r = request(set);
    knn::search(r, grids ? (*grids)[i].get() : nullptr, threads);
    fill_padding(r, set.end - set.first_query);
  };
  // A set that one thread would be long at, or the others would wait for: all threads on it.
  const int64_t total = sets.B * (N + M);
  auto is_large = [&](const Sets::Set& set) {
    const int64_t rows = set.n + set.m;
    return rows > 131072 || (rows > 512 && rows * pool.threads > total);
  };
  for (int64_t i = 0; i < sets.count(); ++i)
    if (const Sets::Set set = sets.at(i); is_large(set)) search(i, set, pool);
  std::vector<std::unique_ptr<knn::SmallSearches<T>>> small(pool.threads);
  const int64_t piece = std::clamp<int64_t>(sets.count() / (32 * pool.threads), 1, 256);
  knn::for_pieces(pool, sets.count(), piece, [&](int worker, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sets::Set set = sets.at(i);
      if (is_large(set) || set.first_query == set.end) continue;
      knn::Request<T> r = request(set);
      if (knn::worth_more(r)) {
        search(i, set, knn::Pool{});
        continue;
      }
      if (!small[worker]) small[worker].reset(new knn::SmallSearches<T>(static_cast<int>(D), static_cast<int>(k)));
      small[worker]->search(r);
      fill_padding(r, set.end - set.first_query);
    }
  });
}

// -> indices [B, M, k] int64, squared distances [B, M, k]
std::tuple<Tensor, Tensor> knn_op(const Tensor& points, const std::optional<Tensor>& queries,
                                  const std::optional<Tensor>& lengths, const std::optional<Tensor>& query_lengths,
                                  int64_t k, bool causal, bool include_self, int64_t index,
                                  const std::optional<Tensor>& ptr, const std::optional<Tensor>& query_ptr,
                                  std::optional<double> within, bool absolute) {
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
  STD_TORCH_CHECK(!absolute || (!causal && include_self), "absolute: expected neither causal nor without self");
  if (queries) check_dense(*queries, "queries", real, {B, M, D});
  if (lengths) check_dense(*lengths, "lengths", ScalarType::Long, {B});
  if (query_lengths) check_dense(*query_lengths, "query_lengths", ScalarType::Long, {B});
  STD_TORCH_CHECK(!ptr || (!lengths && !query_lengths), "ptr: expected without lengths");
  STD_TORCH_CHECK(query_ptr.has_value() == (ptr && queries), "query_ptr: expected with ptr and queries");
  if (ptr) check_offsets(*ptr, "ptr", N);
  if (query_ptr) {
    STD_TORCH_CHECK(query_ptr->dim() == 1 && query_ptr->size(0) == ptr->size(0), "query_ptr: expected as many as ptr");
    check_offsets(*query_ptr, "query_ptr", M);
  }
  const Sets sets{B,          N,           M, !queries, ints(lengths), ints(query_lengths),
                  ints(ptr), ints(query_ptr), ptr ? ptr->size(0) - 1 : 1};
  if (query_ptr && (causal || !include_self))
    for (int64_t s = 0; s <= sets.S; ++s)
      STD_TORCH_CHECK(sets.ptr[s] == sets.query_ptr[s], "query_ptr: expected like ptr, causal or without self");
  Tensor ids = allocate(points, {B, M, k}, ScalarType::Long);
  Tensor dists = allocate(points, {B, M, k});
  prefer_huge_pages(ids);
  prefer_huge_pages(dists);
  std::shared_ptr<Index> built;
  if (index) {
    const std::lock_guard lock(index_mutex);
    const auto at = indexes.find(index);
    // Forgotten, or other points by now: the plain search gives the same result.
    if (at != indexes.end() && at->second->points.data_ptr() == points.data_ptr()) built = at->second;
  }
  if (real == ScalarType::Float)
    run<float>(points, queries, sets, k, causal, include_self, within, absolute, built ? &built->f32 : nullptr, ids, dists);
  else
    run<double>(points, queries, sets, k, causal, include_self, within, absolute, built ? &built->f64 : nullptr, ids, dists);
  return {ids, dists};
}

template <class T>
Grids<T> grids_of(const Tensor& points, const Sets& sets) {
  const int64_t N = sets.N, D = points.size(2);
  const knn::Pool pool = torch_pool();
  Grids<T> grids(sets.count());
  for (int64_t i = 0; i < sets.count(); ++i) {
    const Sets::Set set = sets.at(i);
    if (!knn::worth_preparing(set.n, static_cast<int>(D))) continue;
    const T* first = static_cast<const T*>(points.data_ptr()) + (set.b * N + set.first) * D;
    grids[i] = std::make_unique<knn::Prepared<T>>(knn::Rows<T>{first, set.n, static_cast<int>(D)}, pool);
  }
  return grids;
}

// Sorts the points of a KNNIndex; the number stands for the result until knn_forget.
int64_t knn_index(const Tensor& points, const std::optional<Tensor>& lengths, const std::optional<Tensor>& ptr) {
  STD_TORCH_CHECK(points.dim() == 3 && points.size(2) >= 1 && points.size(1) < (int64_t(1) << 31), "points: bad shape");
  const ScalarType real = points.scalar_type();
  STD_TORCH_CHECK(real == ScalarType::Float || real == ScalarType::Double, "points: expected float32 or float64");
  check_dense(points, "points", real, {points.size(0), points.size(1), points.size(2)});
  if (lengths) check_dense(*lengths, "lengths", ScalarType::Long, {points.size(0)});
  if (ptr) check_offsets(*ptr, "ptr", points.size(1));
  const Sets sets{points.size(0), points.size(1), points.size(1), true, ints(lengths), nullptr, ints(ptr), nullptr,
                  ptr ? ptr->size(0) - 1 : 1};
  auto index = std::make_shared<Index>(Index{points, {}, {}});
  if (real == ScalarType::Float)
    index->f32 = grids_of<float>(points, sets);
  else
    index->f64 = grids_of<double>(points, sets);
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
        "bool include_self, int index=0, Tensor? ptr=None, Tensor? query_ptr=None, "
        "float? within=None, bool absolute=False) "
        "-> (Tensor, Tensor)");
  m.def("knn_index(Tensor points, Tensor? lengths, Tensor? ptr=None) -> int");
  m.def("knn_forget(int index) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("knn", TORCH_BOX(&dfn::knn_op));
  m.impl("knn_index", TORCH_BOX(&dfn::knn_index));
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CompositeExplicitAutograd, m) { m.impl("knn_forget", TORCH_BOX(&dfn::knn_forget)); }
