#include "cpu/flow_drift/flow_drift.h"

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

constexpr int kRows = 4;     // entities worked on at a time: what is loaded of the weight serves all of them
constexpr int kOutputs = 4;  // outputs worked on at a time: what is loaded of the states serves all of them

template <class A, class V>
const V* state_of(const DriftProblem& g, int64_t entity) {
  return g.states.row<const V>(entity / g.N, 0, entity % g.N);
}

// out[r * J + j] = <rows[r], weight row j>. The order of the sum does not depend on R and J. Rows side by side are too
// many streams for the processor to foresee: what lies `ahead` of them is fetched by hand.
template <int R, int J, class A, class V>
inline void dots(const V* const* rows, const A* weight, int64_t d, A* out, int64_t stride, int64_t ahead) {
  Vec<A> acc[R][J] = {};
  int64_t x = 0;
  for (; x + kLanes<A> <= d; x += kLanes<A>) {
    Vec<A> w[J];
    for (int j = 0; j < J; ++j) w[j] = load(weight + j * d + x);
    for (int r = 0; r < R; ++r) {
      if (ahead) __builtin_prefetch(rows[r] + x + ahead);
      const Vec<A> s = load(rows[r] + x);
      for (int j = 0; j < J; ++j) acc[r][j] = multiply_add(s, w[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) {
      A total = sum<A>(acc[r][j]);
      for (int64_t t = x; t < d; ++t) total += A(to_float(rows[r][t])) * weight[j * d + t];
      out[r * stride + j] = total;
    }
}

template <int R, class A, class V>
inline void all_dots(const V* const* rows, const A* weight, int64_t outputs, int64_t d, A* out, int64_t ahead = 0) {
  int64_t j = 0;
  for (; j + kOutputs <= outputs; j += kOutputs, ahead = 0)
    dots<R, kOutputs, A, V>(rows, weight + j * d, d, out + j, outputs, ahead);
  switch (outputs - j) {
    case 3: return dots<R, 3, A, V>(rows, weight + j * d, d, out + j, outputs, ahead);
    case 2: return dots<R, 2, A, V>(rows, weight + j * d, d, out + j, outputs, ahead);
    case 1: return dots<R, 1, A, V>(rows, weight + j * d, d, out + j, outputs, ahead);
  }
}

template <class A, class V>
void forward(const DriftProblem& g, int64_t begin, int64_t end) {
  const int64_t outputs = g.H * g.D;
  Scratch<A> found(kRows * outputs);
  const A* weight = static_cast<const A*>(g.weight);
  const A* bias = static_cast<const A*>(g.bias);
  const A* alpha = static_cast<const A*>(g.alpha);
  for (int64_t first = begin; first < end; first += kRows) {
    const int count = end - first < kRows ? int(end - first) : kRows;
    const V* rows[kRows];
    for (int r = 0; r < count; ++r) rows[r] = state_of<A, V>(g, first + r);
    // Few outputs wait for memory, and one row after the other is what the processor foresees best.
    if (count == kRows && outputs > kOutputs)
      all_dots<kRows, A, V>(rows, weight, outputs, g.d, found.data, 2 * kRows * g.states.sN);
    else
      for (int r = 0; r < count; ++r) all_dots<1, A, V>(rows + r, weight, outputs, g.d, found.data + r * outputs);
    for (int r = 0; r < count; ++r) {
      const int64_t b = (first + r) / g.N, i = (first + r) % g.N;
      for (int64_t h = 0; h < g.H; ++h) {
        const int64_t place = (b * g.H + h) * g.N + i;
        const A* p = static_cast<const A*>(g.positions) + place * g.D;
        A* flow = static_cast<A*>(g.flow) + place * g.D;
        A* moved = static_cast<A*>(g.out_positions) + place * g.D;
        A energy = 0;
        for (int64_t a = 0; a < g.D; ++a) {
          const A f = found[r * outputs + h * g.D + a] + (bias ? bias[h * g.D + a] : A(0));
          flow[a] = f;
          moved[a] = p[a] + alpha[h] * f;
          energy += f * f;
        }
        static_cast<A*>(g.out_energy)[place] = energy;
      }
    }
  }
}

// The derivative of the loss by the flow of one entity, total[H * D]; adds to the sums for bias and alpha.
template <class A>
inline void total_gradient(const DriftProblem& g, int64_t entity, A* total, A* sum_bias, A* sum_alpha) {
  const int64_t b = entity / g.N, i = entity % g.N;
  const A* alpha = static_cast<const A*>(g.alpha);
  for (int64_t h = 0; h < g.H; ++h) {
    const int64_t place = (b * g.H + h) * g.N + i;
    const A* by_position = static_cast<const A*>(g.grad_positions) + place * g.D;
    const A* by_flow = static_cast<const A*>(g.grad_flow) + place * g.D;
    const A* flow = static_cast<const A*>(g.flow) + place * g.D;
    const A by_energy = 2 * static_cast<const A*>(g.grad_energy)[place];
    A along = 0;
    for (int64_t a = 0; a < g.D; ++a) {
      const A one = alpha[h] * by_position[a] + by_flow[a] + by_energy * flow[a];
      total[h * g.D + a] = one;
      sum_bias[h * g.D + a] += one;
      along += by_position[a] * flow[a];
    }
    sum_alpha[h] += along;
  }
}

// For a few entities and the channels of L registers from x on: grad_states, and their share of part_weight.
template <int L, class A, class V>
inline void backward_block(int count, const V* const* states, V* const* grads, const A* total, const A* weight,
                           A* part_weight, int64_t outputs, int64_t d, int64_t x) {
  Vec<A> s[kRows][L], acc[kRows][L] = {};
  for (int r = 0; r < kRows; ++r)
    for (int l = 0; l < L; ++l) s[r][l] = r < count ? load(states[r] + x + l * kLanes<A>) : Vec<A>{};
  for (int64_t j = 0; j < outputs; ++j)
    for (int l = 0; l < L; ++l) {
      const int64_t at = j * d + x + l * kLanes<A>;
      const Vec<A> w = load(weight + at);
      Vec<A> part = load(part_weight + at);
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> t = splat<A>(total[r * outputs + j]);
        acc[r][l] = multiply_add(t, w, acc[r][l]);
        part = multiply_add(t, s[r][l], part);
      }
      store(part, part_weight + at);
    }
  for (int r = 0; r < count; ++r)
    for (int l = 0; l < L; ++l) store(acc[r][l], grads[r] + x + l * kLanes<A>);
}

template <class A, class V>
void backward(const DriftProblem& g, int64_t begin, int64_t end) {
  const int64_t outputs = g.H * g.D;
  const A* weight = static_cast<const A*>(g.weight);
  Scratch<A> total(kRows * outputs);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* part_weight = static_cast<A*>(g.part_weight) + chunk * outputs * g.d;
    A* part_bias = static_cast<A*>(g.part_bias) + chunk * outputs;
    A* part_alpha = static_cast<A*>(g.part_alpha) + chunk * g.H;
    for (int64_t x = 0; x < outputs * g.d; ++x) part_weight[x] = 0;
    for (int64_t j = 0; j < outputs; ++j) part_bias[j] = 0;
    for (int64_t h = 0; h < g.H; ++h) part_alpha[h] = 0;
    const int64_t stop = (chunk + 1) * g.chunk < g.B * g.N ? (chunk + 1) * g.chunk : g.B * g.N;
    for (int64_t first = chunk * g.chunk; first < stop; first += kRows) {
      const int count = stop - first < kRows ? int(stop - first) : kRows;
      const V* states[kRows];
      V* grads[kRows];
      for (int64_t j = 0; j < kRows * outputs; ++j) total[j] = 0;
      for (int r = 0; r < count; ++r) {
        states[r] = state_of<A, V>(g, first + r);
        grads[r] = g.grad_states.row<V>((first + r) / g.N, 0, (first + r) % g.N);
        total_gradient<A>(g, first + r, total.data + r * outputs, part_bias, part_alpha);
      }
      int64_t x = 0;
      for (; x + 2 * kLanes<A> <= g.d; x += 2 * kLanes<A>)
        backward_block<2, A, V>(count, states, grads, total.data, weight, part_weight, outputs, g.d, x);
      for (; x + kLanes<A> <= g.d; x += kLanes<A>)
        backward_block<1, A, V>(count, states, grads, total.data, weight, part_weight, outputs, g.d, x);
      for (; x < g.d; ++x)
        for (int r = 0; r < count; ++r) {
          A one = 0;
          for (int64_t j = 0; j < outputs; ++j) {
            one += total[r * outputs + j] * weight[j * g.d + x];
            part_weight[j * g.d + x] += total[r * outputs + j] * A(to_float(states[r][x]));
          }
          from_float(one, grads[r] + x);
        }
    }
  }
}

}  // namespace

void drift_forward(const DriftProblem& g, int64_t begin, int64_t end) { DFN_BY_DTYPE(g, forward, begin, end); }
void drift_backward(const DriftProblem& g, int64_t begin, int64_t end) { DFN_BY_DTYPE(g, backward, begin, end); }

}  // namespace dfn::DFN_ISA
