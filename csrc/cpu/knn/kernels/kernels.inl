// The search kernels, compiled once per instruction set by knn.cpp.
// No std:: templates here: the linker would be free to take another instruction set's copy of them.
//
// A group of up to 16 queries that lie next to each other in one strip walks outward from its own place: strips in
// order of their distance, within a strip from the group's place up and down, eight candidates at a time. A candidate
// that may matter to some lane is appended to a pending list; a full list is sorted and merged into the k best.
//
// Exactness. Float subtraction, multiplication and addition round monotonically, so the squared distance to a
// cell's edge, computed with the same operations in the same order of dimensions, is never above the computed distance
// of a point beyond that edge. Cells are skipped only when it exceeds the k-th distance; at equality the search goes
// on, because a lower id may wait there. (Sums of absolute differences have the same property.) `reach` is the float after the k-th distance, so `< reach` means `<= tau`.

#include "cpu/knn/types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfn::knn::DFN_ISA {
namespace {

#include "lanes.h"
#include "network.h"
#include "group.h"
#include "walk.h"

template <class T, int D, Mask mask, bool absolute = false>
static void search_cells(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  const Grid<T>& queries = *s.queries;
  const Grid<T>& points = *s.points;
  const int dims = D > 0 ? D : points.dims;
  const Worker<T> w(scratch, s.k);
  Group<T> g;
  Lanes<T>* q = (Lanes<T>*)scratch.queries;
  const int below = (points.slab_axis < points.sort_axis) + (points.strip_axis < points.sort_axis);
  uint32_t strip = 0, slab = 0;
  for (uint32_t lo = 0, hi = queries.strips; lo < hi;) {  // the last strip that begins at or before `begin`
    const uint32_t mid = lo + (hi - lo) / 2;
    if (queries.strip_begin[mid + 1] <= begin)
      strip = lo = mid + 1;
    else
      strip = hi = mid;
  }
  for (uint32_t at = begin; at < end;) {
    while (queries.strip_begin[strip + 1] <= at) ++strip;
    while (points.slab_begin[slab + 1] <= strip) ++slab;
    const uint32_t stop = queries.strip_begin[strip + 1] < end ? queries.strip_begin[strip + 1] : end;
    uint32_t place[kGroup];
    g.count = 0;
    for (; at < stop && g.count < kGroup; ++at) {
      const uint32_t id = queries.ids[at];
      if (id < s.first_query || (s.unfinished && s.out_dists[(int64_t)id * s.k + s.k - 1] == 0)) continue;
      place[g.count] = at;
      g.id[g.count++] = id;
    }
    if (g.count == 0) continue;
    for (int i = g.count; i < kGroup; ++i) place[i] = place[g.count - 1];
    start(g, mask, s.self_allowed, s.within);
    for (int h = 0; h < g.halves; ++h)
      for (int dim = 0; dim < dims; ++dim) {
        T x[kLanes];
        for (int l = 0; l < kLanes; ++l) x[l] = queries.coords[dim * queries.stride + place[h * kLanes + l]];
        q[h * dims + dim] = load(x);
      }
    const uint32_t middle = place[g.count / 2];
    const Walk<T, D, mask, absolute> walk{points, w, g, q, dims, points.coords + points.sort_axis * points.stride, below,
                                points.slab_axis < points.strip_axis,
                                queries.coords[points.sort_axis * queries.stride + middle],
                                queries.coords[points.strip_axis * queries.stride + middle],
                                scratch.place_hint, scratch.strip_hint};
    walk.run(slab, strip);
    finish(w, g, false, s);
  }
}

// Every query against every point, both in ascending order of ids; until every query has k at distance zero.
template <class T, Mask mask, bool absolute = false>
static void scan_points(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  const Grid<T>& queries = *s.queries;
  const Grid<T>& points = *s.points;
  const int dims = points.dims;
  const Worker<T> w(scratch, s.k);
  Group<T> g;
  Lanes<T>* q = (Lanes<T>*)scratch.queries;
  for (uint32_t at = begin; at < end; at += g.count) {
    g.count = end - at < kGroup ? end - at : kGroup;
    for (int i = 0; i < g.count; ++i) g.id[i] = queries.ids[at + i];
    start(g, mask, s.self_allowed, s.within);
    for (int h = 0; h < g.halves; ++h)
      for (int dim = 0; dim < dims; ++dim) {
        T x[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          const int i = h * kLanes + l < g.count ? h * kLanes + l : g.count - 1;
          x[l] = queries.coords[dim * queries.stride + at + i];
        }
        q[h * dims + dim] = load(x);
      }
    for (uint32_t p = 0; p < points.n; p += kStep) {
      if (mask == Mask::limit && points.ids[p] > g.id[kGroup - 1]) break;
      const int count = points.n - p < kStep ? points.n - p : kStep;
      examine<T, 0, mask, absolute>(w, g, q, dims, points.coords + p, points.stride, points.ids + p, count, true);
      if (!any_within(g)) break;
    }
    finish(w, g, true, s);
  }
}

template <class T, int D>
static void search_dims(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  switch (s.mask) {
    case Mask::all: return search_cells<T, D, Mask::all>(s, begin, end, scratch);
    case Mask::limit: return search_cells<T, D, Mask::limit>(s, begin, end, scratch);
    case Mask::not_self: return search_cells<T, D, Mask::not_self>(s, begin, end, scratch);
  }
}

template <class T>
static void search(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  if (s.absolute) return search_cells<T, 0, Mask::all, true>(s, begin, end, scratch);
  if constexpr (sizeof(T) == 4) {  // unrolled for the usual cases only: every copy costs seconds of compilation
    if (s.points->dims == 1) return search_dims<T, 1>(s, begin, end, scratch);
    if (s.points->dims == 2) return search_dims<T, 2>(s, begin, end, scratch);
    if (s.points->dims == 3) return search_dims<T, 3>(s, begin, end, scratch);
  }
  search_dims<T, 0>(s, begin, end, scratch);
}

template <class T>
static void scan(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  if (s.absolute) return scan_points<T, Mask::all, true>(s, begin, end, scratch);
  switch (s.mask) {
    case Mask::all: return scan_points<T, Mask::all>(s, begin, end, scratch);
    case Mask::limit: return scan_points<T, Mask::limit>(s, begin, end, scratch);
    case Mask::not_self: return scan_points<T, Mask::not_self>(s, begin, end, scratch);
  }
}

}  // namespace

extern const KernelTable table;
const KernelTable table = {{search<float>, scan<float>}, {search<double>, scan<double>}};

}  // namespace dfn::knn::DFN_ISA
