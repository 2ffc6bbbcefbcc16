#include "cpu/flow_norm/flow_norm.h"

#include "cpu/common/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

inline Vec<double> square_root(Vec<double> v) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_sqrt_pd((__m128d)v);
#else
  for (int l = 0; l < kLanes<double>; ++l) v[l] = __builtin_sqrt(v[l]);
  return v;
#endif
}

template <class A>
void scales(const double* sums, int64_t n, int64_t first, int64_t step, double eps, A* out) {
  constexpr int L = kLanes<double>;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    double lanes[L] = {}, counts[L];
    __builtin_memcpy(lanes, sums + i, count * sizeof(double));
    for (int l = 0; l < L; ++l) counts[l] = static_cast<double>(first + (i + l) * step);
    store(1 / square_root(load(lanes) / load(counts) + eps), lanes);
    for (int l = 0; l < count; ++l) out[i + l] = static_cast<A>(lanes[l]);
  }
}

}  // namespace

void norm_scales(const double* sums, int64_t n, int64_t first, int64_t step, double eps, float* out) {
  scales(sums, n, first, step, eps, out);
}
void norm_scales(const double* sums, int64_t n, int64_t first, int64_t step, double eps, double* out) {
  scales(sums, n, first, step, eps, out);
}
void norm_forward(const NormProblem& g, int64_t begin, int64_t end) { DFN_BY_DTYPE(g, forward, begin, end); }
void norm_backward(const NormProblem& g, int64_t begin, int64_t end) { DFN_BY_DTYPE(g, backward, begin, end); }

}  // namespace dfn::DFN_ISA
