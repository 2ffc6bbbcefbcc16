// Exhaustive search of points with many dimensions: a matrix product says which pairs may matter, and only those are
// measured. What it may leave out, and why, is in docs/search.md, Many dimensions.
#pragma once

#include <vector>

#include "cpu/common/memory.h"
#include "cpu/knn/cuts.h"
#include "cpu/knn/parallel.h"
#include "cpu/knn/request.h"
#include "cpu/knn/types.h"

namespace dfn::knn {

// Points less a common centre, in tiles for the product, and what of the bounds depends on the point alone.
template <class T>
struct PackedPoints {
  Array<T> centre;        // [D]
  Array<T> tiles;         // [tiles][D][tile]
  Array<T> lower, upper;  // [tiles][tile]
};

template <class T>
PackedPoints<T> pack_points(const Rows<T>& rows, const Pool& pool);

// Is that faster than comparing every pair?
template <class T>
bool worth_products(const Request<T>& request);
bool worth_packing(int64_t n, int dims, int k);

// Answers the finite queries of the request but those it returns, ascending: for them nearly every point may matter.
template <class T>
std::vector<uint32_t> search_products(const Request<T>& request, const PackedPoints<T>& points, const Pool& pool);

}  // namespace dfn::knn
