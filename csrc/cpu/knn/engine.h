// Exact k nearest neighbours on the CPU: which points are compared is decided here, how is decided in kernels.inl.
//
// The order of neighbours is (distance, id) ascending; distances are sums of squared differences in the order of
// dimensions, rounded after every operation. A pair counts as missing (id -1, distance inf) if one of its points is not
// finite or its distance overflows.
#pragma once

#include "cpu/knn/grid.h"
#include "cpu/knn/parallel.h"
#include "cpu/knn/types.h"

namespace dfn::knn {

// What to find, and where to put it.
template <class T>
struct Request {
  const T* points;      // [n][dims]
  int64_t n;
  const T* queries;     // [m][dims]; null: the points
  int64_t m;
  int dims;
  int k;
  bool causal = false;  // only points with id <= the query's
  bool include_self = true;
  const T* bound = nullptr;  // [m]: the k-th distance is known to be at most this
  int64_t* ids;         // [m][k]
  T* dists;             // [m][k]
};

template <class T>
void search(const Request<T>& request, const Pool& pool);

// Can a grid of n such points, built with self = false, serve searches that are not causal?
bool worth_a_grid(int64_t n, int dims);

// The same search with a grid of the points that was built before; not causal.
template <class T>
void search(const Request<T>& request, const BuiltGrid<T>& grid, const Pool& pool);

}  // namespace dfn::knn
