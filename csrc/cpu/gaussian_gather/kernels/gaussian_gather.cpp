#include "cpu/gaussian_gather/gaussian_gather.h"

#include "cpu/gaussian_gather/gather_batch.h"
#include "cpu/common/rows.h"
#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

// Served in spatial order, a query's indices and its output lie anywhere, and of its neighbours one or two are new.
// (GCC drops calls of a function that only prefetches: it must be inlined.)
template <class A, class V>
__attribute__((always_inline)) inline void fetch_ahead(const GatherProblem& g, const V* own, int64_t own_stride,
                                                       int64_t at, int64_t end) {
  constexpr int64_t kLine = 64, kNear = Batch<A, V>::kQueries, kFar = kNear + 9;  // the rows of the next batch
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
    const int64_t bytes = g.c * int64_t(sizeof(V)) < 4 * kLine ? g.c * int64_t(sizeof(V)) : 4 * kLine;
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
  Batch<A, V> batch(g);
  for (int64_t at = begin; at < end; at += batch.kQueries) {
    const int n = static_cast<int>(end - at < batch.kQueries ? end - at : batch.kQueries);
    batch.look_up(at, n);
    for (int b = 0; b < n; ++b) {
      fetch_ahead<A, V>(g, static_cast<const V*>(g.out), g.out_stride, at + b, end);
      const Query<A, V>& q = batch.query[b];
      weighted_sum<A, V>(q.count, g.c, q.weight, q.rows, static_cast<V*>(g.out) + q.i * g.out_stride);
    }
  }
  return batch.valid;
}

template <class A, class V>
void backward_query(const GatherProblem& g, const Query<A, V>& query, int64_t turn, A* along) {
  const A width = width_of<A>(g), precision = 1 / (width * width);
  const int64_t i = query.i, count = query.count;
  if (g.slopes) {
    dots<A, V>(count, g.c, static_cast<const V*>(g.grad) + i * g.grad_stride, query.rows, along);
    if (g.normalize) {
      A mean = 0;  // <grad_i, y_i>: the part that normalisation takes away
      for (int64_t s = 0; s < count; ++s) mean += query.weight[s] * along[s];
      for (int64_t s = 0; s < count; ++s) along[s] -= mean;
    }
  } else {
    for (int64_t s = 0; s < count; ++s) along[s] = 0;
  }
  if (Edge<A>* edges = static_cast<Edge<A>*>(g.edges)) {
    const uint64_t all = static_cast<uint64_t>(g.M * g.k);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t e = turn * g.k + query.slot[s];
      const uint64_t number = g.slots ? g.slots[e] : static_cast<uint64_t>(g.slots64[e]);
      if (number < all)  // a list of other indices, as a caller can hand it over, must not do harm
        edges[number] = {static_cast<uint32_t>(i), query.weight[s], query.weight[s] * along[s], query.gauss[s] * along[s]};
    }
  }
  for (int64_t s = 0; s < count; ++s) along[s] *= query.weight[s];  // from here on the slopes
  if (g.grad_queries) {
    A* grad = static_cast<A*>(g.grad_queries) + i * g.D;
    const A* q = static_cast<const A*>(g.queries) + i * g.D;
    const A* positions = static_cast<const A*>(g.positions);
    for (int64_t a = 0; a < g.D; ++a) {
      A total = 0;
      for (int64_t s = 0; s < count; ++s)
        if (along[s] != 0)  // one too far may be infinitely so
          total -= along[s] * (q[a] - positions[query.index[s] * g.D + a]);
      grad[a] = total * precision;
    }
  }
  if (g.grad_sigma_rows) {
    A total = 0;
    for (int64_t s = 0; s < count; ++s) total += along[s] * query.exponent[s];
    static_cast<A*>(g.grad_sigma_rows)[i] = 2 * total / width;
  }
}

template <class A, class V>
void backward_queries(const GatherProblem& g, int64_t begin, int64_t end) {
  Batch<A, V> batch(g);
  Scratch<A> along(g.k);
  for (int64_t at = begin; at < end; at += batch.kQueries) {
    const int n = static_cast<int>(end - at < batch.kQueries ? end - at : batch.kQueries);
    batch.look_up(at, n);
    for (int b = 0; b < n; ++b) {
      fetch_ahead<A, V>(g, static_cast<const V*>(g.grad), g.grad_stride, at + b, end);
      backward_query<A, V>(g, batch.query[b], at + b, along.data);
    }
  }
}

// A list of other indices leaves edges unwritten: whatever they hold must not lead out of memory.
template <class A>
inline int64_t query_of(const GatherProblem& g, const Edge<A>& edge) {
  const int64_t query = edge.query;
  return query < g.M ? query : g.M - 1;
}

// What the edges [first, last) bring to the position and the influence of the entity at p.
template <class A, int kDims>
inline void add_slopes(const GatherProblem& g, const A* p, int64_t first, int64_t last, A* grad_p, A* grad_influence) {
  const Edge<A>* edges = static_cast<const Edge<A>*>(g.edges);
  const A* queries = static_cast<const A*>(g.queries);
  A total[kDims > 0 ? kDims : 1] = {};
  double influence = 0;  // thousands of edges of a hub, one after the other, and nothing that shrinks with distance
  for (int64_t e = first; e < last; ++e) {
    const A slope = edges[e].slope, *q = queries + query_of(g, edges[e]) * (kDims > 0 ? kDims : g.D);
    influence += edges[e].influence;
    if (slope == 0) continue;  // one too far may be infinitely so
    if constexpr (kDims > 0)
      for (int a = 0; a < kDims; ++a) total[a] += slope * (q[a] - p[a]);
    else
      for (int64_t a = 0; a < g.D; ++a) grad_p[a] += slope * (q[a] - p[a]);
  }
  if constexpr (kDims > 0)
    for (int a = 0; a < kDims; ++a) grad_p[a] += total[a];
  *grad_influence += static_cast<A>(influence);
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
      rows[e - first] = static_cast<const V*>(g.grad) + query_of(g, edges[e]) * g.grad_stride;
      weight[e - first] = edges[e].weight;
    }
  }
};

template <class A>
inline void finish(const GatherProblem& g, int64_t j, const A* grad_p, A grad_influence) {
  const A width = width_of<A>(g), precision = 1 / (width * width);
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
        const char* row = reinterpret_cast<const char*>(static_cast<const V*>(g.grad) + query_of(g, edges[e]) * g.grad_stride);
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
