// Where the grid is cut: quantiles of a sample. Where they fall decides the speed of a search, never its result.
#pragma once

#include <cstdint>
#include <vector>

namespace dfn::knn {

// Rows of the caller: n points of D coordinates, row-major. Rows with a NaN or an infinity are left out.
template <class T>
struct Rows {
  const T* data;
  int64_t n;
  int dims;
};

template <class T>
bool finite_row(const T* row, int dims) {
  T sum = 0;  // 0 * x is 0 for finite x, NaN otherwise
  for (int d = 0; d < dims; ++d) sum += row[d] * T(0);
  return sum == T(0);
}

// Splitters of the slabs, and of the strips of each slab.
template <class T>
struct Cuts {
  int slab_axis = 0, strip_axis = 0, sort_axis = 0;
  bool has_slabs = false, has_strips = false;
  std::vector<T> slabs;                // ascending; slab i holds [slabs[i-1], slabs[i])
  std::vector<std::vector<T>> strips;  // per slab, found by the builder
  int strips_per_slab = 1;
};

// Distinct cuts of a sample (which gets sorted) into `parts` of equal count; none at its minimum, so no cell is empty.
template <class T>
std::vector<T> quantiles(std::vector<T>& sample, int64_t parts);

// Chooses the axes and the number of cells so that a cell is about as wide as the ball of k neighbours is. An axis
// flatter than that ball is not cut.
template <class T>
Cuts<T> find_cuts(const Rows<T>& rows, int k);

// How many of all pairs have a distance that rounds to zero, from a sample; 0 without looking at pairs where no
// coordinate is small enough for that (copies of one position do not count then).
template <class T>
double share_of_zero_distances(const Rows<T>& rows);

}  // namespace dfn::knn
