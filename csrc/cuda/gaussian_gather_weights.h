// The weights of queries, by a warp that takes `queries` of them: its lanes, `width` for a query, make the weights of all
// their neighbours at once and leave them in shared memory, for the groups of lanes that read rows (gaussian_gather_rows.h).
#pragma once

#include "cuda/gaussian_gather_rows.h"

namespace dfn::gather {

constexpr int kMostShare = 4;  // neighbours that a lane looks up

// `more`: bytes of shared memory that a query wants beside its edges.
template <class V, int E, class More>
Shape shape_of(const Problem& g, More more) {
  Shape t = with_strides<V>(g);
  t.slots = power_of_two(g.k, E == 1 ? 4 * kMostShare : 4, kMostSlots);  // so `width` is 4 at least
  t.lanes = power_of_two((g.c + E - 1) / E, t.slots > 16 ? 8 : 4, 32);
  t.width = E == 1 ? t.slots / kMostShare : t.lanes < t.slots ? t.lanes : t.slots;
  t.queries = 32 / t.width;
  t.lane_bits = logarithm(t.lanes), t.width_bits = logarithm(t.width);
  t.stride = t.slots + 2;
  t.chunks = static_cast<int>((g.k + t.slots - 1) / t.slots);
  t.warp_bytes = (t.queries * (t.stride * int{sizeof(Edge<Real<V>>)} + more(t)) + 15) / 16 * 16;
  t.turns = turns_of(g.B * g.H * ((g.M - 1) / (kWarps * t.queries) + 1));
  const int64_t block = int64_t{kWarps} * t.queries * t.turns;
  t.blocks = static_cast<unsigned>((g.M + block - 1) / block);
  return t;
}

// A lane has S of the neighbours of a chunk: n0 + lane + i * width.
template <class A, int S>
struct Query {
  const Problem& g;
  const Shape& t;
  Edge<A>* edges;  // in shared memory, the lane's first
  int lane, width, k, D;
  const int32_t* order;     // of the list, or null
  const int64_t* indices;   // of the list
  const A* queries;         // of the batch and head, as what follows
  const A* positions;
  const A* known_sq_dists;  // or null
  const A* influences;      // or null
  A scale;         // 1 / (2 sigma^2)
  int m, next;     // this turn's, and the next one's; -1: none
  A at[kFewDims];  // its first coordinates
  A least, total;  // of normalised weights: the least squared distance, the sum of the weights
  int row[S];
  A away[S][kFewDims];  // from the neighbour to the query, where it is looked up
  A exponent[S];        // the weight is exp of it, but for the sign
  A influence[S];
  A weight[S];  // before influence

  __device__ Query(const Problem& g, const Shape& t, const Group& group, int lane, Edge<A>* edges)
      : g(g), t(t), edges(edges + lane), lane(lane), width(t.width), k(static_cast<int>(g.k)), D(static_cast<int>(g.D)), m(-1) {
    order = g.query_order ? g.query_order + group.list * g.M : nullptr;
    indices = g.indices + group.list * g.M * g.k;
    queries = as<const A>(g.queries) + group.number * g.M * g.D;
    positions = as<const A>(g.positions) + group.number * g.N * g.D;
    known_sq_dists = g.sq_dists ? as<const A>(g.sq_dists) + group.number * g.M * g.k : nullptr;
    influences = g.influence ? as<const A>(g.influence) + group.number * g.N : nullptr;
    const A sigma = width_of(as<const A>(g.sigma)[group.h]);
    scale = A(0.5) / (sigma * sigma);
  }

  __device__ int row_of_query() const { return m < 0 ? 0 : m; }
  __device__ const A* coordinates() const { return row_of(queries, row_of_query(), t.point_bytes); }
  __device__ const A* position(int i) const { return row_of(positions, row[i] < 0 ? 0 : row[i], t.point_bytes); }
  __device__ bool inside(int n) const { return m >= 0 && n < k; }

  // Of the `number`-th time that a warp takes queries; once more than M asks for nobody.
  __device__ int number_of(unsigned number) const {
    const unsigned turn = number * t.queries + (threadIdx.x % 32 >> t.width_bits);
    return turn >= static_cast<unsigned>(g.M) ? -1 : order ? order[turn] : static_cast<int>(turn);
  }
  __device__ void prepare(unsigned number) { next = number_of(number); }

  // Returns whether there is one for the warp. The next one's number is on its way meanwhile.
  __device__ bool take(unsigned number) {
    if (number * t.queries >= static_cast<unsigned>(g.M)) return false;
    m = next;
    next = number_of(number + kWarps);
    const A* from = coordinates();
#pragma unroll
    for (int a = 0; a < kFewDims; ++a) at[a] = a < D ? from[a] : A(0);
    least = 0, total = 1;
    return true;
  }

  // All that is read of the positions, before any of it is used.
  __device__ void look_at() {
    A p[S][kFewDims];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const A* from = position(i);
#pragma unroll
      for (int a = 0; a < kFewDims; ++a) p[i][a] = a < D ? from[a] : A(0);
    }
#pragma unroll
    for (int i = 0; i < S; ++i)
#pragma unroll
      for (int a = 0; a < kFewDims; ++a) away[i][a] = at[a] - p[i][a];
  }

  // Rows and squared distances of the neighbours from n0 on, as many as there are slots; one that overflows is too far to
  // be there. The least goes to `nearest`; returns whether all are there.
  __device__ bool look_up(int n0, A (&sq_dists)[S], A& nearest, bool needs_away = false) {
    const int64_t* mine = row_of(indices, row_of_query(), t.list_bytes) + n0 + lane;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const int64_t index = inside(n0 + lane + i * width) ? mine[i * width] : -1;
      row[i] = static_cast<uint64_t>(index) < static_cast<uint64_t>(g.N) ? static_cast<int>(index) : -1;
    }
    if (needs_away || !known_sq_dists) look_at();
    if (known_sq_dists) {
      const A* known = known_sq_dists + int64_t{row_of_query()} * k + n0 + lane;
#pragma unroll
      for (int i = 0; i < S; ++i) sq_dists[i] = row[i] < 0 ? A(INFINITY) : known[i * width];
    } else {
#pragma unroll
      for (int i = 0; i < S; ++i) {
        A sum = 0;
#pragma unroll
        for (int a = 0; a < kFewDims; ++a) sum = plus_square(sum, away[i][a]);
#pragma unroll 1
        for (int a = kFewDims; a < D; ++a) sum = plus_square(sum, coordinates()[a] - position(i)[a]);
        sq_dists[i] = sum;
      }
    }
    bool all = true;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      if (row[i] < 0 || sq_dists[i] == A(INFINITY)) row[i] = -1, sq_dists[i] = INFINITY;
      nearest = lesser(nearest, sq_dists[i]);
      all &= row[i] >= 0 || n0 + lane + i * width >= k;
    }
    return all;
  }

  __device__ void look_up_influence() {
#pragma unroll
    for (int i = 0; i < S; ++i) influence[i] = influences && row[i] >= 0 ? influences[row[i]] : A(1);
  }

  // From distances to weights. Returns the lane's sum, with influence.
  __device__ A weigh(const A (&sq_dists)[S]) {
    look_up_influence();
    A sum = 0;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const A x = (sq_dists[i] - least) * scale;
      exponent[i] = x > A(kFar) ? A(kFar) : x;
      weight[i] = exponential(-exponent[i]);
      if (row[i] < 0) weight[i] = 0;  // whatever sigma is
      sum += weight[i] * influence[i];
    }
    return sum;
  }

  __device__ void set_least(A nearest) {
    nearest = least_of(nearest, width);
    least = nearest == A(INFINITY) ? A(0) : nearest;
  }

  // For normalised weights of more neighbours than there are slots: least and total of all.
  __device__ void look_through() {
    A nearest = INFINITY, sum = 0, sq_dists[S];
    for (int chunk = 0; chunk < t.chunks; ++chunk) look_up(chunk * t.slots, sq_dists, nearest);
    set_least(nearest);
    for (int chunk = 0; chunk < t.chunks; ++chunk) {
      look_up(chunk * t.slots, sq_dists, nearest);
      sum += weigh(sq_dists);
    }
    total = sum_over(sum, width);
  }

  // Weights of a chunk of neighbours, for the whole warp to read, with influence or before it. Returns whether all
  // neighbours are there, in all queries of the warp.
  __device__ bool stage(int chunk, bool with_influence, bool needs_away = false) {
    A nearest = INFINITY, sq_dists[S];
    const bool all = look_up(chunk * t.slots, sq_dists, nearest, needs_away), alone = g.normalize && t.chunks == 1;
    if (alone) set_least(nearest);
    const A sum = weigh(sq_dists);
    if (alone) total = sum_over(sum, width);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S; ++i) edges[i * width] = {with_influence ? weight[i] * influence[i] : weight[i], row[i]};
    const bool complete = __ballot_sync(kAll, all) == kAll;
    __syncwarp();  // a vote orders no memory
    return complete;
  }

  // From shared memory, weights before influence: registers are few while rows are read.
  __device__ void recall() {
#pragma unroll
    for (int i = 0; i < S; ++i) row[i] = edges[i * width].row, weight[i] = edges[i * width].weight;
    look_up_influence();
  }

  __device__ A factor() const { return !g.normalize ? A(1) : total != 0 ? 1 / total : A(0); }
};

}  // namespace dfn::gather
