#include "cpu/knn/engine.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/isa.h"

namespace dfn::knn {

DFN_DECLARE_ISA(extern const KernelTable table)

namespace {

const KernelTable& kernels() {
#if defined(__x86_64__)
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

// The memory of all workers of a search.
template <class T>
class Scratches {
 public:
  Scratches(const Grid<T>& grid, int k, int workers) {
    int K = 4;
    while (K < k) K *= 2;
    const int64_t key = 8 * (sizeof(T) == 4 ? 8 : 16);  // bytes of one row of eight keys
    const int64_t sizes[] = {2 * K * key,
                             2 * (K + 16) * 8 * int64_t(sizeof(T)),
                             2 * (K + 16) * 4,
                             K * key,
                             2 * grid.dims * 8 * int64_t(sizeof(T)),
                             grid.strips * 4,
                             grid.slabs * 4};
    int64_t total = 0;
    for (int64_t s : sizes) total += (s + 63) / 64 * 64;
    memory_ = Buffer<char>(total * workers);
    std::memset(memory_.data(), 0, total * workers);
    for (int w = 0; w < workers; ++w) {
      void* at[7];
      char* p = memory_.data() + w * total;
      for (int i = 0; i < 7; ++i) {
        at[i] = p;
        p += (sizes[i] + 63) / 64 * 64;
      }
      each_.push_back({at[0], at[1], static_cast<uint32_t*>(at[2]), at[3], at[4], static_cast<uint32_t*>(at[5]),
                       static_cast<uint32_t*>(at[6])});
    }
  }
  const Scratch& operator[](int worker) const { return each_[worker]; }

 private:
  Buffer<char> memory_;
  std::vector<Scratch> each_;
};

template <class T>
void run(const Search<T>& s, bool exhaustive, const Pool& pool) {
  const Scratches<T> scratch(*s.points, s.k, pool.threads);
  const auto kernel = exhaustive ? kernels_of<T>().scan : kernels_of<T>().search;
  const int64_t n = s.queries->n;
  const int64_t piece = std::max<int64_t>(64, std::min<int64_t>(1024, n / (8 * pool.threads) / 16 * 16));
  for_pieces(pool, n, piece, [&](int worker, int64_t begin, int64_t end) {
    kernel(s, static_cast<uint32_t>(begin), static_cast<uint32_t>(end), scratch[worker]);
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

template <class T>
Search<T> basic(const Request<T>& r) {
  Search<T> s{};
  s.k = r.k;
  s.self_allowed = r.include_self;
  s.mask = r.causal ? Mask::limit : r.include_self ? Mask::all : Mask::not_self;
  s.bound = r.bound;
  s.out_ids = r.ids;
  s.out_dists = r.dists;
  return s;
}

// How many points of one position can matter: a query's own copy may be hidden from it.
int copies(int k, Mask mask) { return k + (mask == Mask::not_self); }

template <class T>
void search_scan(const Request<T>& r, const Pool& pool) {
  Search<T> s = basic(r);
  const BuiltGrid<T> points = in_order(Rows<T>{r.points, r.n, r.dims}, pool);
  BuiltGrid<T> queries;
  if (r.queries) queries = in_order(Rows<T>{r.queries, r.m, r.dims}, pool);
  const Grid<T> p = points.view(), q = r.queries ? queries.view() : p;
  s.points = &p;
  s.queries = &q;
  run(s, true, pool);
}

template <class T>
void search_grid(Search<T> s, const BuiltGrid<T>& grid, const BuiltGrid<T>* queries, const Pool& pool) {
  const BuiltGrid<T> fewer = without_repeats(grid, copies(s.k, s.mask), pool);
  const Grid<T> p = fewer.n ? fewer.view() : grid.view(), q = queries ? queries->view() : grid.view();
  s.points = &p;
  s.queries = &q;
  run(s, false, pool);
}

template <class T>
void search_built(const Request<T>& r, const BuiltGrid<T>& grid, const Pool& pool) {
  if (!r.queries) return search_grid<T>(basic(r), grid, nullptr, pool);
  const BuiltGrid<T> queries = build_grid(Rows<T>{r.queries, r.m, r.dims}, r.k, false, &grid.cuts, pool);
  search_grid<T>(basic(r), grid, &queries, pool);
}

// Prefixes of n, n/2, n/4, ... points, each serving the later half of its points: at least half of what a query
// meets there is visible to it.
template <class T>
void search_causal(Request<T> r, const Pool& pool) {
  while (r.n > kExhaustive) {
    Search<T> s = basic(r);
    s.first_query = static_cast<uint32_t>(r.n / 2);
    const Rows<T> rows{r.points, r.n, r.dims};
    const BuiltGrid<T> grid =
        build_grid(rows, r.k, r.queries == nullptr, static_cast<const Cuts<T>*>(nullptr), pool);
    BuiltGrid<T> queries;
    if (r.queries) queries = build_grid(Rows<T>{r.queries, r.m, r.dims}, r.k, false, &grid.cuts, pool);
    search_grid<T>(s, grid, r.queries ? &queries : nullptr, pool);
    r.n /= 2;
    r.m = std::min(r.m, r.n);
  }
  search_scan(r, pool);
}

}  // namespace

bool worth_a_grid(int64_t n, int dims) { return n > kExhaustive && dims <= kMostGridDims; }

template <class T>
void search(const Request<T>& r, const Pool& pool) {
  const ExactFloats exact;
  if (r.m == 0 || r.k == 0) return;
  fill_missing(r, r.n == 0, pool);
  if (r.n == 0) return;
  if (!worth_a_grid(r.n, r.dims) || (r.queries && r.m < 64)) return search_scan(r, pool);
  if (r.causal) return search_causal(r, pool);
  const Rows<T> rows{r.points, r.n, r.dims};
  const BuiltGrid<T> grid = build_grid(rows, r.k, r.queries == nullptr, static_cast<const Cuts<T>*>(nullptr), pool);
  search_built(r, grid, pool);
}

template <class T>
void search(const Request<T>& r, const BuiltGrid<T>& grid, const Pool& pool) {
  if (!r.queries && grid.cuts.one_place) return search(r, pool);
  const ExactFloats exact;
  if (r.m == 0 || r.k == 0) return;
  fill_missing(r, r.n == 0, pool);
  search_built(r, grid, pool);
}

template void search(const Request<float>&, const Pool&);
template void search(const Request<double>&, const Pool&);
template void search(const Request<float>&, const BuiltGrid<float>&, const Pool&);
template void search(const Request<double>&, const BuiltGrid<double>&, const Pool&);

}  // namespace dfn::knn
