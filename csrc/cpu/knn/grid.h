// The equi-depth grid: points sorted into slabs, strips, and along the strips. Boundaries are quantiles of a sample;
// where they fall decides the speed of a search, never its result.
#pragma once

#include <vector>

#include "cpu/knn/memory.h"
#include "cpu/knn/parallel.h"
#include "cpu/knn/types.h"

namespace dfn::knn {

// Rows of the caller: n points of D coordinates, row-major. Rows with a NaN or an infinity are left out.
template <class T>
struct Rows {
  const T* data;
  int64_t n;
  int dims;
};

// Where to cut: splitters of the slabs, and of the strips of each slab.
template <class T>
struct Cuts {
  int slab_axis = 0, strip_axis = 0, sort_axis = 0;
  bool has_slabs = false, has_strips = false;
  bool one_place = false;                 // every distance among the points is zero
  bool collapsed = false;                 // and so they are stored as one position
  std::vector<T> slabs;                   // ascending; slab i holds [slabs[i-1], slabs[i])
  std::vector<std::vector<T>> strips;     // per slab
  int strips_per_slab = 1;
};

// A Grid with its memory.
template <class T>
struct BuiltGrid {
  Buffer<T> coords;
  Buffer<uint32_t> ids;
  Buffer<T> slab_lo, slab_hi, strip_lo, strip_hi;
  std::vector<uint32_t> slab_begin, strip_begin;
  Cuts<T> cuts;
  int64_t stride = 0;
  uint32_t n = 0;
  int dims = 0;

  Grid<T> view() const;
};

// Sorts the points. `cuts` null: finds the cuts for searches of about k neighbours; else uses those of another grid,
// so that queries fall into the cells of the points. `self` promises that the queries will be these points: then points
// so close that all distances among them round to zero may be stored as one position.
template <class T>
BuiltGrid<T> build_grid(const Rows<T>& rows, int k, bool self, const Cuts<T>* cuts, const Pool& pool);

// The same cells with at most `keep` points of any one position, those with the lowest ids: no other point there can
// be among the keep nearest of anything. Returns an empty grid (n = 0) if that would drop nothing.
template <class T>
BuiltGrid<T> without_repeats(const BuiltGrid<T>& grid, int keep, const Pool& pool);

// All finite points in the order of ids, in columns, without cells: for exhaustive scans.
template <class T>
BuiltGrid<T> in_order(const Rows<T>& rows, const Pool& pool);

}  // namespace dfn::knn
