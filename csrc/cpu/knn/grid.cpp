#include "cpu/knn/grid.h"

#include <algorithm>
#include <limits>

#include "cpu/knn/radix.h"

namespace dfn::knn {
namespace {

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

template <class T, int G>
class Builder {
 public:
  Builder(const Rows<T>& rows, int k, const Cuts<T>* given, const Pool& pool)
      : rows_(rows), pool_(pool), own_cuts_(given == nullptr) {
    out_.cuts = given ? *given : find_cuts(rows, k);
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
    Array<uint32_t> cell(rows_.n);
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
    records_ = Array<Record<T, G>>(total);
    for_shares(pool_, rows_.n, [&](int worker, int64_t begin, int64_t end) {
      uint32_t* next = count[worker].data();
      for (int64_t i = begin; i < end; ++i) {
        if (cell[i] == kNoPoint) continue;
        Record<T, G>& r = records_[next[cell[i]]++];
        const T* row = rows_.data + i * D;
        for (int g = 0; g < G; ++g) r.x[g] = row[axis_[g]] + T(0);  // no -0
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
    out_.coords = Array<T>(int64_t(n) * rows_.dims);
    out_.ids = Array<uint32_t>(n);
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
        for (int d = 0; d < D; ++d) coords[d * stride + place + i] = row[d] + T(0);
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
    out_.slab_lo = Array<T>(slabs), out_.slab_hi = Array<T>(slabs);
    out_.strip_lo = Array<T>(strips), out_.strip_hi = Array<T>(strips);
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
  bool own_cuts_;
  int axis_[G];
  int sort_at_, slab_at_, strip_at_;  // where the axes are in a record
  std::vector<uint32_t> cell_begin_;
  Array<Record<T, G>> records_;
  BuiltGrid<T> out_;
};

}  // namespace

template <class T>
BuiltGrid<T> build_grid(const Rows<T>& rows, int k, const Cuts<T>* cuts, const Pool& pool) {
  switch (rows.dims) {
    case 1: return Builder<T, 1>(rows, k, cuts, pool).run();
    case 2: return Builder<T, 2>(rows, k, cuts, pool).run();
    default: return Builder<T, 3>(rows, k, cuts, pool).run();
  }
}

#define DFN_INSTANTIATE(T) \
  template BuiltGrid<T> build_grid(const Rows<T>&, int, const Cuts<T>*, const Pool&);
DFN_INSTANTIATE(float)
DFN_INSTANTIATE(double)

}  // namespace dfn::knn
