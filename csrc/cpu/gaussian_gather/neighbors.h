// What the gather needs to know about its neighbours besides their indices: an order in which to serve queries, and for
// every entity the edges that end in it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/problem.h"
#include "cpu/common/memory.h"

namespace dfn {

// Points that are near each other come near each other: cells of a grid along a Z-order curve. Any order is right; this
// one finds in the cache what its predecessors have read. Empty where it does not pay.
std::vector<int32_t> spatial_order(const void* points, Dtype dtype, int64_t n, int64_t D, int64_t bytes_per_row);

// The edges of all queries, sorted by the entity that they end in and then by the turn of their query: the edge in slot s
// of the query whose turn is t has the number slots[t * k + s]. The entity whose turn is u owns the numbers
// [starts[u], starts[u + 1]). An index outside [0, N) has no number. Turns are places in an order; null: as they come.
struct Incoming {
  Array<int64_t> starts;   // [N + 1]
  Array<uint32_t> slots;   // [M * k]; null if there are 2^32 edges or more, then
  Array<int64_t> slots64;  // [M * k]
};
Incoming incoming_edges(const int64_t* indices, int64_t M, int64_t k, int64_t N, const int32_t* query_order,
                        const int32_t* entity_order);

}  // namespace dfn
