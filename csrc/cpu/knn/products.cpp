#include "cpu/knn/products.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/common/isa.h"

namespace dfn::knn {

DFN_DECLARE_ISA(extern const ProductTable product_table)

namespace {

template <class T>
const ProductKernels<T>& kernels() {
  const ProductTable* table = &baseline::product_table;
#if defined(__x86_64__) && !defined(DFN_ONE_ISA)
  if (cpu_isa() == Isa::avx512) table = &avx512::product_table;
  if (cpu_isa() == Isa::avx2) table = &avx2::product_table;
#endif
  if constexpr (sizeof(T) == 4)
    return table->f32;
  else
    return table->f64;
}

// ---- bounds: docs/search.md, Many dimensions ------------------------------------------------------------------------
// Relative error after that many roundings in a row.
template <class T>
double error_of(double roundings) {
  const double e = roundings * std::numeric_limits<T>::epsilon() / 2;
  return e / (1 - e);
}

template <class T>
struct Errors {
  double product;     // of |q|^2 + |p|^2 - 2 q.p, times |q|^2 + |p|^2; |q|^2 of doubles is rounded as often as q.p
  double definition;  // of the sum that defines the distance, times the distance
  double underflow;   // what either may lose besides, where squares underflow

  explicit Errors(int dims)
      : product(error_of<T>((sizeof(T) == 4 ? 1.0 : 2.0) * dims + 32)), definition(error_of<T>(dims + 8.0)),
        underflow(4.0 * dims * std::numeric_limits<T>::denorm_min()) {}
};

// With squared norms up to that nothing overflows. What is longer is measured: always, as a point, and with every
// point, as a query.
template <class T>
constexpr double kLongest = sizeof(T) == 4 ? 0x1p124 : 0x1p1020;

template <class T>
T rounded_up(double x) {
  const T most = std::numeric_limits<T>::max(), t = x < most ? static_cast<T>(x) : most;
  return t < x && t < most ? std::nextafter(t, most) : t;
}

// ---- one query ------------------------------------------------------------------------------------------------------
template <class T>
struct Near {
  T dist;
  uint32_t id;
  bool operator<(const Near& other) const { return dist < other.dist || (dist == other.dist && id < other.id); }
};

template <class T>
struct Asking;

// One worker's memory: the queries of a block, and what they need one at a time.
template <class T>
struct Block {
  const Request<T>* request;
  Errors<T> errors;
  int room;
  Array<T> panels;            // [panels][D][panel]
  Array<T> lower, upper;      // [queries][room]
  Array<uint32_t> ids;        // [queries][room]
  std::vector<Asking<T>> asking;
  std::vector<Candidates<T>*> candidates;
  std::vector<T> dists;       // [room]
  int waiting;                // queries that want more points
};

template <class T>
struct Asking : Candidates<T> {
  Block<T>* block;
  const T* query;
  double norm;                  // of the query less the centre, squared
  double bound;                 // no neighbour's distance is above
  int64_t measured;
  bool gave_up;
  std::vector<Near<T>> nearest;  // of those measured, k at most

  void start(Block<T>* of, const T* row, double squares, int64_t end, int64_t hidden) {
    block = of, query = row, norm = squares;
    this->end = end, this->hidden = hidden, this->count = 0;
    this->full = [](Candidates<T>& self) { static_cast<Asking&>(self).make_room(); };
    measured = 0, gave_up = !(squares <= kLongest<T>);
    nearest.clear();
    bound = block->request->within;
    ++block->waiting;
    set_reach();
    if (gave_up) stop();
  }

  // A neighbour's lower bound is not above, in the terms of `lower`.
  void set_reach() {
    const Errors<T>& e = block->errors;
    const double most = (bound + e.underflow) / (1 - e.definition) - norm * (1 - e.product) + e.underflow;
    this->reach = rounded_up<T>(most);
  }

  void stop() {
    this->reach = std::numeric_limits<T>::quiet_NaN();
    --block->waiting;
  }

  // Leaves out the candidates that are farther than k others.
  void thin() {
    const int k = block->request->k;
    if (this->count >= k) {
      const Errors<T>& e = block->errors;
      const double most = kernels<T>().enough(this->upper, this->count, k) + norm * (1 + e.product) + e.underflow;
      bound = std::min(bound, most * (1 + e.definition) + e.underflow);
      set_reach();
    }
    int kept = 0;
    for (int i = 0; i < this->count; ++i) {
      this->lower[kept] = this->lower[i], this->upper[kept] = this->upper[i], this->ids[kept] = this->ids[i];
      kept += this->lower[i] <= this->reach;
    }
    this->count = kept;
  }

  void measure() {
    const Request<T>& r = *block->request;
    T* dists = block->dists.data();
    kernels<T>().measure(query, r.points, r.dims, this->ids, this->count, dists);
    for (int i = 0; i < this->count; ++i)
      if (dists[i] < r.within) nearest.push_back({dists[i], this->ids[i]});
    measured += this->count;
    this->count = 0;
    if (static_cast<int>(nearest.size()) < r.k) return;
    std::nth_element(nearest.begin(), nearest.begin() + r.k - 1, nearest.end());
    nearest.resize(r.k);
    bound = std::min<double>(bound, nearest.back().dist);
    set_reach();
    if (nearest.back().dist == 0) stop();  // who comes later has a higher id
  }

  void make_room() {
    thin();
    if (this->count <= this->room / 2) return;
    measure();
    if (measured <= block->request->n / 4 || this->reach != this->reach) return;
    gave_up = true;
    stop();
  }

  void finish(int64_t* ids, T* dists) {
    thin();
    measure();
    const Request<T>& r = *block->request;
    std::sort(nearest.begin(), nearest.end());
    const size_t found = nearest.size();
    for (size_t i = 0; i < found; ++i) ids[i] = r.first_id + nearest[i].id, dists[i] = nearest[i].dist;
    std::fill(ids + found, ids + r.k, int64_t(-1));
    std::fill(dists + found, dists + r.k, std::numeric_limits<T>::infinity());
  }
};

// ---- all of them ----------------------------------------------------------------------------------------------------
// Near the points, so that their norms are small: the median of a few, which a few far ones do not move.
template <class T>
void find_centre(const Rows<T>& rows, T* centre) {
  constexpr int64_t kSample = 15;
  std::vector<const T*> sample;
  for (int64_t i = 0; i < std::min(kSample, rows.n); ++i) {
    const T* row = rows.data + i * rows.n / std::min(kSample, rows.n) * rows.dims;
    if (finite_row(row, rows.dims)) sample.push_back(row);
  }
  std::vector<T> column(sample.size());
  for (int d = 0; d < rows.dims; ++d) {
    for (size_t i = 0; i < sample.size(); ++i) column[i] = sample[i][d];
    std::nth_element(column.begin(), column.begin() + column.size() / 2, column.end());
    centre[d] = column.empty() ? T(0) : column[column.size() / 2];
  }
}

}  // namespace

template <class T>
PackedPoints<T> pack_points(const Rows<T>& rows, const Pool& pool) {
  const int D = rows.dims, width = kernels<T>().tile;
  const int64_t tiles = (rows.n + width - 1) / width;
  const double error = Errors<T>(D).product;
  PackedPoints<T> out{Array<T>(D), Array<T>(tiles * D * width), Array<T>(tiles * width), Array<T>(tiles * width)};
  find_centre(rows, out.centre.data());
  for_pieces(pool, tiles, 4, [&](int, int64_t begin, int64_t end) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    std::vector<double> norms(width);
    for (int64_t t = begin; t < end; ++t) {
      const T* first = rows.data + t * width * D;
      const int count = static_cast<int>(std::min<int64_t>(width, rows.n - t * width));
      T* tile = out.tiles.data() + t * D * width;
      kernels<T>().pack_points(first, count, D, out.centre.data(), tile, norms.data());
      T *lower = out.lower.data() + t * width, *upper = out.upper.data() + t * width;
      for (int i = 0; i < width; ++i) {
        const bool known = i < count && norms[i] <= kLongest<T>;
        lower[i] = known ? static_cast<T>(norms[i] * (1 - error)) : i < count && finite_row(first + i * D, D) ? -inf : inf;
        upper[i] = known ? static_cast<T>(norms[i] * (1 + error)) : inf;
        for (int d = 0; d < D && !known; ++d) tile[d * width + i] = 0;
      }
    }
  });
  return out;
}

// Measured (docs/search.md, Many dimensions): what a query costs besides its products grows with k, and is won back by
// so many comparisons. The last term keeps `error_of` below 1/2 in float32.
bool worth_packing(int64_t n, int dims, int k) {
  return n * (dims - 16) >= 10000 + 2000 * int64_t(k) && k <= n / 2 && dims < 1 << 22;
}

template <class T>
bool worth_products(const Request<T>& r) {
  return !r.absolute && worth_packing(r.n, r.dims, r.k);
}

template <class T>
std::vector<uint32_t> search_products(const Request<T>& r, const PackedPoints<T>& points, const Pool& pool) {
  const ProductKernels<T>& kernel = kernels<T>();
  const int D = r.dims, width = kernel.tile, panel = kernel.panel;
  const T* queries = r.queries ? r.queries : r.points;
  // A block of queries and their lists stay in the second cache while all points go by.
  constexpr int64_t kBytes = 512 << 10;
  const int room = std::max(64, 4 * r.k);
  const int64_t row_bytes = D * sizeof(T) + room * (2 * sizeof(T) + 4);
  const int64_t panels = std::clamp<int64_t>(std::min(kBytes / row_bytes, r.m / (4 * pool.threads)) / panel, 1, 16);
  const int64_t rows = panels * panel;
  std::vector<Block<T>> blocks;
  for (int worker = 0; worker < pool.threads; ++worker) {
    blocks.push_back({&r, Errors<T>(D), room, Array<T>(rows * D), Array<T>(rows * room), Array<T>(rows * room),
                      Array<uint32_t>(rows * room), std::vector<Asking<T>>(rows), {}, std::vector<T>(room), 0});
    Block<T>& b = blocks.back();
    for (int64_t i = 0; i < rows; ++i) {
      Asking<T>& a = b.asking[i];
      a.room = room;
      a.nearest.reserve(r.k + room);
      a.lower = b.lower.data() + i * room, a.upper = b.upper.data() + i * room, a.ids = b.ids.data() + i * room;
      b.candidates.push_back(&a);
    }
  }
  std::vector<char> left(r.m, 0);
  std::atomic<int64_t> tried{0}, failed{0};
  for_pieces(pool, r.m, rows, [&](int worker, int64_t begin, int64_t end) {
    if (tried >= 64 && 2 * failed > tried) {  // data that this cannot tell apart
      std::fill(left.begin() + begin, left.begin() + end, 1);
      return;
    }
    Block<T>& b = blocks[worker];
    b.waiting = 0;
    std::vector<double> norms(panel);
    for (int64_t i = begin; i < end; i += panel) {
      const int count = static_cast<int>(std::min<int64_t>(panel, end - i));
      kernel.pack_queries(queries + i * D, count, D, points.centre.data(), b.panels.data() + (i - begin) * D, norms.data());
      for (int j = 0; j < count; ++j) {
        const int64_t id = i + j;
        b.asking[id - begin].start(&b, queries + id * D, norms[j], r.causal ? id + r.include_self : r.n,
                                   r.include_self ? -1 : id);
      }
    }
    const int64_t visible = r.causal ? std::min(end, r.n) : r.n;
    for (int64_t first = 0; first < visible && b.waiting > 0; first += width)
      for (int64_t i = begin; i < end; i += panel) {
        const int64_t count = std::min<int64_t>(panel, end - i);
        if (r.causal && first >= i + count) continue;
        kernel.compare(D, b.panels.data() + (i - begin) * D, points.tiles.data() + first * D, points.lower.data() + first,
                       points.upper.data() + first, static_cast<uint32_t>(first), b.candidates.data() + (i - begin),
                       static_cast<int>(count));
      }
    int64_t gave_up = 0;
    for (int64_t i = begin; i < end; ++i) {
      Asking<T>& a = b.asking[i - begin];
      if (!a.gave_up)
        a.finish(r.ids + i * r.k, r.dists + i * r.k);
      else if (finite_row(a.query, D))
        left[i] = 1, ++gave_up;
    }
    tried += end - begin;
    failed += gave_up;
  });
  std::vector<uint32_t> rest;
  for (int64_t i = 0; i < r.m; ++i)
    if (left[i]) rest.push_back(static_cast<uint32_t>(i));
  return rest;
}

#define DFN_INSTANTIATE(T)                                                                                       \
  template PackedPoints<T> pack_points(const Rows<T>&, const Pool&);                                             \
  template bool worth_products(const Request<T>&);                                                               \
  template std::vector<uint32_t> search_products(const Request<T>&, const PackedPoints<T>&, const Pool&);
DFN_INSTANTIATE(float)
DFN_INSTANTIATE(double)

}  // namespace dfn::knn
