#include "cpu/knn/grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/knn/radix.h"

namespace dfn::knn {
namespace {

template <class T>
bool finite_row(const T* row, int dims) {
  T sum = 0;  // 0 * x is 0 for finite x, NaN otherwise
  for (int d = 0; d < dims; ++d) sum += row[d] * T(0);
  return sum == T(0);
}

// A row on its way to its cell. D > 3: only the coordinates along the grid's axes travel.
template <class T, int G>
struct Record {
  T x[G];
  uint32_t id;
};

// First cell whose upper splitter is above v. Branch-free: the comparison decides a move, not a jump.
template <class T>
uint32_t cell_of(const T* splitters, uint32_t count, T v) {
  const T* base = splitters;
  uint32_t n = count;
  while (n > 1) {
    const uint32_t half = n / 2;
    base += base[half - 1] <= v ? half : 0;
    n -= half;
  }
  return static_cast<uint32_t>(base - splitters) + (n == 1 && base[0] <= v);
}

// Distinct cuts of an ascending sample into `parts` of equal count; no cut at its minimum, so no cell is empty.
template <class T>
std::vector<T> quantiles(std::vector<T>& sample, int64_t parts) {
  std::sort(sample.begin(), sample.end());
  std::vector<T> cuts;
  const int64_t m = static_cast<int64_t>(sample.size());
  for (int64_t i = 1; i < parts; ++i) {
    const T v = sample[i * m / parts];
    if (v > sample[0] && (cuts.empty() || v > cuts.back())) cuts.push_back(v);
  }
  return cuts;
}

template <class T>
struct Extent {
  std::vector<T> lo, hi;
  int64_t finite = 0;
};

template <class T>
Extent<T> extent_of(const Rows<T>& rows, const Pool& pool) {
  const int D = rows.dims;
  const T inf = std::numeric_limits<T>::infinity();
  std::vector<Extent<T>> part(pool.threads, {std::vector<T>(D, inf), std::vector<T>(D, -inf), 0});
  for_shares(pool, rows.n, [&](int worker, int64_t begin, int64_t end) {
    std::vector<T> lo(D, inf), hi(D, -inf);
    int64_t finite = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = rows.data + i * D;
      if (!finite_row(row, D)) continue;
      ++finite;
      for (int d = 0; d < D; ++d) {
        lo[d] = std::min(lo[d], row[d]);
        hi[d] = std::max(hi[d], row[d]);
      }
    }
    part[worker] = {std::move(lo), std::move(hi), finite};
  });
  for (size_t w = 1; w < part.size(); ++w) {
    part[0].finite += part[w].finite;
    for (int d = 0; d < D; ++d) {
      part[0].lo[d] = std::min(part[0].lo[d], part[w].lo[d]);
      part[0].hi[d] = std::max(part[0].hi[d], part[w].hi[d]);
    }
  }
  return std::move(part[0]);
}

// Is every computed distance inside the box zero? By monotone rounding the corner tells for all pairs.
template <class T>
bool all_distances_zero(const Extent<T>& e) {
  T sum = 0;
  for (size_t d = 0; d < e.lo.size(); ++d) {
    const T x = e.hi[d] - e.lo[d];
    sum += x * x;
  }
  return sum == T(0);
}

constexpr int64_t kSample = 16384;
constexpr double kCellWidth = 1.3;  // in radii of the ball of k neighbours; measured: 1.0 to 1.5 hardly differ
constexpr double kUnitBall[] = {1, 2, 3.14159265, 4.18879};

// Chooses the axes and the number of cells so that a cell is about as wide as the ball of k neighbours is, from the
// middle 80 % of a sample: outliers must not widen cells. An axis flatter than that ball is not cut.
template <class T>
Cuts<T> find_cuts(const Rows<T>& rows, const Extent<T>& extent, int k) {
  Cuts<T> cuts;
  const int D = rows.dims;
  const int64_t step = std::max<int64_t>(1, rows.n / kSample);
  std::vector<std::vector<T>> sample(D);
  for (int64_t i = 0; i < rows.n; i += step) {
    const T* row = rows.data + i * D;
    if (!finite_row(row, D)) continue;
    for (int d = 0; d < D; ++d) sample[d].push_back(row[d]);
  }
  if (sample[0].empty()) return cuts;
  struct Axis {
    double length;
    int dim;
  };
  std::vector<Axis> axes;
  for (int d = 0; d < D; ++d) {
    std::sort(sample[d].begin(), sample[d].end());
    const size_t m = sample[d].size();
    axes.push_back({double(sample[d][m - 1 - m / 10]) - double(sample[d][m / 10]), d});
  }
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.length > b.length; });
  axes.resize(std::min(D, 3));
  cuts.sort_axis = axes[0].dim;
  cuts.slab_axis = cuts.strip_axis = cuts.sort_axis;
  const double n = std::max<double>(1, double(extent.finite));
  double width = 0;
  int used = static_cast<int>(axes.size());
  for (; used > 1; --used) {
    double volume = 1;
    for (int a = 0; a < used; ++a) volume *= axes[a].length / axes[0].length;
    width = axes[0].length * std::pow(k * volume / (kUnitBall[used] * n), 1.0 / used);
    if (axes[used - 1].length > 2 * width) break;
  }
  auto parts = [&](int a, double most) {
    return int64_t(std::max(1.0, std::min(most, axes[a].length / (width * kCellWidth))));
  };
  if (used == 3) {
    cuts.slab_axis = axes[2].dim;
    cuts.strip_axis = axes[1].dim;
    cuts.has_slabs = cuts.has_strips = true;
    cuts.slabs = quantiles(sample[cuts.slab_axis], parts(2, n / 1024));
    cuts.strips_per_slab = static_cast<int>(parts(1, n / (32.0 * (cuts.slabs.size() + 1))));
  } else if (used == 2) {
    cuts.slab_axis = axes[1].dim;
    cuts.has_slabs = true;
    cuts.slabs = quantiles(sample[cuts.slab_axis], parts(1, n / 64));
  } else {  // one strip; cut along the sort axis only so that the pieces can be sorted in parallel
    cuts.slabs = quantiles(sample[cuts.sort_axis], int64_t(n / 4096) + 1);
  }
  return cuts;
}

template <class T, int G>
class Builder {
 public:
  Builder(const Rows<T>& rows, int k, bool self, const Cuts<T>* given, const Pool& pool) : rows_(rows), pool_(pool) {
    if (given) {
      out_.cuts = *given;
    } else {
      const Extent<T> extent = extent_of(rows, pool);
      const bool one_place = all_distances_zero(extent);
      if (!(self && one_place)) out_.cuts = find_cuts(rows, extent, k);
      out_.cuts.one_place = one_place;
      out_.cuts.collapsed = self && one_place;
      own_cuts_ = true;
    }
    const Cuts<T>& c = out_.cuts;
    const int all[3] = {c.sort_axis, c.slab_axis, c.strip_axis};
    for (int g = 0; g < G; ++g) axis_[g] = all[g];
    if (G <= 3 && rows.dims == G) {  // every coordinate travels
      for (int g = 0; g < G; ++g) axis_[g] = g;
      sort_at_ = c.sort_axis, slab_at_ = c.slab_axis, strip_at_ = c.strip_axis;
    } else {
      sort_at_ = 0, slab_at_ = 1, strip_at_ = 2;
    }
  }

  BuiltGrid<T> run() {
    scatter();
    finish();
    return std::move(out_);
  }

 private:
  // Counting sort into slabs (or into pieces of the one strip). Stable: ids ascend inside a slab.
  void scatter() {
    const std::vector<T>& cut = out_.cuts.slabs;
    const uint32_t cells = static_cast<uint32_t>(cut.size()) + 1;
    const int at = out_.cuts.has_slabs ? slab_at_ : sort_at_;
    const int dim = axis_[at];
    const int D = rows_.dims;
    Buffer<uint32_t> cell(rows_.n);
    std::vector<std::vector<uint32_t>> count(pool_.threads, std::vector<uint32_t>(cells, 0));
    for_shares(pool_, rows_.n, [&](int worker, int64_t begin, int64_t end) {
      uint32_t* own = count[worker].data();
      for (int64_t i = begin; i < end; ++i) {
        const T* row = rows_.data + i * D;
        if (!finite_row(row, D)) {
          cell[i] = kNoPoint;
          continue;
        }
        const uint32_t c = cell_of(cut.data(), cells - 1, row[dim]);
        cell[i] = c;
        ++own[c];
      }
    });
    cell_begin_.assign(cells + 1, 0);
    uint32_t total = 0;
    for (uint32_t c = 0; c < cells; ++c) {
      cell_begin_[c] = total;
      for (auto& own : count) {
        const uint32_t n = own[c];
        own[c] = total;
        total += n;
      }
    }
    cell_begin_[cells] = total;
    records_ = Buffer<Record<T, G>>(total);
    for_shares(pool_, rows_.n, [&](int worker, int64_t begin, int64_t end) {
      uint32_t* next = count[worker].data();
      for (int64_t i = begin; i < end; ++i) {
        if (cell[i] == kNoPoint) continue;
        Record<T, G>& r = records_[next[cell[i]]++];
        const T* row = rows_.data + i * D;
        for (int g = 0; g < G; ++g) r.x[g] = out_.cuts.collapsed ? T(0) : row[axis_[g]] + T(0);  // no -0
        r.id = static_cast<uint32_t>(i);
      }
    });
    out_.n = total;
  }

  void finish() {
    const uint32_t n = out_.n, cells = static_cast<uint32_t>(cell_begin_.size()) - 1;
    Cuts<T>& cuts = out_.cuts;
    out_.dims = rows_.dims;
    out_.stride = n;
    out_.coords = Buffer<T>(int64_t(n) * rows_.dims);
    out_.ids = Buffer<uint32_t>(n);
    std::vector<std::vector<uint32_t>> strip_ends(cells);
    if (own_cuts_ && cuts.has_strips) cuts.strips.resize(cells);
    std::vector<Workspace> space(pool_.threads);
    for_pieces(pool_, cells, 1, [&](int worker, int64_t c, int64_t) {
      sort_slab(static_cast<uint32_t>(c), strip_ends[c], space[worker]);
    });
    if (!cuts.has_slabs) {
      out_.slab_begin = {0, 1};
      out_.strip_begin = {0, n};
    } else {
      out_.slab_begin.push_back(0);
      out_.strip_begin.push_back(0);
      for (auto& ends : strip_ends) {
        out_.strip_begin.insert(out_.strip_begin.end(), ends.begin(), ends.end());
        out_.slab_begin.push_back(static_cast<uint32_t>(out_.strip_begin.size()) - 1);
      }
    }
    bounds();
    records_ = {};
  }

  struct Workspace {
    std::vector<Record<T, G>> sorted;
    std::vector<uint32_t> strip;
    RadixSpace<T> radix;
  };

  void sort_slab(uint32_t c, std::vector<uint32_t>& ends, Workspace& space) {
    const uint32_t begin = cell_begin_[c], end = cell_begin_[c + 1], n = end - begin;
    Record<T, G>* r = records_.data() + begin;
    if (!out_.cuts.has_strips) {
      sort_strip(r, begin, n, space);
      ends.push_back(end);
      return;
    }
    std::vector<T>& cut = out_.cuts.strips[c];
    if (own_cuts_ && n > 0) {
      std::vector<T> sample;
      const uint32_t step = std::max(1u, n / (8u * out_.cuts.strips_per_slab + 64u));
      for (uint32_t i = 0; i < n; i += step) sample.push_back(r[i].x[strip_at_]);
      cut = quantiles(sample, out_.cuts.strips_per_slab);
    }
    const uint32_t strips = static_cast<uint32_t>(cut.size()) + 1;
    std::vector<uint32_t> next(strips + 1, 0);
    space.strip.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
      space.strip[i] = cell_of(cut.data(), strips - 1, r[i].x[strip_at_]);
      ++next[space.strip[i] + 1];
    }
    for (uint32_t s = 0; s < strips; ++s) {
      next[s + 1] += next[s];
      ends.push_back(begin + next[s + 1]);
    }
    space.sorted.resize(n);
    std::vector<uint32_t> first(next.begin(), next.end() - 1);
    for (uint32_t i = 0; i < n; ++i) space.sorted[next[space.strip[i]]++] = r[i];
    for (uint32_t s = 0; s < strips; ++s)
      sort_strip(space.sorted.data() + first[s], begin + first[s], next[s] - first[s], space);
  }

  // Sorts n records along the sort axis, equal ones by the other coordinates and the id, and writes their columns.
  void sort_strip(const Record<T, G>* r, uint32_t place, uint32_t n, Workspace& space) {
    const uint32_t* order = radix_order(n, space.radix, [&](uint32_t i) { return r[i].x[sort_at_]; });
    T* coords = out_.coords.data();
    const int64_t stride = out_.stride;
    uint32_t* ids = out_.ids.data() + place;
    const int D = rows_.dims;
    if (D == G) {
      for (int g = 0; g < G; ++g) {
        T* column = coords + g * stride + place;
        for (uint32_t i = 0; i < n; ++i) column[i] = r[order[i]].x[g];
      }
      for (uint32_t i = 0; i < n; ++i) ids[i] = r[order[i]].id;
    } else {
      for (uint32_t i = 0; i < n; ++i) {
        ids[i] = r[order[i]].id;
        const T* row = rows_.data + int64_t(ids[i]) * D;
        for (int d = 0; d < D; ++d) coords[d * stride + place + i] = out_.cuts.collapsed ? T(0) : row[d] + T(0);
      }
    }
    order_equal(place, n);
  }

  // Runs that are equal along the sort axis: equal positions must lie together, in the order of ids.
  void order_equal(uint32_t place, uint32_t n) {
    const int D = rows_.dims;
    if (D == 1) return;
    T* coords = out_.coords.data();
    const int64_t stride = out_.stride;
    uint32_t* ids = out_.ids.data();
    const T* z = coords + out_.cuts.sort_axis * stride;
    auto before = [&](uint32_t a, uint32_t b) {
      for (int d = 0; d < D; ++d) {
        const T x = coords[d * stride + a], y = coords[d * stride + b];
        if (x != y) return x < y;
      }
      return ids[a] < ids[b];
    };
    std::vector<uint32_t> run;
    std::vector<T> copy;
    for (uint32_t i = place; i + 1 < place + n;) {
      uint32_t e = i + 1;
      bool sorted = true;
      for (; e < place + n && z[e] == z[i]; ++e) sorted = sorted && before(e - 1, e);
      if (!sorted) {
        run.resize(e - i);
        for (uint32_t j = i; j < e; ++j) run[j - i] = j;
        std::sort(run.begin(), run.end(), before);
        copy.resize(e - i);
        for (int d = 0; d < D; ++d) {
          T* column = coords + d * stride;
          for (uint32_t j = 0; j < e - i; ++j) copy[j] = column[run[j]];
          std::copy(copy.begin(), copy.end(), column + i);
        }
        for (auto& j : run) j = ids[j];
        std::copy(run.begin(), run.end(), ids + i);
      }
      i = e;
    }
  }

  void bounds() {
    const T inf = std::numeric_limits<T>::infinity();
    const uint32_t slabs = static_cast<uint32_t>(out_.slab_begin.size()) - 1;
    const uint32_t strips = static_cast<uint32_t>(out_.strip_begin.size()) - 1;
    out_.slab_lo = Buffer<T>(slabs), out_.slab_hi = Buffer<T>(slabs);
    out_.strip_lo = Buffer<T>(strips), out_.strip_hi = Buffer<T>(strips);
    auto span = [&](int axis, uint32_t begin, uint32_t end, T& lo, T& hi) {
      lo = inf, hi = -inf;
      const T* column = out_.coords.data() + axis * out_.stride;
      for (uint32_t i = begin; i < end; ++i) lo = std::min(lo, column[i]), hi = std::max(hi, column[i]);
    };
    const Cuts<T>& cuts = out_.cuts;
    for_pieces(pool_, slabs, 4, [&](int, int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const uint32_t a = out_.slab_begin[s], e = out_.slab_begin[s + 1];
        for (uint32_t t = a; t < e; ++t)
          if (cuts.has_strips)
            span(cuts.strip_axis, out_.strip_begin[t], out_.strip_begin[t + 1], out_.strip_lo[t], out_.strip_hi[t]);
          else
            out_.strip_lo[t] = -inf, out_.strip_hi[t] = inf;
        if (cuts.has_slabs)
          span(cuts.slab_axis, out_.strip_begin[a], out_.strip_begin[e], out_.slab_lo[s], out_.slab_hi[s]);
        else
          out_.slab_lo[s] = -inf, out_.slab_hi[s] = inf;
      }
    });
  }

  Rows<T> rows_;
  const Pool& pool_;
  bool own_cuts_ = false;
  int axis_[G];
  int sort_at_, slab_at_, strip_at_;  // where the axes are in a record
  std::vector<uint32_t> cell_begin_;
  Buffer<Record<T, G>> records_;
  BuiltGrid<T> out_;
};

}  // namespace

template <class T>
Grid<T> BuiltGrid<T>::view() const {
  Grid<T> g;
  g.coords = coords.data();
  g.stride = stride;
  g.ids = ids.data();
  g.n = n;
  g.dims = dims;
  g.slab_axis = cuts.slab_axis, g.strip_axis = cuts.strip_axis, g.sort_axis = cuts.sort_axis;
  g.slabs = slab_begin.empty() ? 0 : static_cast<uint32_t>(slab_begin.size()) - 1;
  g.strips = strip_begin.empty() ? 0 : static_cast<uint32_t>(strip_begin.size()) - 1;
  g.slab_begin = slab_begin.data(), g.strip_begin = strip_begin.data();
  g.slab_lo = slab_lo.data(), g.slab_hi = slab_hi.data();
  g.strip_lo = strip_lo.data(), g.strip_hi = strip_hi.data();
  return g;
}

template <class T>
BuiltGrid<T> build_grid(const Rows<T>& rows, int k, bool self, const Cuts<T>* cuts, const Pool& pool) {
  switch (rows.dims) {
    case 1: return Builder<T, 1>(rows, k, self, cuts, pool).run();
    case 2: return Builder<T, 2>(rows, k, self, cuts, pool).run();
    default: return Builder<T, 3>(rows, k, self, cuts, pool).run();
  }
}

template <class T>
BuiltGrid<T> without_repeats(const BuiltGrid<T>& grid, int keep, const Pool& pool) {
  const int D = grid.dims;
  const uint32_t strips = static_cast<uint32_t>(grid.strip_begin.size()) - 1;
  auto repeats = [&](uint32_t a, uint32_t b) {
    for (int d = 0; d < D; ++d)
      if (grid.coords[d * grid.stride + a] != grid.coords[d * grid.stride + b]) return false;
    return true;
  };
  // A position's copies are neighbours in a strip, so `keep` copies before a point mean that it can go.
  auto droppable = [&](uint32_t begin, uint32_t i) { return i >= begin + keep && repeats(i - keep, i); };
  std::vector<uint32_t> kept(strips);
  std::atomic<bool> any{false};
  for_pieces(pool, strips, 16, [&](int, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      uint32_t count = 0;
      const uint32_t a = grid.strip_begin[s], e = grid.strip_begin[s + 1];
      for (uint32_t i = a; i < e; ++i) count += !droppable(a, i);
      kept[s] = count;
      if (count != e - a) any = true;
    }
  });
  BuiltGrid<T> out;
  if (!any) return out;
  out.dims = D;
  out.cuts = grid.cuts;
  out.slab_begin = grid.slab_begin;
  out.strip_begin.push_back(0);
  for (uint32_t c : kept) out.strip_begin.push_back(out.strip_begin.back() + c);
  out.n = out.strip_begin.back();
  out.stride = out.n;
  out.coords = Buffer<T>(int64_t(out.n) * D);
  out.ids = Buffer<uint32_t>(out.n);
  for_pieces(pool, strips, 16, [&](int, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const uint32_t a = grid.strip_begin[s], e = grid.strip_begin[s + 1];
      uint32_t to = out.strip_begin[s];
      for (uint32_t i = a; i < e; ++i) {
        if (droppable(a, i)) continue;
        for (int d = 0; d < D; ++d) out.coords[d * out.stride + to] = grid.coords[d * grid.stride + i];
        out.ids[to++] = grid.ids[i];
      }
    }
  });
  auto copied = [](const Buffer<T>& from) {
    Buffer<T> to(from.size());
    std::copy(from.data(), from.data() + from.size(), to.data());
    return to;
  };
  out.slab_lo = copied(grid.slab_lo), out.slab_hi = copied(grid.slab_hi);
  out.strip_lo = copied(grid.strip_lo), out.strip_hi = copied(grid.strip_hi);
  return out;
}

template <class T>
BuiltGrid<T> in_order(const Rows<T>& rows, const Pool&) {
  const int D = rows.dims;
  BuiltGrid<T> out;
  out.dims = D;
  out.stride = rows.n;
  out.coords = Buffer<T>(rows.n * D);
  out.ids = Buffer<uint32_t>(rows.n);
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* row = rows.data + i * D;
    if (!finite_row(row, D)) continue;
    for (int d = 0; d < D; ++d) out.coords[d * out.stride + out.n] = row[d];
    out.ids[out.n++] = static_cast<uint32_t>(i);
  }
  return out;
}

#define DFN_INSTANTIATE(T)                                                                        \
  template struct BuiltGrid<T>;                                                                   \
  template BuiltGrid<T> build_grid(const Rows<T>&, int, bool, const Cuts<T>*, const Pool&);             \
  template BuiltGrid<T> without_repeats(const BuiltGrid<T>&, int, const Pool&);                   \
  template BuiltGrid<T> in_order(const Rows<T>&, const Pool&);
DFN_INSTANTIATE(float)
DFN_INSTANTIATE(double)

}  // namespace dfn::knn
