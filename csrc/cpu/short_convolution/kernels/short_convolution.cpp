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

template <class A, class V>
void forward(const ConvolutionProblem& g, int64_t begin, int64_t end) {
  const A* const weight = static_cast<const A*>(g.weight);
  for (int64_t entity = begin; entity < end; ++entity) {
    const int64_t b = entity / g.N, n = entity % g.N, taps = reach(g, n);
    V* const out = g.out.row<V>(b, 0, n);
    int64_t c = 0;
    for (; c + kLanes<A> <= g.d; c += kLanes<A>) {
      Vec<A> total = {};
      for (int64_t t = 0; t < taps; ++t)
        total = multiply_add(load(weight + t * g.d + c), load(g.x.row<const V>(b, 0, n - t) + c), total);
      store(total, out + c);
    }
    for (; c < g.d; ++c) {
      A total = 0;
      for (int64_t t = 0; t < taps; ++t) total += weight[t * g.d + c] * A(to_float(g.x.row<const V>(b, 0, n - t)[c]));
      from_float(total, out + c);
    }
  }
}

template <class A, class V>
void backward(const ConvolutionProblem& g, int64_t begin, int64_t end, void* sums) {
  const A* const weight = static_cast<const A*>(g.weight);
  A* const by_weight = static_cast<A*>(sums);
  for (int64_t i = 0; i < g.W * g.d; ++i) by_weight[i] = 0;
  for (int64_t entity = begin; entity < end; ++entity) {
    const int64_t b = entity / g.N, n = entity % g.N, taps = reach(g, n);
    const V* const grad = g.grad.row<const V>(b, 0, n);
    V* const out = g.grad_x.row<V>(b, 0, n);
    int64_t hearers = 1;  // those of its sequence that bring this entity in follow without a gap
    while (hearers < g.W && n + hearers < g.N && reach(g, n + hearers) > hearers) ++hearers;
    int64_t c = 0;
    for (; c + kLanes<A> <= g.d; c += kLanes<A>) {
      Vec<A> total = {};
      for (int64_t t = 0; t < hearers; ++t)
        total = multiply_add(load(weight + t * g.d + c), load(g.grad.row<const V>(b, 0, n + t) + c), total);
      store(total, out + c);
      const Vec<A> own = load(grad + c);
      for (int64_t t = 0; t < taps; ++t) {
        A* const sum = by_weight + t * g.d + c;
        store(multiply_add(own, load(g.x.row<const V>(b, 0, n - t) + c), load(sum)), sum);
      }
    }
    for (; c < g.d; ++c) {
      A total = 0;
      for (int64_t t = 0; t < hearers; ++t)
        total += weight[t * g.d + c] * A(to_float(g.grad.row<const V>(b, 0, n + t)[c]));
      from_float(total, out + c);
      const A own = to_float(grad[c]);
      for (int64_t t = 0; t < taps; ++t) by_weight[t * g.d + c] += own * A(to_float(g.x.row<const V>(b, 0, n - t)[c]));
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
