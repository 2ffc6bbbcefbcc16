#include "cpu/knn/engine.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/common/isa.h"

namespace dfn::knn {

DFN_DECLARE_ISA(extern const KernelTable table)

namespace {

const KernelTable& kernels() {
#if defined(__x86_64__) && !defined(DFN_ONE_ISA)
  if (cpu_isa() == Isa::avx512) return avx512::table;
  if (cpu_isa() == Isa::avx2) return avx2::table;
#endif
  return baseline::table;
}

template <class T>
const Kernels<T>& kernels_of() {
  if constexpr (sizeof(T) == 4)
    return kernels().f32;
  else
    return kernels().f64;
}

// Below this many points comparing all of them is as fast as sorting them first.
constexpr int64_t kExhaustive = 768;
// Above this many dimensions three sorted axes exclude too little.
constexpr int kMostGridDims = 8;
// What a grid is built for that will serve any k.
constexpr int kUsualK = 16;

// The memory of one worker. Each array by itself, and no longer than it must be: so AddressSanitizer sees their ends.
template <class T>
class Workspace {
 public:
  Workspace(const Grid<T>& grid, int k) : Workspace(grid.dims, grid.strips, grid.slabs, k) {}
  Workspace(int dims, uint32_t strips, uint32_t slabs, int k) {
    int64_t K = 4;
    while (K < k) K *= 2;
    const int64_t key = sizeof(T) == 4 ? 8 : 16;  // words in a row of eight keys
    const int64_t pending = (K < 8 ? 8 : K) + 8;
    best_ = Array<double>(2 * K * key);
    keys_ = Array<double>(K * key);
    pending_ = Array<T>(2 * pending * 8);
    pending_id_ = Array<uint32_t>(2 * pending);
    queries_ = Array<T>(2 * dims * 8);
    place_hint_ = Array<uint32_t>(strips);
    strip_hint_ = Array<uint32_t>(slabs);
    std::fill_n(place_hint_.data(), strips, 0u);
    std::fill_n(strip_hint_.data(), slabs, 0u);
  }
  Scratch view() const {
    return {best_.data(), pending_.data(), pending_id_.data(), keys_.data(),
            queries_.data(), place_hint_.data(), strip_hint_.data()};
  }

 private:
  Array<double> best_, keys_;
  Array<T> pending_, queries_;
  Array<uint32_t> pending_id_, place_hint_, strip_hint_;
};

template <class T>
void run(const Search<T>& s, bool exhaustive, const Pool& pool) {
  std::vector<Workspace<T>> space;
  for (int worker = 0; worker < pool.threads; ++worker) space.emplace_back(*s.points, s.k);
  const auto kernel = exhaustive ? kernels_of<T>().scan : kernels_of<T>().search;
  const int64_t n = s.queries->n;
  const int64_t piece = std::max<int64_t>(64, std::min<int64_t>(1024, n / (8 * pool.threads) / 16 * 16));
  for_pieces(pool, n, piece, [&](int worker, int64_t begin, int64_t end) {
    kernel(s, static_cast<uint32_t>(begin), static_cast<uint32_t>(end), space[worker].view());
  });
}

template <class T>
void fill_missing(const Request<T>& r, bool all, const Pool& pool) {
  const T* queries = r.queries ? r.queries : r.points;
  for_pieces(pool, r.m, 4096, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      bool finite = !all;
      for (int d = 0; d < r.dims && finite; ++d) finite = queries[i * r.dims + d] * T(0) == T(0);
      if (finite) continue;
      std::fill_n(r.ids + i * r.k, r.k, int64_t(-1));
      std::fill_n(r.dists + i * r.k, r.k, std::numeric_limits<T>::infinity());
    }
  });
}

bool worth_a_grid(int64_t n, int dims) { return n > kExhaustive && dims <= kMostGridDims; }

template <class T>
Search<T> basic(const Request<T>& r) {
  Search<T> s{};
  s.k = r.k;
  s.self_allowed = r.include_self;
  s.mask = r.causal ? Mask::limit : r.include_self ? Mask::all : Mask::not_self;
  s.absolute = r.absolute;
  s.within = r.within;
  s.first_id = r.first_id;
  s.out_ids = r.ids;
  s.out_dists = r.dists;
  return s;
}

template <class T>
Rows<T> point_rows(const Request<T>& r) {
  return {r.points, r.n, r.dims};
}

template <class T>
Rows<T> query_rows(const Request<T>& r) {
  return {r.queries ? r.queries : r.points, r.m, r.dims};
}

// How many points of one position can matter: a query's own copy may be hidden from it.
int copies(int k, Mask mask) { return k + (mask == Mask::not_self); }

// All queries against the first n points; or only some of them, where `some` lists them.
template <class T>
void search_scan(const Request<T>& r, int64_t n, const Pool& pool, const std::vector<uint32_t>& some = {}) {
  Search<T> s = basic(r);
  BuiltGrid<T> points, queries;
  put_in_order(Rows<T>{r.points, n, r.dims}, points);
  if (!some.empty()) {
    const int64_t count = some.size(), D = r.dims;
    Array<T> rows(count * D);
    for (int64_t i = 0; i < count; ++i) std::copy_n(query_rows(r).data + some[i] * D, D, rows.data() + i * D);
    put_in_order(Rows<T>{rows.data(), count, r.dims}, queries);
    for (uint32_t i = 0; i < queries.n; ++i) queries.ids[i] = some[queries.ids[i]];
  } else if (r.queries || r.m != n) {
    put_in_order(query_rows(r), queries);
  }
  const Grid<T> p = points.view(), q = queries.dims ? queries.view() : p;
  s.points = &p;
  s.queries = &q;
  run(s, true, pool);
}

// `grid` holds points of the request; its own grid of the queries is built here, unless the queries are those points.
template <class T>
void search_grid(const Request<T>& r, Search<T> s, const BuiltGrid<T>& grid, bool own_queries, const Pool& pool) {
  BuiltGrid<T> queries;
  if (!own_queries) queries = build_grid(query_rows(r), r.k, &grid.cuts, pool);
  const BuiltGrid<T> fewer = without_repeats(grid, copies(s.k, s.mask), pool);
  const Grid<T> p = fewer.n ? fewer.view() : grid.view(), q = own_queries ? grid.view() : queries.view();
  s.points = &p;
  s.queries = &q;
  run(s, false, pool);
}

template <class T>
BuiltGrid<T> grid_of_first(const Rows<T>& rows, int64_t n, int k, const Pool& pool) {
  return build_grid(Rows<T>{rows.data, n, rows.dims}, k, static_cast<const Cuts<T>*>(nullptr), pool);
}

// Prefixes of n, n/2, n/4, ... points, each serving the later half of its points: at least half of what a query
// meets there is visible to it.
template <class T>
void search_causal(Request<T> r, Prepared<T>* made, const Pool& pool) {
  for (size_t level = 0; r.n > kExhaustive; ++level) {
    Search<T> s = basic(r);
    s.first_query = static_cast<uint32_t>(r.n / 2);
    BuiltGrid<T> own;
    if (!made) own = grid_of_first(point_rows(r), r.n, r.k, pool);
    search_grid(r, s, made ? made->prefix(level, pool) : own, r.queries == nullptr, pool);
    r.n /= 2;
    r.m = std::min(r.m, r.n);
  }
  search_scan(r, r.n, pool);
}

// For positions so close to each other that squared differences underflow: then a query can have any number of points
// at distance zero, and the lowest ids are its neighbours. Nothing comes before k of them among the first n points,
// so n grows until every query has as many, or is all.
template <class T>
void search_underflowing(const Request<T>& r, const Pool& pool) {
  int64_t n = std::min<int64_t>(r.n, std::max(1024, 64 * r.k));
  search_scan(r, n, pool);
  while (n < r.n) {
    Search<T> s = basic(r);
    s.unfinished = true;
    if (r.causal) s.first_query = static_cast<uint32_t>(n);  // those below have seen all they may
    n = std::min(r.n, 16 * n);
    search_grid(r, s, grid_of_first(point_rows(r), n, r.k, pool), r.queries == nullptr && n == r.n, pool);
  }
}

}  // namespace

template <class T>
bool worth_more(const Request<T>& r) {
  return worth_a_grid(r.n, r.dims) || worth_products(r);
}

bool worth_preparing(int64_t n, int dims) { return worth_a_grid(n, dims) || worth_packing(n, dims, 1); }

template <class T>
Prepared<T>::Prepared(const Rows<T>& rows, const Pool& pool) : rows_(rows) {
  const ExactFloats exact;
  if (!worth_a_grid(rows.n, rows.dims)) {
    packed_ = pack_points(rows, pool);
    return;
  }
  zero_share_ = share_of_zero_distances(rows);
  all_ = grid_of_first(rows, rows.n, kUsualK, pool);
}

template <class T>
const BuiltGrid<T>& Prepared<T>::prefix(size_t level, const Pool& pool) {
  if (level == 0) return all_;
  const std::lock_guard lock(mutex_);
  if (halves_.empty())
    for (int64_t n = rows_.n / 2; n > kExhaustive; n /= 2) halves_.push_back(grid_of_first(rows_, n, kUsualK, pool));
  return halves_[level - 1];
}

template <class T>
void search(const Request<T>& r, Prepared<T>* made, const Pool& pool) {
  const ExactFloats exact;
  if (r.m == 0 || r.k == 0) return;
  fill_missing(r, r.n == 0, pool);
  if (r.n == 0) return;
  if (made && made->size() != r.n) made = nullptr;
  if (worth_products(r)) {
    const std::vector<uint32_t> rest =
        made ? search_products(r, made->packed(), pool) : search_products(r, pack_points(point_rows(r), pool), pool);
    if (!rest.empty()) search_scan(r, r.n, pool, rest);
    return;
  }
  if (!worth_a_grid(r.n, r.dims) || (r.queries && r.m < 64 && !made)) return search_scan(r, r.n, pool);
  // So many at distance zero that a walk through the cells would meet far more than k of them? (Copies of one position
  // are not the problem: without_repeats leaves k of them.)
  const double zero_share = r.absolute ? 0 : made ? made->zero_share() : share_of_zero_distances(point_rows(r));
  if (zero_share * r.n > 8 * r.k) return search_underflowing(r, pool);
  if (r.causal) return search_causal(r, made, pool);
  BuiltGrid<T> own;
  if (!made) own = grid_of_first(point_rows(r), r.n, r.k, pool);
  search_grid(r, basic(r), made ? made->prefix(0, pool) : own, r.queries == nullptr, pool);
}

template <class T>
struct SmallSearches<T>::Memory {
  Workspace<T> space;
  BuiltGrid<T> points, queries;
};

template <class T>
SmallSearches<T>::SmallSearches(int dims, int k) : memory_(new Memory{Workspace<T>(dims, 0, 0, k), {}, {}}) {}
template <class T>
SmallSearches<T>::~SmallSearches() = default;

template <class T>
void SmallSearches<T>::search(const Request<T>& r) {
  const ExactFloats exact;
  if (r.n == 0) return fill_missing(r, true, Pool{});
  auto& [space, points, queries] = *memory_;
  put_in_order(point_rows(r), points);
  if (r.queries) put_in_order(query_rows(r), queries);
  const Grid<T> p = points.view(), q = r.queries ? queries.view() : p;
  if (q.n != r.m) fill_missing(r, false, Pool{});
  Search<T> s = basic(r);
  s.points = &p;
  s.queries = &q;
  kernels_of<T>().scan(s, 0, q.n, space.view());
}

template bool worth_more(const Request<float>&);
template bool worth_more(const Request<double>&);
template class Prepared<float>;
template class Prepared<double>;
template class SmallSearches<float>;
template class SmallSearches<double>;
template void search(const Request<float>&, Prepared<float>*, const Pool&);
template void search(const Request<double>&, Prepared<double>*, const Pool&);

}  // namespace dfn::knn
