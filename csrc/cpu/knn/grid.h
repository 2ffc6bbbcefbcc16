// The equi-depth grid: points sorted into slabs, strips, and along the strips.
#pragma once

#include <vector>

#include "cpu/knn/cuts.h"
#include "cpu/common/memory.h"
#include "cpu/knn/parallel.h"
#include "cpu/knn/types.h"

namespace dfn::knn {

// A Grid with its memory.
template <class T>
struct BuiltGrid {
  Array<T> coords;
  Array<uint32_t> ids;
  Array<T> slab_lo, slab_hi, strip_lo, strip_hi;
  std::vector<uint32_t> slab_begin, strip_begin;
  Cuts<T> cuts;
  int64_t stride = 0;
  uint32_t n = 0;
  int dims = 0;

  Grid<T> view() const;
};

// Sorts the points. `cuts` null: finds the cuts for searches of about k neighbours; else uses those of another grid,
// so that queries fall into the cells of the points.
template <class T>
BuiltGrid<T> build_grid(const Rows<T>& rows, int k, const Cuts<T>* cuts, const Pool& pool);

// The same cells with at most `keep` points of any one position, those with the lowest ids: no other point there can
// be among the keep nearest of anything. Returns an empty grid (n = 0) if that would drop nothing.
template <class T>
BuiltGrid<T> without_repeats(const BuiltGrid<T>& grid, int keep, const Pool& pool);

// All finite points in the order of ids, in columns, without cells: for exhaustive scans. `out` may hold others, whose
// memory is used again.
template <class T>
void put_in_order(const Rows<T>& rows, BuiltGrid<T>& out);

}  // namespace dfn::knn
