#include "cpu/route_density/route_density.h"

#include "cpu/common/product.h"

namespace dfn::DFN_ISA {
namespace {

constexpr int kTokens = 4;  // that share a loaded piece of the patterns

template <class A> struct Problem {
  const DensityProblem& g;
  int64_t width;  // I, rounded up to whole registers
  const A *x, *weights, *patterns, *threshold, *bias, *grad;

  explicit Problem(const DensityProblem& g)
      : g(g), width((g.I + kLanes<A> - 1) / kLanes<A> * kLanes<A>), x(static_cast<const A*>(g.x)),
        weights(static_cast<const A*>(g.weights)), patterns(static_cast<const A*>(g.patterns)),
        threshold(static_cast<const A*>(g.threshold)), bias(static_cast<const A*>(g.bias)),
        grad(static_cast<const A*>(g.grad)) {}

  void copy_row(const A* from, A* to) const {
    for (int64_t i = 0; i < width; ++i) to[i] = i < g.I ? from[i] : A(0);
  }
  // rows[p][0..width) = row o of pattern p
  void copy_patterns(int64_t o, A* rows) const {
    for (int64_t p = 0; p < g.P; ++p) copy_row(patterns + (p * g.O + o) * g.I, rows + p * width);
  }
};

template <class A> using Mask = decltype(Vec<A>{} < Vec<A>{});
template <class A> inline Vec<A> magnitude(Vec<A> v) { return v < Vec<A>{} ? -v : v; }

// Which of the lanes from i on are not kept; those beyond I never are, whatever infinite weights have made of them.
template <class A> inline Mask<A> dropped_of(const Problem<A>& k, Vec<A> mixed, A threshold, int64_t i) {
  Mask<A> drop = magnitude<A>(mixed) <= threshold;
  if (i + kLanes<A> > k.g.I)
    for (int64_t l = k.g.I - i; l < kLanes<A>; ++l) drop[l] = -1;
  return drop;
}

// Lanes i of the mixed row of `Count` tokens
template <int Count, class A>
inline void mix(const Problem<A>& k, const A* rows, const A* weights, int64_t i, Vec<A> (&mixed)[Count]) {
  for (int b = 0; b < Count; ++b) mixed[b] = Vec<A>{};
  for (int64_t p = 0; p < k.g.P; ++p) {
    const Vec<A> entry = load(rows + p * k.width + i);
    for (int b = 0; b < Count; ++b)
      mixed[b] = fused_multiply_add<A>(splat<A>(weights[b * k.g.P + p]), entry, mixed[b]);
  }
}

template <int Count, class A>
void forward_row(const Problem<A>& k, const A* rows, const A* x, int64_t t, int64_t o) {
  Vec<A> total[Count] = {};
  Mask<A> dropped[Count] = {};
  for (int64_t i = 0; i < k.width; i += kLanes<A>) {
    Vec<A> mixed[Count];
    mix<Count>(k, rows, k.weights + t * k.g.P, i, mixed);
    for (int b = 0; b < Count; ++b) {
      const Mask<A> drop = dropped_of<A>(k, mixed[b], k.threshold[t + b], i);
      dropped[b] += drop;
      total[b] = fused_multiply_add<A>(drop ? Vec<A>{} : mixed[b], load(x + b * k.width + i), total[b]);
    }
  }
  for (int b = 0; b < Count; ++b) {
    int64_t count = k.width;
    for (int l = 0; l < kLanes<A>; ++l) count += dropped[b][l];
    k.g.kept[t + b] += count;
    static_cast<A*>(k.g.out)[(t + b) * k.g.O + o] = sum<A>(total[b]) + (k.bias ? k.bias[o] : A(0));
  }
}

template <class A> void forward(const DensityProblem& g, int64_t begin, int64_t end) {
  const Problem<A> k(g);
  Scratch<A> rows(g.P * k.width), x((end - begin) * k.width);
  for (int64_t t = begin; t < end; ++t) {
    k.copy_row(k.x + t * g.I, x.data + (t - begin) * k.width);
    g.kept[t] = 0;
  }
  for (int64_t o = 0; o < g.O; ++o) {
    k.copy_patterns(o, rows.data);
    int64_t t = begin;
    for (; t + kTokens <= end; t += kTokens) forward_row<kTokens>(k, rows.data, x.data + (t - begin) * k.width, t, o);
    for (; t < end; ++t) forward_row<1>(k, rows.data, x.data + (t - begin) * k.width, t, o);
  }
}

template <class A> void backward_tokens(const DensityProblem& g, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Problem<A> k(g);
  const int64_t count = end - begin;
  Scratch<A> rows(g.P * k.width), x(count * k.width), grad_x(count * k.width), grad_weights(count * g.P * L);
  for (int64_t t = begin; t < end; ++t) k.copy_row(k.x + t * g.I, x.data + (t - begin) * k.width);
  for (int64_t i = 0; i < count * k.width; ++i) grad_x[i] = 0;
  for (int64_t i = 0; i < count * g.P * L; ++i) grad_weights[i] = 0;
  for (int64_t o = 0; o < g.O; ++o) {
    k.copy_patterns(o, rows.data);
    for (int64_t t = begin; t < end; ++t) {
      const A slope = k.grad[t * g.O + o], threshold = k.threshold[t];
      const A* x_row = x.data + (t - begin) * k.width;
      A* grad_x_row = grad_x.data + (t - begin) * k.width;
      A* lanes = grad_weights.data + (t - begin) * g.P * L;
      for (int64_t i = 0; i < k.width; i += L) {
        Vec<A> mixed[1];
        mix<1>(k, rows.data, k.weights + t * g.P, i, mixed);
        const Mask<A> drop = dropped_of<A>(k, mixed[0], threshold, i);
        store(load(grad_x_row + i) + slope * (drop ? Vec<A>{} : mixed[0]), grad_x_row + i);
        const Vec<A> outer = drop ? Vec<A>{} : slope * load(x_row + i);
        for (int64_t p = 0; p < g.P; ++p)
          store(fused_multiply_add<A>(outer, load(rows.data + p * k.width + i), load(lanes + p * L)), lanes + p * L);
      }
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t i = 0; i < g.I; ++i) static_cast<A*>(g.grad_x)[t * g.I + i] = grad_x[(t - begin) * k.width + i];
    for (int64_t p = 0; p < g.P; ++p)
      static_cast<A*>(g.grad_weights)[t * g.P + p] = sum<A>(load(grad_weights.data + ((t - begin) * g.P + p) * L));
  }
}

template <class A> void backward_patterns(const DensityProblem& g, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Problem<A> k(g);
  Scratch<A> rows(g.P * k.width), total(g.P * k.width), x(k.width);
  for (int64_t o = begin; o < end; ++o) {
    k.copy_patterns(o, rows.data);
    for (int64_t i = 0; i < g.P * k.width; ++i) total[i] = 0;
    for (int64_t t = 0; t < g.T; ++t) {
      const A slope = k.grad[t * g.O + o], threshold = k.threshold[t];
      const A* weights = k.weights + t * g.P;
      k.copy_row(k.x + t * g.I, x.data);
      for (int64_t i = 0; i < k.width; i += L) {
        Vec<A> mixed[1];
        mix<1>(k, rows.data, weights, i, mixed);
        const Mask<A> drop = dropped_of<A>(k, mixed[0], threshold, i);
        const Vec<A> outer = drop ? Vec<A>{} : slope * load(x.data + i);
        for (int64_t p = 0; p < g.P; ++p) {
          A* sums = total.data + p * k.width + i;
          store(fused_multiply_add<A>(splat<A>(weights[p]), outer, load(sums)), sums);
        }
      }
    }
    for (int64_t p = 0; p < g.P; ++p)
      for (int64_t i = 0; i < g.I; ++i)
        static_cast<A*>(g.grad_patterns)[(p * g.O + o) * g.I + i] = total[p * k.width + i];
  }
}

// Magnitudes are ordered like their bits, so the bits of the result are found one by one, from the highest: no sorting,
// no branches, and the count is a loop over registers.
template <class A, class Bits>
void magnitude(const A* mixed, int64_t S, int64_t keep, int64_t begin, int64_t end, A* out) {
  constexpr int kBits = 8 * sizeof(Bits) - 1;
  const A infinity = static_cast<A>(__builtin_inf());
  Bits limit;
  std::memcpy(&limit, &infinity, sizeof(A));
  Scratch<Bits> row(S);
  for (int64_t t = begin; t < end; ++t) {
    std::memcpy(row.data, mixed + t * S, S * sizeof(A));
    const Bits* bits = row.data;
    Bits most = 0;
    for (int64_t s = 0; s < S; ++s) {
      row[s] &= static_cast<Bits>(~(Bits(1) << kBits));
      most = row[s] > most ? row[s] : most;
    }
    if (most > limit) {
      out[t] = static_cast<A>(__builtin_nan(""));
      continue;
    }
    Bits found = 0;  // the largest value below which fewer than S - keep entries lie
    for (int b = kBits - 1; b >= 0; --b) {
      const Bits tried = found | Bits(1) << b;
      Bits below = 0;
      for (int64_t s = 0; s < S; ++s) below += bits[s] < tried;
      if (static_cast<int64_t>(below) < S - keep) found = tried;
    }
    std::memcpy(out + t, &found, sizeof(A));
  }
}

}  // namespace

void magnitude_above(Dtype dtype, const void* mixed, int64_t S, int64_t keep, int64_t begin, int64_t end, void* out) {
  if (dtype == Dtype::f64)
    magnitude<double, uint64_t>(static_cast<const double*>(mixed), S, keep, begin, end, static_cast<double*>(out));
  else
    magnitude<float, uint32_t>(static_cast<const float*>(mixed), S, keep, begin, end, static_cast<float*>(out));
}
void density_forward(const DensityProblem& g, int64_t begin, int64_t end) {
  g.dtype == Dtype::f64 ? forward<double>(g, begin, end) : forward<float>(g, begin, end);
}
void density_backward_tokens(const DensityProblem& g, int64_t begin, int64_t end) {
  g.dtype == Dtype::f64 ? backward_tokens<double>(g, begin, end) : backward_tokens<float>(g, begin, end);
}
void density_backward_patterns(const DensityProblem& g, int64_t begin, int64_t end) {
  g.dtype == Dtype::f64 ? backward_patterns<double>(g, begin, end) : backward_patterns<float>(g, begin, end);
}

}  // namespace dfn::DFN_ISA
