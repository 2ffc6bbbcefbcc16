#include "cpu/gaussian_gather.h"

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace dfn::DFN_ISA {
namespace {

// The neighbours of one query that exist, and their weights.
template <class A, class V>
struct Query {
  int64_t count;
  int64_t* index;   // [count] of the entities
  int64_t* slot;    // [count] the edge's place in its row of k
  const V** rows;   // [count] their values
  A* gauss;         // [count] exp(-|q - p|^2 / (2 sigma^2)), relative to the nearest if normalised, times `factor`
  A* weight;        // [count] gauss * influence: what the value is multiplied by
  A* sq_dist;       // [count]
  bool valid;       // every index was -1 or in range
};

template <class A, class V>
struct Workspace {
  Scratch<int64_t> index, slot;
  Scratch<const V*> rows;
  Scratch<A> gauss, weight, sq_dist, along;
  explicit Workspace(int64_t n) : index(n + 1), slot(n + 1), rows(n), gauss(n), weight(n), sq_dist(n), along(n) {}
};

template <class A, int kDims>
inline A squared_distance(const A* q, const A* p, int64_t D) {
  A total = 0;
  for (int64_t a = 0; a < (kDims ? kDims : D); ++a) {
    const A step = q[a] - p[a];
    total += step * step;
  }
  return total;
}

template <class A, int kDims>
inline void squared_distances(const GatherProblem& g, const A* q, int64_t count, const int64_t* index, A* out) {
  const A* positions = static_cast<const A*>(g.positions);
  const int64_t D = kDims ? kDims : g.D;
  for (int64_t s = 0; s < count; ++s) out[s] = squared_distance<A, kDims>(q, positions + index[s] * D, D);
}

template <class A, class V>
inline Query<A, V> look_up(const GatherProblem& g, int64_t i, Workspace<A, V>& w) {
  // Local copies of what the loops need: the compiler must assume that a store may change g.
  const int64_t k = g.k, N = g.N, stride = g.values_stride, *row = g.indices + i * k;
  const V* values = static_cast<const V*>(g.values);
  int64_t *index = w.index.data, *slot = w.slot.data, count = 0;
  bool valid = true;
  for (int64_t s = 0; s < k; ++s) {  // without a branch: what is written for a missing neighbour is overwritten
    const int64_t j = row[s];
    const bool inside = static_cast<uint64_t>(j) < static_cast<uint64_t>(N);
    index[count] = j;
    slot[count] = s;
    count += inside;
    valid &= inside | (j == -1);
  }
  const V** rows = w.rows.data;
  for (int64_t s = 0; s < count; ++s) rows[s] = values + index[s] * stride;
  const Query<A, V> query = {count, index, slot, rows, w.gauss.data, w.weight.data, w.sq_dist.data, valid};
  const A* q = static_cast<const A*>(g.queries) + i * g.D;
  switch (g.D) {
    case 1: squared_distances<A, 1>(g, q, query.count, query.index, query.sq_dist); break;
    case 2: squared_distances<A, 2>(g, q, query.count, query.index, query.sq_dist); break;
    case 3: squared_distances<A, 3>(g, q, query.count, query.index, query.sq_dist); break;
    default: squared_distances<A, 0>(g, q, query.count, query.index, query.sq_dist);
  }
  const A sigma = static_cast<A>(g.sigma), scale = A(-0.5) / (sigma * sigma);
  const A *influence = static_cast<const A*>(g.influence), *sq_dist = query.sq_dist;
  A *gauss = query.gauss, *weight = query.weight, shift = 0;
  if (g.normalize && count > 0) {
    A least = sq_dist[0];
    for (int64_t s = 1; s < count; ++s)
      if (sq_dist[s] < least) least = sq_dist[s];
    if (scale * least > -INFINITY) shift = scale * least;
  }
  for (int64_t s = 0; s < count; ++s) gauss[s] = scale * sq_dist[s] - shift;
  exp_nonpositive(gauss, count);
  for (int64_t s = 0; s < count; ++s) weight[s] = influence ? gauss[s] * influence[index[s]] : gauss[s];
  if (g.normalize) {
    A total = 0;
    for (int64_t s = 0; s < count; ++s) total += weight[s];
    const A factor = total != 0 ? 1 / total : 0;
    for (int64_t s = 0; s < count; ++s) {
      gauss[s] *= factor;
      weight[s] *= factor;
    }
  }
  return query;
}

// Served in spatial order, a query's indices and its output lie anywhere, and of its neighbours one or two are new.
// (GCC drops calls of a function that only prefetches: it must be inlined.)
template <class A, class V>
__attribute__((always_inline)) inline void fetch_ahead(const GatherProblem& g, const V* own, int64_t own_stride,
                                                       int64_t at, int64_t end) {
  constexpr int64_t kLine = 64, kFar = 12, kNear = 3;
  const auto query = [&g](int64_t t) { return g.query_order ? int64_t(g.query_order[t]) : t; };
  if (at + kFar < end && g.query_order) {
    const char* index = reinterpret_cast<const char*>(g.indices + query(at + kFar) * g.k);
    for (int64_t x = 0; x < g.k * 8; x += kLine) __builtin_prefetch(index + x);
    __builtin_prefetch(static_cast<const A*>(g.queries) + query(at + kFar) * g.D);
    const char* row = reinterpret_cast<const char*>(own + query(at + kFar) * own_stride);
    for (int64_t x = 0; x < g.c * int64_t(sizeof(V)); x += kLine) __builtin_prefetch(row + x);
  }
  if (at + kNear < end) {
    const int64_t i = query(at + kNear);
    const int64_t bytes = g.c * int64_t(sizeof(V)) < 2 * kLine ? g.c * int64_t(sizeof(V)) : 2 * kLine;
    for (int64_t s = 0; s < g.k; ++s) {
      const int64_t j = g.indices[i * g.k + s];
      if (static_cast<uint64_t>(j) >= static_cast<uint64_t>(g.N)) continue;
      const char* row = reinterpret_cast<const char*>(static_cast<const V*>(g.values) + j * g.values_stride);
      for (int64_t x = 0; x < bytes; x += kLine) __builtin_prefetch(row + x);
    }
  }
}

template <class A, class V>
bool forward(const GatherProblem& g, int64_t begin, int64_t end) {
  bool valid = true;
  Workspace<A, V> w(g.k);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = g.query_order ? g.query_order[at] : at;
    fetch_ahead<A, V>(g, static_cast<const V*>(g.out), g.out_stride, at, end);
    const Query<A, V> query = look_up<A, V>(g, i, w);
    valid &= query.valid;
    weighted_sum<A, V>(query.count, g.c, query.weight, query.rows, static_cast<V*>(g.out) + i * g.out_stride);
  }
  return valid;
}

template <class A, class V>
void backward_queries(const GatherProblem& g, int64_t begin, int64_t end) {
  Workspace<A, V> w(g.k);
  Edge<A>* edges = static_cast<Edge<A>*>(g.edges);
  const A sigma = static_cast<A>(g.sigma), precision = 1 / (sigma * sigma);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = g.query_order ? g.query_order[at] : at;
    fetch_ahead<A, V>(g, static_cast<const V*>(g.grad), g.grad_stride, at, end);
    const Query<A, V> query = look_up<A, V>(g, i, w);
    A* along = w.along.data;
    for (int64_t s = 0; s < query.count; ++s) along[s] = 0;
    if (g.slopes) {
      dots<A, V>(query.count, g.c, static_cast<const V*>(g.grad) + i * g.grad_stride, query.rows, along);
      if (g.normalize) {
        A mean = 0;  // <grad_i, y_i>: the part that normalisation takes away
        for (int64_t s = 0; s < query.count; ++s) mean += query.weight[s] * along[s];
        for (int64_t s = 0; s < query.count; ++s) along[s] -= mean;
      }
    }
    if (edges) {
      for (int64_t s = 0; s < query.count; ++s) {
        const int64_t e = at * g.k + query.slot[s];
        edges[g.slots ? int64_t(g.slots[e]) : g.slots64[e]] = {
            static_cast<uint32_t>(i), query.weight[s], query.weight[s] * along[s], query.gauss[s] * along[s]};
      }
    }
    if (g.grad_queries) {
      A* grad = static_cast<A*>(g.grad_queries) + i * g.D;
      const A* q = static_cast<const A*>(g.queries) + i * g.D;
      const A* positions = static_cast<const A*>(g.positions);
      for (int64_t a = 0; a < g.D; ++a) {
        A total = 0;
        for (int64_t s = 0; s < query.count; ++s)
          total -= query.weight[s] * along[s] * (q[a] - positions[query.index[s] * g.D + a]);
        grad[a] = total * precision;
      }
    }
    if (g.grad_sigma_rows) {
      A total = 0;
      for (int64_t s = 0; s < query.count; ++s) total += query.weight[s] * along[s] * query.sq_dist[s];
      static_cast<A*>(g.grad_sigma_rows)[i] = total * precision / sigma;
    }
  }
}

// What the edges [first, last) bring to the position and the influence of the entity at p.
template <class A, int kDims>
inline void add_slopes(const GatherProblem& g, const A* p, int64_t first, int64_t last, A* grad_p, A* grad_influence) {
  const Edge<A>* edges = static_cast<const Edge<A>*>(g.edges);
  const A* queries = static_cast<const A*>(g.queries);
  A total[kDims > 0 ? kDims : 1] = {}, influence = 0;
  for (int64_t e = first; e < last; ++e) {
    const A slope = edges[e].slope, *q = queries + edges[e].query * (kDims > 0 ? kDims : g.D);
    if constexpr (kDims > 0)
      for (int a = 0; a < kDims; ++a) total[a] += slope * (q[a] - p[a]);
    else
      for (int64_t a = 0; a < g.D; ++a) grad_p[a] += slope * (q[a] - p[a]);
    influence += edges[e].influence;
  }
  if constexpr (kDims > 0)
    for (int a = 0; a < kDims; ++a) grad_p[a] += total[a];
  *grad_influence += influence;
}
template <class A>
inline void add_slopes(const GatherProblem& g, const A* p, int64_t first, int64_t last, A* grad_p, A* grad_influence) {
  switch (g.D) {
    case 1: return add_slopes<A, 1>(g, p, first, last, grad_p, grad_influence);
    case 2: return add_slopes<A, 2>(g, p, first, last, grad_p, grad_influence);
    case 3: return add_slopes<A, 3>(g, p, first, last, grad_p, grad_influence);
    default: return add_slopes<A, 0>(g, p, first, last, grad_p, grad_influence);
  }
}

template <class A, class V>
struct List {
  Scratch<const V*> rows;
  Scratch<A> weight;
  explicit List(int64_t n) : rows(n), weight(n) {}

  void read(const GatherProblem& g, int64_t first, int64_t last) {
    const Edge<A>* edges = static_cast<const Edge<A>*>(g.edges);
    for (int64_t e = first; e < last; ++e) {
      rows[e - first] = static_cast<const V*>(g.grad) + edges[e].query * g.grad_stride;
      weight[e - first] = edges[e].weight;
    }
  }
};

template <class A>
inline void finish(const GatherProblem& g, int64_t j, const A* grad_p, A grad_influence) {
  const A sigma = static_cast<A>(g.sigma), precision = 1 / (sigma * sigma);
  if (g.grad_positions)
    for (int64_t a = 0; a < g.D; ++a) static_cast<A*>(g.grad_positions)[j * g.D + a] = grad_p[a] * precision;
  if (g.grad_influence) static_cast<A*>(g.grad_influence)[j] = grad_influence;
}

template <class A, class V>
void backward_entities(const GatherProblem& g, int64_t begin, int64_t end) {
  List<A, V> list(kHub);
  Scratch<A> grad_p(g.D);
  const Edge<A>* edges = static_cast<const Edge<A>*>(g.edges);
  for (int64_t at = begin; at < end; ++at) {
    if (at + 3 < end) {  // the rows that the next but two will read
      const int64_t from = g.starts[at + 2], to = g.starts[at + 3];
      for (int64_t e = from; e < to && e < from + 64; ++e) {
        const char* row = reinterpret_cast<const char*>(static_cast<const V*>(g.grad) + edges[e].query * g.grad_stride);
        const int64_t bytes = g.c * int64_t(sizeof(V));
        for (int64_t x = 0; x < bytes && x < 256; x += 64) __builtin_prefetch(row + x);
      }
    }
    const int64_t j = g.entity_order ? g.entity_order[at] : at;
    const int64_t first = g.starts[at], last = g.starts[at + 1];
    if (last - first > kHub) continue;
    if (g.grad_values) {
      list.read(g, first, last);
      weighted_sum<A, V>(last - first, g.c, list.weight.data, list.rows.data,
                         static_cast<V*>(g.grad_values) + j * g.grad_values_stride);
    }
    if (!g.slopes) continue;
    for (int64_t a = 0; a < g.D; ++a) grad_p[a] = 0;
    A grad_influence = 0;
    add_slopes<A>(g, static_cast<const A*>(g.positions) + j * g.D, first, last, grad_p.data, &grad_influence);
    finish<A>(g, j, grad_p.data, grad_influence);
  }
}

template <class A, class V>
void backward_piece(const GatherProblem& g, int64_t turn, int64_t piece, A* sums) {
  const int64_t j = g.entity_order ? g.entity_order[turn] : turn;
  const int64_t first = g.starts[turn] + piece * kHub;
  const int64_t last = first + kHub < g.starts[turn + 1] ? first + kHub : g.starts[turn + 1];
  for (int64_t x = 0; x < g.c + g.D + 1; ++x) sums[x] = 0;
  if (g.grad_values) {
    List<A, V> list(last - first);
    list.read(g, first, last);
    weighted_sum<A, V>(last - first, g.c, list.weight.data, list.rows.data, sums);
  }
  add_slopes<A>(g, static_cast<const A*>(g.positions) + j * g.D, first, last, sums + g.c, sums + g.c + g.D);
}

template <class A, class V>
void backward_hub(const GatherProblem& g, int64_t turn, int64_t pieces, const A* sums) {
  const int64_t j = g.entity_order ? g.entity_order[turn] : turn;
  const int64_t n = g.c + g.D + 1;
  Scratch<A> total(n);
  for (int64_t x = 0; x < n; ++x) total[x] = 0;
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t x = 0; x < n; ++x) total[x] += sums[piece * n + x];
  if (g.grad_values)
    for (int64_t x = 0; x < g.c; ++x)
      from_float(total[x], static_cast<V*>(g.grad_values) + j * g.grad_values_stride + x);
  finish<A>(g, j, total.data + g.c, total[g.c + g.D]);
}

template <class A, class V>
void any_piece(const GatherProblem& g, int64_t turn, int64_t piece, void* sums) {
  backward_piece<A, V>(g, turn, piece, static_cast<A*>(sums));
}
template <class A, class V>
void any_hub(const GatherProblem& g, int64_t turn, int64_t pieces, const void* sums) {
  backward_hub<A, V>(g, turn, pieces, static_cast<const A*>(sums));
}

}  // namespace

bool gather_forward(const GatherProblem& g, int64_t begin, int64_t end) {
  return DFN_BY_DTYPE(g, forward, begin, end);
}
void gather_backward_queries(const GatherProblem& g, int64_t begin, int64_t end) {
  DFN_BY_DTYPE(g, backward_queries, begin, end);
}
void gather_backward_entities(const GatherProblem& g, int64_t begin, int64_t end) {
  DFN_BY_DTYPE(g, backward_entities, begin, end);
}
void gather_backward_piece(const GatherProblem& g, int64_t turn, int64_t piece, void* sums) {
  DFN_BY_DTYPE(g, any_piece, turn, piece, sums);
}
void gather_backward_hub(const GatherProblem& g, int64_t turn, int64_t pieces, const void* sums) {
  DFN_BY_DTYPE(g, any_hub, turn, pieces, sums);
}

}  // namespace dfn::DFN_ISA
