#include "cpu/gaussian_gather.h"

#include "cpu/simd.h"

namespace dfn::DFN_ISA {
namespace {

constexpr int kVectors = 4;  // channels are worked through in blocks of this many registers

struct Place {
  int64_t b, h, i;
};
Place place_of(int64_t flat, int64_t H, int64_t n) { return {flat / (H * n), flat / n % H, flat % n}; }

// block[...] += weight * row[...], for one block of channels held in registers
template <class A, class V>
inline void add_scaled(Vec<A> (&block)[kVectors], A weight, const V* row) {
  for (int v = 0; v < kVectors; ++v) block[v] += weight * load(row + v * kLanes<A>);
}

// out[0..c) = sum over edges of weight[e] * row(e)[0..c)
template <class A, class V, class RowOf>
inline void weighted_sum(int64_t edges, int64_t c, const A* weight, RowOf row_of, V* out) {
  constexpr int64_t kBlock = kVectors * kLanes<A>;
  int64_t x = 0;
  for (; x + kBlock <= c; x += kBlock) {
    Vec<A> block[kVectors] = {};
    for (int64_t e = 0; e < edges; ++e)
      if (const V* row = row_of(e)) add_scaled<A>(block, weight[e], row + x);
    for (int v = 0; v < kVectors; ++v) store(block[v], out + x + v * kLanes<A>);
  }
  for (; x + kLanes<A> <= c; x += kLanes<A>) {
    Vec<A> one = {};
    for (int64_t e = 0; e < edges; ++e)
      if (const V* row = row_of(e)) one += weight[e] * load(row + x);
    store(one, out + x);
  }
  for (; x < c; ++x) {
    A one = 0;
    for (int64_t e = 0; e < edges; ++e)
      if (const V* row = row_of(e)) one += weight[e] * to_float(row[x]);
    from_float(one, out + x);
  }
}

template <class A, class V>
inline A dot(int64_t c, const V* left, const V* right) {
  Vec<A> lanes = {};
  int64_t x = 0;
  for (; x + kLanes<A> <= c; x += kLanes<A>) lanes += load(left + x) * load(right + x);
  A total = sum<A>(lanes);
  for (; x < c; ++x) total += to_float(left[x]) * to_float(right[x]);
  return total;
}

// The weights of one query: gauss[s] = exp(-|q - p_j|^2 / (2 sigma^2)), relative to the nearest neighbour if the
// weights are to be normalised; returns 1 / their sum then, else 1 (0 where there is no weight at all).
template <class A>
struct Query {
  const A* positions;   // [N, D] of this batch and head
  const A* influence;   // [N] or null
  const A* q;           // [D]
  const int64_t* index; // [k]
  A sigma;

  bool inside(int64_t j, int64_t N) const { return static_cast<uint64_t>(j) < static_cast<uint64_t>(N); }

  A squared_distance(int64_t j, int64_t D) const {
    A total = 0;
    for (int64_t a = 0; a < D; ++a) {
      const A step = q[a] - positions[j * D + a];
      total += step * step;
    }
    return total;
  }

  A weights(const GatherProblem& g, A* gauss) const {
    const A scale = A(-0.5) / (sigma * sigma);
    A top = -INFINITY;
    for (int64_t s = 0; s < g.k; ++s) {
      const int64_t j = index[s];
      gauss[s] = inside(j, g.N) ? scale * squared_distance(j, g.D) : A(-INFINITY);
      if (gauss[s] > top) top = gauss[s];
    }
    if (g.normalize && top > -INFINITY)
      for (int64_t s = 0; s < g.k; ++s) gauss[s] -= top;
    exp_nonpositive(gauss, g.k);
    if (!g.normalize) return 1;
    A total = 0;
    for (int64_t s = 0; s < g.k; ++s)
      if (inside(index[s], g.N)) total += influence ? influence[index[s]] * gauss[s] : gauss[s];
    return total != 0 ? 1 / total : 0;
  }
};

template <class A>
Query<A> query_of(const GatherProblem& g, int64_t flat) {
  const Place at = place_of(flat, g.H, g.M);
  const int64_t group = at.b * g.H + at.h;
  return {static_cast<const A*>(g.positions) + group * g.N * g.D,
          g.influence ? static_cast<const A*>(g.influence) + group * g.N : nullptr,
          static_cast<const A*>(g.queries) + flat * g.D, g.indices + flat * g.k,
          static_cast<const A*>(g.sigma)[at.h]};
}

template <class A, class V>
bool forward(const GatherProblem& g, int64_t begin, int64_t end) {
  bool valid = true;
  Scratch<A> weight(g.k);
  for (int64_t flat = begin; flat < end; ++flat) {
    const Place at = place_of(flat, g.H, g.M);
    const Query<A> query = query_of<A>(g, flat);
    const A factor = query.weights(g, weight.data);
    for (int64_t s = 0; s < g.k; ++s) {
      const int64_t j = query.index[s];
      if (!query.inside(j, g.N)) {
        valid &= j == -1;
        weight[s] = 0;
      } else {
        weight[s] *= query.influence ? factor * query.influence[j] : factor;
      }
    }
    weighted_sum<A, V>(
        g.k, g.c, weight.data,
        [&](int64_t s) -> const V* {
          return query.inside(query.index[s], g.N) ? g.values.row<V>(at.b, at.h, query.index[s]) : nullptr;
        },
        g.out.row<V>(at.b, at.h, at.i));
  }
  return valid;
}

template <class A, class V>
void backward_queries(const GatherProblem& g, int64_t begin, int64_t end) {
  Scratch<A> gauss(g.k), along(g.k);
  for (int64_t flat = begin; flat < end; ++flat) {
    const Place at = place_of(flat, g.H, g.M);
    const Query<A> query = query_of<A>(g, flat);
    const A factor = query.weights(g, gauss.data);
    const V* grad = g.grad.row<V>(at.b, at.h, at.i);
    A* edge_weight = static_cast<A*>(g.edge_weight) + flat * g.k;
    A* edge_slope = static_cast<A*>(g.edge_slope) + flat * g.k;
    A* edge_influence = g.edge_influence ? static_cast<A*>(g.edge_influence) + flat * g.k : nullptr;
    A* grad_query = static_cast<A*>(g.grad_queries) + flat * g.D;

    A mean = 0;  // <grad_i, y_i>: the part that normalisation takes away
    for (int64_t s = 0; s < g.k; ++s) {
      const int64_t j = query.index[s];
      edge_weight[s] = along[s] = 0;
      if (!query.inside(j, g.N)) continue;
      edge_weight[s] = gauss[s] * factor * (query.influence ? query.influence[j] : A(1));
      along[s] = dot<A>(g.c, grad, g.values.row<V>(at.b, at.h, j));
      if (g.normalize) mean += edge_weight[s] * along[s];
    }
    for (int64_t a = 0; a < g.D; ++a) grad_query[a] = 0;
    A grad_sigma = 0;
    const A precision = 1 / (query.sigma * query.sigma);
    for (int64_t s = 0; s < g.k; ++s) {
      const int64_t j = query.index[s];
      edge_slope[s] = 0;
      if (edge_influence) edge_influence[s] = 0;
      if (!query.inside(j, g.N)) continue;
      const A slope = edge_weight[s] * (along[s] - mean);
      edge_slope[s] = slope;
      if (edge_influence) edge_influence[s] = gauss[s] * factor * (along[s] - mean);
      for (int64_t a = 0; a < g.D; ++a)
        grad_query[a] -= slope * precision * (query.q[a] - query.positions[j * g.D + a]);
      grad_sigma += slope * query.squared_distance(j, g.D);
    }
    static_cast<A*>(g.grad_sigma_rows)[flat] = grad_sigma * precision / query.sigma;
  }
}

template <class A, class V>
void backward_entities(const GatherProblem& g, int64_t begin, int64_t end) {
  for (int64_t flat = begin; flat < end; ++flat) {
    const Place at = place_of(flat, g.H, g.N);
    const int64_t group = at.b * g.H + at.h;
    const int64_t* starts = g.edge_starts + group * (g.N + 1) + at.i;
    const int64_t count = starts[1] - starts[0];
    const int64_t* edge = g.edges + group * g.M * g.k + starts[0];
    const A* weight = static_cast<const A*>(g.edge_weight) + group * g.M * g.k;
    const A* slope = static_cast<const A*>(g.edge_slope) + group * g.M * g.k;
    const A* queries = static_cast<const A*>(g.queries) + group * g.M * g.D;
    const A* p = static_cast<const A*>(g.positions) + flat * g.D;
    A* grad_p = static_cast<A*>(g.grad_positions) + flat * g.D;

    Scratch<A> own(count);
    for (int64_t e = 0; e < count; ++e) own[e] = weight[edge[e]];
    weighted_sum<A, V>(
        count, g.c, own.data, [&](int64_t e) -> const V* { return g.grad.row<V>(at.b, at.h, edge[e] / g.k); },
        g.grad_values.row<V>(at.b, at.h, at.i));

    const A sigma = static_cast<const A*>(g.sigma)[at.h];
    const A precision = 1 / (sigma * sigma);
    for (int64_t a = 0; a < g.D; ++a) {
      A total = 0;
      for (int64_t e = 0; e < count; ++e) total += slope[edge[e]] * (queries[edge[e] / g.k * g.D + a] - p[a]);
      grad_p[a] = total * precision;
    }
    if (g.grad_influence) {
      const A* through = static_cast<const A*>(g.edge_influence) + group * g.M * g.k;
      A total = 0;
      for (int64_t e = 0; e < count; ++e) total += through[edge[e]];
      static_cast<A*>(g.grad_influence)[flat] = total;
    }
  }
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

}  // namespace dfn::DFN_ISA
