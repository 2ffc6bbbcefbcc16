// Exact k nearest neighbours on the CPU: which points are compared is decided here, how is decided in kernels.inl.
//
// The order of neighbours is (distance, id) ascending; distances are sums of squared differences in the order of
// dimensions, rounded after every operation. A pair counts as missing (id -1, distance inf) if one of its points is not
// finite or its distance overflows.
#pragma once

#include <limits>
#include <memory>
#include <mutex>
#include <vector>

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
  bool absolute = false;  // by sums of absolute differences; neither causal nor without self
  T within = std::numeric_limits<T>::infinity();  // only points nearer than that count
  int64_t first_id = 0;   // of the points, in the output
  int64_t* ids;         // [m][k]
  T* dists;             // [m][k]
};

// Do n such points pay for a grid at all?
bool worth_a_grid(int64_t n, int dims);

// The grids of points that will be searched again and again: that of all points is built at once, those of the prefixes
// on the first causal search. The rows must stay where and what they are. Safe from several threads.
template <class T>
class Prepared {
 public:
  Prepared(const Rows<T>& rows, const Pool& pool);

  int64_t size() const { return rows_.n; }
  double zero_share() const { return zero_share_; }
  // Of the first n / 2^level points.
  const BuiltGrid<T>& prefix(size_t level, const Pool& pool);

 private:
  Rows<T> rows_;
  double zero_share_;
  BuiltGrid<T> all_;
  std::mutex mutex_;
  std::vector<BuiltGrid<T>> halves_;  // of n/2, n/4, ... points; filled once, all of them
};

// `made`: null, or the prepared points of the request; the result is the same.
template <class T>
void search(const Request<T>& request, Prepared<T>* made, const Pool& pool);

// Searches of few points, one after another on one thread, in memory that lasts from one to the next: what a search of
// eight points costs is mostly its memory.
template <class T>
class SmallSearches {
 public:
  SmallSearches(int dims, int k);
  ~SmallSearches();
  void search(const Request<T>& request);

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

}  // namespace dfn::knn
