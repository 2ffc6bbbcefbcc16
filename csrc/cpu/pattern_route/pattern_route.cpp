// dfn_cpu::pattern_route and its backward: blocks of tokens and columns, each a matrix product in cache.
#include "cpu/pattern_route/pattern_route.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kTokens = 512;   // of a block; one block's packed tokens and sums stay in the cache
constexpr int64_t kColumns = 512;  // of a block

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

bool multiplies_pairs_of_bfloat16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && cpu_isa() == Isa::avx512;
#else
  return false;
#endif
}

Matrix matrix_of(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_shape(t, name, {rows, columns});
  STD_TORCH_CHECK(columns <= 1 || rows == 0 || t.stride(1) == 1, name, ": expected a dense last dimension");
  return Matrix{t.data_ptr(), t.stride(0)};
}

RouteProblem describe(const Tensor& x, const Tensor& weights, const Tensor& patterns, const std::optional<Tensor>& blocks) {
  RouteProblem g = {};
  STD_TORCH_CHECK(x.dim() == 2 && patterns.dim() == 3, "expected x [T, I] and patterns [P, O, I]");
  g.T = x.size(0), g.I = x.size(1), g.P = patterns.size(0), g.O = patterns.size(1);
  STD_TORCH_CHECK(g.T < INT32_MAX, "at most 2^31 - 1 tokens");
  g.dtype = dtype_of(x);
  g.accumulate = dtype_of(weights);
  STD_TORCH_CHECK((g.accumulate == Dtype::f64) == (g.dtype == Dtype::f64) &&
                      (g.accumulate == Dtype::f64 || g.accumulate == Dtype::f32),
                  "weights: expected float64 with float64 x, else float32");
  g.x = matrix_of(x, "x", g.T, g.I);
  check_dense(weights, "weights", weights.scalar_type(), {g.T, g.P});
  check_shape(patterns, "patterns", {g.P, g.O, g.I});
  STD_TORCH_CHECK(patterns.scalar_type() == x.scalar_type(), "patterns: expected the dtype of x");
  STD_TORCH_CHECK(g.I <= 1 || g.P * g.O == 0 || patterns.stride(2) == 1, "patterns: expected a dense last dimension");
  g.weights = weights.data_ptr();
  g.patterns = patterns.data_ptr();
  g.pattern_stride = patterns.stride(0);
  g.row_stride = patterns.stride(1);
  g.blocks = {nullptr, ceil_div(g.O, BlockMask::kRows), ceil_div(g.I, BlockMask::kColumns)};
  if (blocks) {
    check_dense(*blocks, "blocks", ScalarType::Bool, {g.P, g.blocks.rows, g.blocks.columns});
    g.blocks.active = static_cast<const bool*>(blocks->data_ptr());
  }
  g.pairs = g.dtype == Dtype::bf16 && multiplies_pairs_of_bfloat16();
  return g;
}

// For every pattern the tokens that chose it, ascending.
struct Lists {
  std::vector<int32_t> start, token;

  Lists(const std::optional<Tensor>& chosen, int64_t T, int64_t P) {
    if (!chosen) return;
    const int64_t k = chosen->size(1);
    check_dense(*chosen, "chosen", ScalarType::Long, {T, k});
    STD_TORCH_CHECK(T * k < INT32_MAX, "chosen: too many entries");
    const int64_t* p = static_cast<const int64_t*>(chosen->data_ptr());
    start.assign(P + 1, 0);
    for (int64_t e = 0; e < T * k; ++e) {
      STD_TORCH_CHECK(p[e] >= 0 && p[e] < P, "chosen: pattern out of range");
      ++start[p[e] + 1];
    }
    for (int64_t q = 0; q < P; ++q) start[q + 1] += start[q];
    token.resize(T * k + 1);
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    for (int64_t e = 0; e < T * k; ++e) {
      const int32_t t = static_cast<int32_t>(e / k);
      int32_t& at = next[p[e]];
      STD_TORCH_CHECK(at == start[p[e]] || token[at - 1] != t, "chosen: a pattern twice for one token");
      token[at++] = t;
    }
  }
  TokenLists view() const { return start.empty() ? TokenLists{nullptr, nullptr} : TokenLists{start.data(), token.data()}; }
};

// How [0, n) is divided: `count` blocks of `size`, a multiple of `multiple`, the last one smaller.
struct Blocks {
  int64_t n, size, count;

  Blocks(int64_t n, int64_t wanted, int64_t multiple) : n(n) {
    size = round_up(ceil_div(n, std::max<int64_t>(1, ceil_div(n, wanted))), multiple);
    count = size > 0 ? ceil_div(n, size) : 0;
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return std::min(n, (i + 1) * size); }
};

// Blocks that a thread should take at least: a multiply-add is about a sixteenth of an element-wise step.
int64_t grain(int64_t multiply_adds_per_block) { return grain_size(multiply_adds_per_block / 16); }

int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// One block or a few for every thread, while blocks are large enough to pay for packing the patterns again.
Blocks token_blocks(const RouteProblem& g) {
  const int64_t share = ceil_div(g.T, threads());
  const int64_t most = g.lists.start ? 4 * kTokens : kTokens;  // a pattern finds only some of the tokens in a block
  return Blocks(g.T, std::clamp<int64_t>(share, 64, most), DFN_CALL_ISA(route_tile_rows));
}

Tensor forward(const Tensor& x, const Tensor& weights, const Tensor& patterns, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& chosen, const std::optional<Tensor>& blocks, bool wide) {
  RouteProblem g = describe(x, weights, patterns, blocks);
  const Lists lists(chosen, g.T, g.P);
  g.lists = lists.view();
  g.wide = wide;
  if (bias) check_dense(*bias, "bias", weights.scalar_type(), {g.O});
  g.bias = bias ? bias->data_ptr() : nullptr;
  Tensor out = allocate(wide ? weights : x, {g.T, g.O});
  g.out = out.data_ptr();

  const Blocks tokens = token_blocks(g);
  const int64_t parts = std::max<int64_t>(1, ceil_div(threads(), std::max<int64_t>(1, tokens.count)));
  const int64_t share = std::clamp<int64_t>(ceil_div(g.O, parts), 64, kColumns);
  const Blocks columns(g.O, share, DFN_CALL_ISA(route_tile_columns, g.accumulate));
  const int64_t work = tokens.size * columns.size * g.I * g.P;
  parallel_for(0, tokens.count * columns.count, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / columns.count, c = i % columns.count;
      DFN_CALL_ISA(route_forward, g, tokens.begin(t), tokens.end(t), columns.begin(c), columns.end(c));
    }
  });
  return out;
}

// -> gradients of x, weights, patterns, bias; empty where not wanted
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                                    const Tensor& patterns, const std::optional<Tensor>& chosen,
                                                    const std::optional<Tensor>& blocks, bool need_tokens,
                                                    bool need_patterns, bool need_bias) {
  RouteProblem g = describe(x, weights, patterns, blocks);
  const Lists lists(chosen, g.T, g.P);
  g.lists = lists.view();
  g.grad = matrix_of(grad, "grad", g.T, g.O);
  g.wide = grad.scalar_type() != x.scalar_type();
  STD_TORCH_CHECK(!g.wide || grad.scalar_type() == weights.scalar_type(), "grad: expected the dtype of x or of weights");
  Tensor grad_x = need_tokens ? allocate(x, {g.T, g.I}) : allocate(x, {0});
  Tensor grad_weights = need_tokens ? torch::stable::new_zeros(weights, {g.T, g.P}) : allocate(weights, {0});
  Tensor grad_patterns = need_patterns ? allocate(patterns, {g.P, g.O, g.I}) : allocate(patterns, {0});
  Tensor grad_bias = allocate(weights, {need_bias ? g.O : 0});
  g.grad_x = grad_x.data_ptr();
  g.grad_patterns = grad_patterns.data_ptr();
  g.grad_bias = grad_bias.data_ptr();
  const int64_t tile_columns = DFN_CALL_ISA(route_tile_columns, g.accumulate);

  if (need_tokens) {
    const Blocks tokens = token_blocks(g), columns(g.I, kColumns, tile_columns);
    char* sums = static_cast<char*>(grad_weights.data_ptr());
    parallel_for(0, tokens.count, grain(tokens.size * g.I * g.O * g.P), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t c = 0; c < columns.count; ++c)
          DFN_CALL_ISA(route_backward_tokens, g, tokens.begin(t), tokens.end(t), columns.begin(c), columns.end(c), sums);
    });
  }
  if (need_patterns) {
    const int64_t parts = ceil_div(2 * threads(), std::max<int64_t>(1, g.P));
    const int64_t share = std::clamp<int64_t>(ceil_div(g.O, std::max<int64_t>(1, parts)), 64, kTokens);
    const Blocks rows(g.O, share, DFN_CALL_ISA(route_tile_rows)), columns(g.I, kColumns, tile_columns);
    const int64_t work = rows.size * columns.size * g.T;
    parallel_for(0, g.P * rows.count * columns.count, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = i / (rows.count * columns.count), o = i / columns.count % rows.count, c = i % columns.count;
        DFN_CALL_ISA(route_backward_patterns, g, p, rows.begin(o), rows.end(o), columns.begin(c), columns.end(c));
      }
    });
  }
  if (need_bias)
    parallel_for(0, g.O, std::max<int64_t>(64, grain_size(g.T)),
                 [&](int64_t begin, int64_t end) { DFN_CALL_ISA(route_backward_bias, g, begin, end); });
  return {grad_x, grad_weights, grad_patterns, grad_bias};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("pattern_route(Tensor x, Tensor weights, Tensor patterns, Tensor? bias, Tensor? chosen, Tensor? blocks, "
        "bool wide) -> Tensor");
  m.def("pattern_route_backward(Tensor grad, Tensor x, Tensor weights, Tensor patterns, Tensor? chosen, "
        "Tensor? blocks, bool need_tokens, bool need_patterns, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("pattern_route", TORCH_BOX(&dfn::forward));
  m.impl("pattern_route_backward", TORCH_BOX(&dfn::backward));
}
