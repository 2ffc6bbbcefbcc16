#pragma once

#include <cstdint>
#include <limits>

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

}  // namespace dfn::knn
