// Exact k nearest neighbours on the CPU: which points are compared is decided here, how is decided in kernels.inl.
//
// The order of neighbours is (distance, id) ascending; distances are sums of squared differences in the order of
// dimensions, rounded after every operation. A pair counts as missing (id -1, distance inf) if one of its points is not
// finite or its distance overflows.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cpu/knn/grid.h"
#include "cpu/knn/parallel.h"
#include "cpu/knn/products.h"
#include "cpu/knn/request.h"

namespace dfn::knn {

// Does anything but comparing every pair pay, for a search or for many of the same points?
template <class T>
bool worth_more(const Request<T>& request);
bool worth_preparing(int64_t n, int dims);

// What serves points that will be searched again and again: packed for products, where they have many dimensions, or
// grids: that of all points is built at once, those of the prefixes on the first causal search. The rows must stay where
// and what they are. Safe from several threads.
template <class T>
class Prepared {
 public:
  Prepared(const Rows<T>& rows, const Pool& pool);

  int64_t size() const { return rows_.n; }
  const PackedPoints<T>& packed() const { return packed_; }
  double zero_share() const { return zero_share_; }
  // Of the first n / 2^level points.
  const BuiltGrid<T>& prefix(size_t level, const Pool& pool);

 private:
  Rows<T> rows_;
  PackedPoints<T> packed_;
  double zero_share_ = 0;
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
