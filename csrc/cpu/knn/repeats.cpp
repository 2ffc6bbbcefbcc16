#include <algorithm>
#include <atomic>

#include "cpu/knn/grid.h"

namespace dfn::knn {

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
  out.coords = Array<T>(int64_t(out.n) * D);
  out.ids = Array<uint32_t>(out.n);
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
  auto copied = [](const Array<T>& from) {
    Array<T> to(from.size());
    std::copy(from.data(), from.data() + from.size(), to.data());
    return to;
  };
  out.slab_lo = copied(grid.slab_lo), out.slab_hi = copied(grid.slab_hi);
  out.strip_lo = copied(grid.strip_lo), out.strip_hi = copied(grid.strip_hi);
  return out;
}

template <class T>
void put_in_order(const Rows<T>& rows, BuiltGrid<T>& out) {
  const int D = rows.dims;
  out.dims = D;
  out.stride = rows.n;
  out.n = 0;
  if (out.coords.size() < rows.n * D) out.coords = Array<T>(rows.n * D);
  if (out.ids.size() < rows.n) out.ids = Array<uint32_t>(rows.n);
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* row = rows.data + i * D;
    if (!finite_row(row, D)) continue;
    for (int d = 0; d < D; ++d) out.coords[d * out.stride + out.n] = row[d];
    out.ids[out.n++] = static_cast<uint32_t>(i);
  }
}

#define DFN_INSTANTIATE(T)                                                      \
  template struct BuiltGrid<T>;                                                 \
  template BuiltGrid<T> without_repeats(const BuiltGrid<T>&, int, const Pool&); \
  template void put_in_order(const Rows<T>&, BuiltGrid<T>&);
DFN_INSTANTIATE(float)
DFN_INSTANTIATE(double)

}  // namespace dfn::knn
