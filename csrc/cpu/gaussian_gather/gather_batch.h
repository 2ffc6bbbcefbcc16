// The neighbours of a few queries and their weights, the first half of whatever the gather does with a query. A few at
// a time: what one query needs is a chain of steps that wait for each other, and several chains run side by side.
#pragma once

#include "cpu/gaussian_gather/gaussian_gather.h"
#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {

// The neighbours of one query that exist.
template <class A, class V>
struct Query {
  int64_t i, count;
  const int64_t* index;   // [count] of the entities
  const int64_t* slot;    // [count] the edge's place in its row of k
  const V* const* rows;   // [count] their values
  const A* gauss;         // [count] exp(-|q - p|^2 / (2 sigma^2)), relative to the nearest if normalised, times `factor`
  const A* weight;        // [count] gauss * influence: what the value is multiplied by
  const A* exponent;      // [count] |q - p|^2 / (2 sigma^2), less that of the nearest if normalised, at most kFar
};

constexpr float kFar = 1e4f;  // exp(-kFar) is 0

// sigma within WIDTHS of reference/gaussian_gather.py
template <class A>
inline A width_of(const GatherProblem& g) {
  constexpr A low = sizeof(A) == 8 ? A(0x1p-496) : A(0x1p-56), high = sizeof(A) == 8 ? A(0x1p511) : A(0x1p63);
  const A sigma = static_cast<A>(g.sigma), size = sigma < 0 ? -sigma : sigma;
  const A width = size < low ? low : size > high ? high : size;
  return sigma < 0 ? -width : width;
}

template <class A, int kDims>
inline void squared_distances(const A* positions, int64_t D, const A* q, int64_t count, const int64_t* index, A* out) {
  if constexpr (kDims > 0) {
    A own[kDims];  // the compiler must assume that a store to `out` may change q
    for (int a = 0; a < kDims; ++a) own[a] = q[a];
    for (int64_t s = 0; s < count; ++s) {
      const A* p = positions + index[s] * kDims;
      A total = 0;
      for (int a = 0; a < kDims; ++a) total += (own[a] - p[a]) * (own[a] - p[a]);
      out[s] = total;
    }
  } else {
    for (int64_t s = 0; s < count; ++s) {
      const A* p = positions + index[s] * D;
      A total = 0;
      for (int64_t a = 0; a < D; ++a) total += (q[a] - p[a]) * (q[a] - p[a]);
      out[s] = total;
    }
  }
}

template <class A, class V>
class Batch {
 public:
  static constexpr int kQueries = 4;
  Query<A, V> query[kQueries];
  bool valid = true;  // every index so far was -1 or in range

  explicit Batch(const GatherProblem& g)
      : g_(g), k_(g.k), index_(kQueries * (g.k + 1)), slot_(kQueries * (g.k + 1)), every_slot_(g.k), rows_(kQueries * g.k),
        exponent_(kQueries * g.k), gauss_(kQueries * g.k), weight_(kQueries * g.k) {
    for (int64_t s = 0; s < k_; ++s) every_slot_[s] = s;
  }

  // Queries number [begin, begin + n) of the order, n <= kQueries
  void look_up(int64_t begin, int n) {
    for (int b = 0; b < n; ++b) {
      const int64_t i = g_.query_order ? g_.query_order[begin + b] : begin + b;
      find_neighbors(b, i);
      find_distances(b, i);
    }
    const A width = width_of<A>(g_), scale = A(0.5) / (width * width);
    for (int b = 0; b < n; ++b) {
      A *exponent = exponent_.data + b * k_, *gauss = gauss_.data + b * k_, least = 0;
      if (g_.normalize && query[b].count > 0) {
        least = exponent[0];
        for (int64_t s = 1; s < query[b].count; ++s)
          if (exponent[s] < least) least = exponent[s];
        if (least == INFINITY) least = 0;
      }
      for (int64_t s = 0; s < k_; ++s) {
        const A x = (exponent[s] - least) * scale;
        exponent[s] = x > A(kFar) ? A(kFar) : x;
        gauss[s] = -exponent[s];
      }
    }
    exp_nonpositive(gauss_.data, n * k_);
    for (int b = 0; b < n && (g_.influence || g_.normalize); ++b) weigh(b);
  }

 private:
  void find_neighbors(int b, int64_t i) {
    // Local copies of what the loops need: the compiler must assume that a store may change g.
    const int64_t k = k_, N = g_.N, stride = g_.values_stride, *row = g_.indices + i * k;
    const V* values = static_cast<const V*>(g_.values);
    const V** rows = rows_.data + b * k;
    bool all = true;
    for (int64_t s = 0; s < k; ++s) {
      const bool inside = static_cast<uint64_t>(row[s]) < static_cast<uint64_t>(N);
      all &= inside;
      rows[s] = values + (inside ? row[s] : 0) * stride;
    }
    A *gauss = gauss_.data + b * k, *weight = g_.influence ? weight_.data + b * k : gauss;
    query[b] = {i, k, row, every_slot_.data, rows, gauss, weight, exponent_.data + b * k};
    if (all) return;
    int64_t *index = index_.data + b * (k + 1), *slot = slot_.data + b * (k + 1), count = 0;
    bool right = true;
    for (int64_t s = 0; s < k; ++s) {
      const bool inside = static_cast<uint64_t>(row[s]) < static_cast<uint64_t>(N);
      index[count] = row[s];
      slot[count] = s;
      count += inside;
      right &= inside | (row[s] == -1);
    }
    valid &= right;
    for (int64_t s = 0; s < count; ++s) rows[s] = values + index[s] * stride;
    query[b].count = count;
    query[b].index = index;
    query[b].slot = slot;
  }

  void find_distances(int b, int64_t i) {
    const int64_t count = query[b].count, *index = query[b].index;
    A* out = exponent_.data + b * k_;  // squared distances so far
    const A *positions = static_cast<const A*>(g_.positions), *q = static_cast<const A*>(g_.queries) + i * g_.D;
    if (g_.sq_dists) {
      const A* known = static_cast<const A*>(g_.sq_dists) + i * k_;
      for (int64_t s = 0; s < count; ++s) out[s] = known[query[b].slot[s]];
    } else {
      switch (g_.D) {
        case 1: squared_distances<A, 1>(positions, 1, q, count, index, out); break;
        case 2: squared_distances<A, 2>(positions, 2, q, count, index, out); break;
        case 3: squared_distances<A, 3>(positions, 3, q, count, index, out); break;
        default: squared_distances<A, 0>(positions, g_.D, q, count, index, out);
      }
    }
    for (int64_t s = count; s < k_; ++s) out[s] = INFINITY;
  }

  // Influence, and the division by the sum of the weights
  void weigh(int b) {
    const int64_t count = query[b].count, *index = query[b].index;
    const A* influence = static_cast<const A*>(g_.influence);
    A *gauss = gauss_.data + b * k_, *weight = influence ? weight_.data + b * k_ : gauss;
    if (influence)
      for (int64_t s = 0; s < count; ++s) weight[s] = gauss[s] * influence[index[s]];
    if (!g_.normalize) return;
    A total = 0;
    for (int64_t s = 0; s < count; ++s) total += weight[s];
    const A factor = total != 0 ? 1 / total : 0;
    for (int64_t s = 0; s < count; ++s) gauss[s] *= factor;
    if (influence)
      for (int64_t s = 0; s < count; ++s) weight[s] *= factor;
  }

  const GatherProblem& g_;
  const int64_t k_;
  Scratch<int64_t> index_, slot_, every_slot_;
  Scratch<const V*> rows_;
  Scratch<A> exponent_, gauss_, weight_;
};

}  // namespace dfn::DFN_ISA
