#include "cpu/short_convolution/short_convolution.h"

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

// How many of the W entities up to entity n of its sequence there are.
int64_t reach(const ConvolutionProblem& g, int64_t n) {
  int64_t before = n;
  if (g.place != nullptr && g.place[n] < before) before = g.place[n];
  return before + 1 < g.W ? before + 1 : g.W;
}

// out = sum_{t < taps} c_t * row_t, where the rows lie `step` elements apart: backwards for the sum itself, forwards
// for its gradient.
template <class A, class V>
void weighted_sum(const ConvolutionProblem& g, const V* row, int64_t step, int64_t taps, V* out) {
  const A* const weight = static_cast<const A*>(g.weight);
  int64_t c = 0;
  for (; c + kLanes<A> <= g.d; c += kLanes<A>) {
    Vec<A> total = {};
    for (int64_t t = 0; t < taps; ++t)
      total = multiply_add(load(weight + t * g.d + c), load(row + t * step + c), total);
    store(total, out + c);
  }
  for (; c < g.d; ++c) {
    A total = 0;
    for (int64_t t = 0; t < taps; ++t) total += weight[t * g.d + c] * A(to_float(row[t * step + c]));
    from_float(total, out + c);
  }
}

template <class A, class V>
void forward(const ConvolutionProblem& g, int64_t begin, int64_t end) {
  for (int64_t entity = begin; entity < end; ++entity) {
    const int64_t b = entity / g.N, n = entity % g.N;
    weighted_sum<A>(g, g.x.row<const V>(b, 0, n), -g.x.sN, reach(g, n), g.out.row<V>(b, 0, n));
  }
}

template <class A, class V>
void backward(const ConvolutionProblem& g, int64_t begin, int64_t end, void* sums) {
  A* const by_weight = static_cast<A*>(sums);
  for (int64_t i = 0; i < g.W * g.d; ++i) by_weight[i] = 0;
  for (int64_t entity = begin; entity < end; ++entity) {
    const int64_t b = entity / g.N, n = entity % g.N, taps = reach(g, n);
    const V* const grad = g.grad.row<const V>(b, 0, n);
    int64_t hearers = 1;  // those of its sequence that bring this entity in follow without a gap
    while (hearers < g.W && n + hearers < g.N && reach(g, n + hearers) > hearers) ++hearers;
    weighted_sum<A>(g, grad, g.grad.sN, hearers, g.grad_x.row<V>(b, 0, n));
    for (int64_t t = 0; t < taps; ++t) {
      const V* const earlier = g.x.row<const V>(b, 0, n - t);
      A* const sum = by_weight + t * g.d;
      int64_t c = 0;
      for (; c + kLanes<A> <= g.d; c += kLanes<A>)
        store(multiply_add(load(grad + c), load(earlier + c), load(sum + c)), sum + c);
      for (; c < g.d; ++c) sum[c] += A(to_float(grad[c])) * A(to_float(earlier[c]));
    }
  }
}

}  // namespace

void convolution_forward(const ConvolutionProblem& g, int64_t begin, int64_t end) {
  DFN_BY_DTYPE(g, forward, begin, end);
}
void convolution_backward(const ConvolutionProblem& g, int64_t begin, int64_t end, void* sums) {
  DFN_BY_DTYPE(g, backward, begin, end, sums);
}

}  // namespace dfn::DFN_ISA
