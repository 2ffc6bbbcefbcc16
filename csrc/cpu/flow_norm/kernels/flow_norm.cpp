#include "cpu/flow_norm/flow_norm.h"

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

bool is_padding(const NormProblem& g, int64_t entity) {
  return g.lengths != nullptr && entity % g.N >= g.lengths[entity / g.N];
}

template <class V>
V* row_of(const Rows& rows, const NormProblem& g, int64_t entity) {
  return rows.row<V>(entity / g.N, 0, entity % g.N);
}

template <class V>
void zero(V* row, int64_t d) {
  for (int64_t x = 0; x < d; ++x) row[x] = V{};
}

template <class A, class V>
void forward(const NormProblem& g, int64_t begin, int64_t end) {
  for (int64_t entity = begin; entity < end; ++entity) {
    V* out = row_of<V>(g.out, g, entity);
    if (is_padding(g, entity)) {
      zero(out, g.d);
      continue;
    }
    const V* state = row_of<const V>(g.states, g, entity);
    const A scale = static_cast<const A*>(g.scale)[entity];
    int64_t x = 0;
    for (; x + kLanes<A> <= g.d; x += kLanes<A>) store(scale * load(state + x), out + x);
    for (; x < g.d; ++x) from_float(scale * A(to_float(state[x])), out + x);
  }
}

template <class A, class V>
void backward(const NormProblem& g, int64_t begin, int64_t end) {
  A* along = static_cast<A*>(g.along);
  for (int64_t entity = begin; entity < end; ++entity) {
    V* out = row_of<V>(g.grad_states, g, entity);
    if (is_padding(g, entity)) {
      zero(out, g.d);
      along[entity] = 0;
      continue;
    }
    const V* state = row_of<const V>(g.states, g, entity);
    const V* grad = row_of<const V>(g.grad, g, entity);
    const A scale = static_cast<const A*>(g.scale)[entity];
    Vec<A> lanes = {};
    int64_t x = 0;
    for (; x + kLanes<A> <= g.d; x += kLanes<A>) {
      const Vec<A> one = load(grad + x);
      store(scale * one, out + x);
      lanes = multiply_add(one, load(state + x), lanes);
    }
    A total = sum<A>(lanes);
    for (; x < g.d; ++x) {
      const A one = to_float(grad[x]);
      from_float(scale * one, out + x);
      total += one * A(to_float(state[x]));
    }
    along[entity] = total;
  }
}

}  // namespace

void norm_forward(const NormProblem& g, int64_t begin, int64_t end) { DFN_BY_DTYPE(g, forward, begin, end); }
void norm_backward(const NormProblem& g, int64_t begin, int64_t end) { DFN_BY_DTYPE(g, backward, begin, end); }

}  // namespace dfn::DFN_ISA
