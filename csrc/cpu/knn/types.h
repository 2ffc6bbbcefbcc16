// What the builder hands to the search kernels. Plain data only: this header is included by files that are compiled
// for several instruction sets, so it must not define any function that a linker could take from the wrong one.
#pragma once

#include <cstdint>

namespace dfn::knn {

constexpr uint32_t kNoPoint = 0xFFFFFFFFu;  // the index of a neighbour that does not exist
constexpr int kMaxK = 1024;

// Which candidates a query may see.
enum class Mask : int {
  all,      // every one
  limit,    // id <= limit of the query, where limit = id or id - 1: causal search
  not_self  // id != the query's id
};

// Points in the order of an equi-depth grid: slabs along axis 0, strips inside each slab along axis 1, and every
// strip sorted by (sort axis, the other coordinates, id). Grid axes are dimensions of the data; unused levels have
// one cell with the bounds -inf, inf. Coordinates lie as columns: coords[dim * stride + place].
template <class T>
struct Grid {
  const T* coords;              // [D][stride]
  int64_t stride;
  const uint32_t* ids;          // [n]
  uint32_t n;
  int dims;                     // D
  int slab_axis, strip_axis, sort_axis;
  uint32_t slabs, strips;
  const uint32_t* slab_begin;   // [slabs + 1], first strip of each slab
  const uint32_t* strip_begin;  // [strips + 1], first place of each strip
  const T *slab_lo, *slab_hi;   // [slabs], the extent along slab_axis
  const T *strip_lo, *strip_hi; // [strips], the extent along strip_axis
};

// One search: all queries of `queries`, cell by cell, against `points`. Both have the same cells.
template <class T>
struct Search {
  const Grid<T>* points;
  const Grid<T>* queries;
  uint32_t first_query;  // queries with a lower id are skipped
  bool unfinished;       // so are queries whose k-th distance in the output is zero
  Mask mask;
  bool absolute;         // sums of absolute differences instead of squares; with Mask::all only
  bool self_allowed;     // for Mask::limit: limit = id, else id - 1
  T within;              // only points nearer than that count
  int k;                 // columns of the output
  int64_t first_id;      // added to the ids that are written
  int64_t* out_ids;      // [ids][k]
  T* out_dists;          // [ids][k]
};

// Memory of one worker, see Workspace in engine.cpp.
struct Scratch {
  void* best;            // [2][K][8] keys
  void* pending;         // [2][max(K, 8) + 8][8] distances
  uint32_t* pending_id;  // [2][max(K, 8) + 8]
  void* keys;            // [K][8] keys
  void* queries;         // [2][D][8] coordinates
  uint32_t* place_hint;  // [strips]
  uint32_t* strip_hint;  // [slabs]
};

// What one query has met in a search by products (products.h): the points that may be among its k nearest.
template <class T>
struct Candidates {
  T reach;             // a point with a lower bound above that cannot be; NaN: nothing more is wanted
  int64_t end;         // ids below that are visible,
  int64_t hidden;      // but for this one
  int count, room;
  T *lower, *upper;    // [room], bounds of the squared distance, less what depends on the query alone
  uint32_t* ids;       // [room], ascending
  void (*full)(Candidates&);  // called with count = room, makes room
};

// The functions that exist once per instruction set.
template <class T>
struct Kernels {
  // The queries [begin, end) of the search: through the cells, or each against every point (no cells needed; both
  // sides in ascending order of ids).
  void (*search)(const Search<T>&, uint32_t begin, uint32_t end, const Scratch&);
  void (*scan)(const Search<T>&, uint32_t begin, uint32_t end, const Scratch&);
};

struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

template <class T>
struct ProductKernels {
  int panel, tile;  // queries and points multiplied at once
  // packed[d][i] = rows[i][d] - centre[d] for i < count, 0 for the other rows of a panel or a tile; norms[i] = the sum
  // of the squares of those.
  void (*pack_queries)(const T* rows, int count, int dims, const T* centre, T* packed, double* norms);
  void (*pack_points)(const T* rows, int count, int dims, const T* centre, T* packed, double* norms);
  // Offers the points first, first + 1, .. of a tile, whose bounds are lower and upper less twice the product, to each
  // query of a panel.
  void (*compare)(int dims, const T* queries, const T* points, const T* lower, const T* upper, uint32_t first,
                  Candidates<T>* const* candidates, int count);
  // The distances of one query to some points, as they are defined.
  void (*measure)(const T* query, const T* points, int dims, const uint32_t* ids, int count, T* dists);
  // A number that k of x[0] .. x[count - 1], and few more, are not above.
  T (*enough)(const T* x, int count, int k);
};

struct ProductTable {
  ProductKernels<float> f32;
  ProductKernels<double> f64;
};

}  // namespace dfn::knn
