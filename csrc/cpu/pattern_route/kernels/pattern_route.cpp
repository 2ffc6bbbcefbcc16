#include "cpu/pattern_route/pattern_route.h"

#include "cpu/common/product.h"

namespace dfn::DFN_ISA {
namespace {

static_assert(BlockMask::kRows % kCols<float> == 0 && BlockMask::kColumns % kCols<float> == 0);

constexpr int64_t kDepth = 512;  // of one packed block: the weights multiply sums of this many products

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A, bool Pairs>
void multiply_tile(int64_t units, const A* left, const A* right, A* tile) {
  if constexpr (Pairs) tile_product_of_pairs(units, left, right, tile);
  else tile_product<A>(units, left, right, tile);
}

// The tokens of [t0, t1) that use pattern p, as offsets from t0; null: all of them, in order.
struct Chosen {
  int32_t* place;
  int64_t count;

  void find(const TokenLists& lists, int64_t p, int64_t t0, int64_t t1) {
    const int32_t *from = lists.token + lists.start[p], *end = lists.token + lists.start[p + 1];
    for (int64_t n = end - from; n > 0;) {  // the first token that is not below t0
      const int64_t half = n / 2;
      if (from[half] < t0) from += half + 1, n -= half + 1;
      else n = half;
    }
    count = 0;
    for (; from < end && *from < t1; ++from) place[count++] = static_cast<int32_t>(*from - t0);
  }
};

// What forward and the token half of backward have in common:
//   total[t][c] += w[t][p] * sum_k left[t][k] * right_p[k][c]   and, on request,
//   grad_weights[t][p] += sum_c (the same sum) * along[t][c]
// right_p[k][c] is patterns[p][c][k] in the forward pass (Across), patterns[p][k][c] in the backward pass.
template <class A, class L, class V, bool Across, bool Pairs>
void multiply_tokens(const RouteProblem& g, const Matrix& left, int64_t K, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                     A* total, const Matrix* along, A* grad_weights) {
  constexpr int R = kRows, C = kCols<A>;
  using LeftUnit = Unit<A, L, Pairs>;
  // Where blocks are left out, one step along k stays in one block.
  const int64_t step = !g.blocks.active ? kDepth : Across ? BlockMask::kColumns : BlockMask::kRows;
  const int64_t rows = t1 - t0, width = up(c1 - c0, C), depth = LeftUnit::count(least(K, step));
  Scratch<A> packed_left(up(rows, R) * depth), packed_right(C * depth);
  Scratch<int32_t> places(g.lists.start ? rows : 0);
  alignas(64) A tile[R * C];
  const A* weights = static_cast<const A*>(g.weights) + t0 * g.P;

  auto pack_left = [&](const int32_t* place, int64_t count, int64_t k0, int64_t k) {
    const L* source = static_cast<const L*>(left.data) + t0 * left.stride + k0;
    for (int64_t r = 0; r < count; r += R) {
      A* panel = packed_left.data + r * LeftUnit::count(k);
      if (place) pack_across<A, L, Pairs, R>(source, left.stride, place + r, count - r, k, panel);
      else pack_across<A, L, Pairs, R>(source + r * left.stride, left.stride, count - r, k, panel);
    }
  };

  for (int64_t k0 = 0; k0 < K; k0 += step) {
    const int64_t k = least(K - k0, step), units = LeftUnit::count(k);
    if (!g.lists.start) pack_left(nullptr, rows, k0, k);
    for (int64_t p = 0; p < g.P; ++p) {
      Chosen chosen{nullptr, rows};
      if (g.lists.start) {
        chosen.place = places.data;
        chosen.find(g.lists, p, t0, t1);
        if (chosen.count == 0) continue;
        pack_left(chosen.place, chosen.count, k0, k);
      }
      const V* pattern = static_cast<const V*>(g.patterns) + p * g.pattern_stride;
      for (int64_t c = c0; c < c1; c += C) {
        if (!g.blocks(p, Across ? c : k0, Across ? k0 : c)) continue;
        const int64_t valid = least(c1 - c, C);
        if (Across) pack_across<A, V, Pairs, C>(pattern + c * g.row_stride + k0, g.row_stride, valid, k, packed_right.data);
        else pack_along<A, V, Pairs, C>(pattern + k0 * g.row_stride + c, g.row_stride, valid, k, packed_right.data);
        for (int64_t r0 = 0; r0 < chosen.count; r0 += R) {
          multiply_tile<A, Pairs>(units, packed_left.data + r0 * units, packed_right.data, tile);
          for (int64_t r = 0; r < R && r0 + r < chosen.count; ++r) {
            const int64_t t = chosen.place ? chosen.place[r0 + r] : r0 + r;
            const A weight = weights[t * g.P + p];
            A* sums = total + t * width + (c - c0);
            for (int v = 0; v < C; v += kLanes<A>) store(load(sums + v) + weight * load(tile + r * C + v), sums + v);
            if (!along) continue;
            const V* other = static_cast<const V*>(along->data) + (t0 + t) * along->stride + c;
            Vec<A> lanes = {};
            int64_t n = 0;
            for (; n + kLanes<A> <= valid; n += kLanes<A>) lanes += load(other + n) * load(tile + r * C + n);
            A dot = sum<A>(lanes);
            for (; n < valid; ++n) dot += to_float(other[n]) * tile[r * C + n];
            grad_weights[(t0 + t) * g.P + p] += dot;
          }
        }
      }
    }
  }
}

template <class A, class V>
void write_row(const A* from, int64_t n, V* to) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(load(from + i), to + i);
  for (; i < n; ++i) from_float(from[i], to + i);
}

template <class A, class V, class G, bool Pairs>
void forward_block(const RouteProblem& g, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
  const int64_t width = up(c1 - c0, kCols<A>);
  Scratch<A> total((t1 - t0) * width);
  const A* bias = static_cast<const A*>(g.bias);
  for (int64_t t = 0; t < t1 - t0; ++t)
    for (int64_t c = 0; c < width; ++c) total[t * width + c] = bias && c0 + c < c1 ? bias[c0 + c] : A(0);
  multiply_tokens<A, V, V, true, Pairs>(g, g.x, g.I, t0, t1, c0, c1, total.data, nullptr, nullptr);
  for (int64_t t = t0; t < t1; ++t)
    write_row(total.data + (t - t0) * width, c1 - c0, static_cast<G*>(g.out) + t * g.O + c0);
}

template <class A, class V, class G, bool Pairs>
void backward_tokens_block(const RouteProblem& g, int64_t t0, int64_t t1, int64_t c0, int64_t c1, A* grad_weights) {
  const int64_t width = up(c1 - c0, kCols<A>);
  Scratch<A> total((t1 - t0) * width);
  for (int64_t i = 0; i < (t1 - t0) * width; ++i) total[i] = 0;
  multiply_tokens<A, G, V, false, Pairs>(g, g.grad, g.O, t0, t1, c0, c1, total.data, &g.x, grad_weights);
  for (int64_t t = t0; t < t1; ++t)
    write_row(total.data + (t - t0) * width, c1 - c0, static_cast<V*>(g.grad_x) + t * g.I + c0);
}

// grad_patterns[p][o][c] = sum_t (w[t][p] * grad[t][o]) * x[t][c]: here w cannot wait for the sum, so it multiplies the
// float32 copy of grad while that is packed.
template <class A, class V, class G>
void backward_patterns_block(const RouteProblem& g, int64_t p, int64_t o0, int64_t o1, int64_t c0, int64_t c1) {
  constexpr int R = kRows, C = kCols<A>;
  const int64_t rows = o1 - o0, width = up(c1 - c0, C);
  const int64_t first = g.lists.start ? g.lists.start[p] : 0, last = g.lists.start ? g.lists.start[p + 1] : g.T;
  const int64_t depth = least(last - first, kDepth / 2);
  Scratch<A> packed_left(R * depth), packed_right(width * depth), total(up(rows, R) * width);
  alignas(64) A tile[R * C];
  for (int64_t i = 0; i < up(rows, R) * width; ++i) total[i] = 0;
  for (int64_t e0 = first; e0 < last; e0 += depth) {
    const int64_t k = least(last - e0, depth);
    auto token = [&](int64_t e) { return g.lists.start ? g.lists.token[e0 + e] : e0 + e; };
    for (int64_t c = c0; c < c1; c += C)
      for (int64_t e = 0; e < k; ++e)
        pack_along<A, V, false, C>(static_cast<const V*>(g.x.data) + token(e) * g.x.stride + c, 0, least(c1 - c, C), 1,
                                   packed_right.data + (c - c0) * depth + e * C);
    for (int64_t o = o0; o < o1; o += R) {
      const int64_t valid = least(o1 - o, R), last_row = o + valid - 1;
      for (int64_t e = 0; e < k; ++e) {
        const G* grad = static_cast<const G*>(g.grad.data) + token(e) * g.grad.stride + o;
        const A weight = static_cast<const A*>(g.weights)[token(e) * g.P + p];
        A* to = packed_left.data + e * R;
        if (valid == R)
          for (int r = 0; r < R; ++r) to[r] = weight * to_float(grad[r]);
        else
          for (int r = 0; r < R; ++r) to[r] = r < valid ? weight * to_float(grad[r]) : A(0);
      }
      for (int64_t c = 0; c < width; c += C) {
        if (!g.blocks(p, o, c0 + c) && !g.blocks(p, last_row, c0 + c)) continue;
        tile_product<A>(k, packed_left.data, packed_right.data + c * depth, tile);
        for (int r = 0; r < R; ++r) {
          A* sums = total.data + (o - o0 + r) * width + c;
          for (int v = 0; v < C; v += kLanes<A>) store(load(sums + v) + load(tile + r * C + v), sums + v);
        }
      }
    }
  }
  if (g.blocks.active)  // a tile of sums may reach into a block that does not count
    for (int64_t o = o0; o < o1; ++o)
      for (int64_t c = c0; c < c1; ++c)
        if (!g.blocks(p, o, c)) total[(o - o0) * width + (c - c0)] = 0;
  for (int64_t o = o0; o < o1; ++o)
    write_row(total.data + (o - o0) * width, c1 - c0, static_cast<V*>(g.grad_patterns) + (p * g.O + o) * g.I + c0);
}

template <class A, class G>
void backward_bias_block(const RouteProblem& g, int64_t o0, int64_t o1) {
  Scratch<double> total(o1 - o0);
  for (int64_t o = 0; o < o1 - o0; ++o) total[o] = 0;
  for (int64_t t = 0; t < g.T; ++t) {
    const G* grad = static_cast<const G*>(g.grad.data) + t * g.grad.stride + o0;
    for (int64_t o = 0; o < o1 - o0; ++o) total[o] += to_float(grad[o]);
  }
  for (int64_t o = 0; o < o1 - o0; ++o) static_cast<A*>(g.grad_bias)[o0 + o] = static_cast<A>(total[o]);
}

}  // namespace

// name<A, V, G>: type of the sums, of x and patterns, of the output or its gradient
#define DFN_ROUTE_BY_DTYPE(g, call)                                         \
  do {                                                                      \
    if ((g).accumulate == Dtype::f64) call(double, double, double);         \
    else if ((g).dtype == Dtype::f32) call(float, float, float);            \
    else if ((g).dtype == Dtype::bf16 && (g).wide) call(float, BFloat16, float); \
    else if ((g).dtype == Dtype::bf16) call(float, BFloat16, BFloat16);     \
    else if ((g).wide) call(float, Half, float);                            \
    else call(float, Half, Half);                                           \
  } while (0)

template <class V> constexpr bool kIsBFloat16 = false;
template <> inline constexpr bool kIsBFloat16<BFloat16> = true;

void route_forward(const RouteProblem& g, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
#define DFN_CALL(A, V, G)                                                                    \
  do {                                                                                       \
    if constexpr (kHasPairs && kIsBFloat16<V>)                                               \
      if (g.pairs) return forward_block<A, V, G, true>(g, t0, t1, c0, c1);                   \
    forward_block<A, V, G, false>(g, t0, t1, c0, c1);                                        \
  } while (0)
  DFN_ROUTE_BY_DTYPE(g, DFN_CALL);
#undef DFN_CALL
}

void route_backward_tokens(const RouteProblem& g, int64_t t0, int64_t t1, int64_t c0, int64_t c1, void* grad_weights) {
#define DFN_CALL(A, V, G)                                                                                          \
  do {                                                                                                             \
    if constexpr (kHasPairs && kIsBFloat16<V> && kIsBFloat16<G>)                                                   \
      if (g.pairs) return backward_tokens_block<A, V, G, true>(g, t0, t1, c0, c1, static_cast<A*>(grad_weights));  \
    backward_tokens_block<A, V, G, false>(g, t0, t1, c0, c1, static_cast<A*>(grad_weights));                       \
  } while (0)
  DFN_ROUTE_BY_DTYPE(g, DFN_CALL);
#undef DFN_CALL
}

void route_backward_patterns(const RouteProblem& g, int64_t p, int64_t o0, int64_t o1, int64_t c0, int64_t c1) {
#define DFN_CALL(A, V, G) backward_patterns_block<A, V, G>(g, p, o0, o1, c0, c1)
  DFN_ROUTE_BY_DTYPE(g, DFN_CALL);
#undef DFN_CALL
}

void route_backward_bias(const RouteProblem& g, int64_t o0, int64_t o1) {
#define DFN_CALL(A, V, G) backward_bias_block<A, G>(g, o0, o1)
  DFN_ROUTE_BY_DTYPE(g, DFN_CALL);
#undef DFN_CALL
}

int64_t route_tile_rows() { return kRows; }
int64_t route_tile_columns(Dtype accumulate) { return accumulate == Dtype::f64 ? kCols<double> : kCols<float>; }

}  // namespace dfn::DFN_ISA
