// What the gather needs to know about its neighbours besides their indices: an order in which to serve queries, and for
// every entity the edges that end in it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/problem.h"
#include "cpu/memory.h"

namespace dfn {

// Points that are near each other come near each other: cells of a grid along a Z-order curve. Any order is right; this
// one finds in the cache what its predecessors have read. Empty where it does not pay.
std::vector<int32_t> spatial_order(const void* points, Dtype dtype, int64_t n, int64_t D, int64_t bytes_per_row);

// Edge e = query * k + slot is number slots[e] of the list of all edges, sorted by the entity that they end in and then
// by e; entity j has the numbers [starts[j], starts[j + 1]). An index outside [0, N) has no number.
struct Incoming {
  Array<int64_t> starts;   // [N + 1]
  Array<uint32_t> slots;   // [edges]; null if there are 2^32 edges or more, then
  Array<int64_t> slots64;  // [edges]
};
Incoming incoming_edges(const int64_t* indices, int64_t edges, int64_t N);

}  // namespace dfn
