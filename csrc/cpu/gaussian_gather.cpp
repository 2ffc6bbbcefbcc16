// dfn_cpu::gaussian_gather and its backward: heads and batches around the kernels, which know one of each.
#include "cpu/gaussian_gather.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/neighbors.h"

namespace dfn {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// All batches and heads; problem(b * H + h) is one of them.
struct Gather {
  int64_t B, H, heads_of_indices;
  GatherProblem common = {};
  Rows values = {}, out = {}, grad = {}, grad_values = {};
  void *grad_positions = nullptr, *grad_queries = nullptr, *grad_sigma_rows = nullptr, *grad_influence = nullptr;
  std::vector<double> sigmas;  // [H]

  int64_t groups() const { return B * H; }
  int64_t index_group(int64_t group) const { return heads_of_indices == 1 ? group / H : group; }
  const int64_t* indices(int64_t group) const { return common.indices + index_group(group) * common.M * common.k; }

  template <class T>
  T* at(T* base, int64_t elements) const {
    using Bytes = std::conditional_t<std::is_const_v<T>, const char, char>;
    return base ? static_cast<T*>(static_cast<Bytes*>(base) + elements * size_of(common.accumulate)) : nullptr;
  }
  static void set(const Rows& rows, int64_t b, int64_t h, int64_t item, auto*& data, int64_t& stride) {
    data = rows.data ? static_cast<char*>(rows.data) + (b * rows.sB + h * rows.sH) * item : nullptr;
    stride = rows.sN;
  }

  GatherProblem problem(int64_t group) const {
    const int64_t b = group / H, h = group % H, item = size_of(common.dtype);
    GatherProblem g = common;
    g.sigma = sigmas[h];
    g.positions = at(g.positions, group * g.N * g.D);
    g.queries = at(g.queries, group * g.M * g.D);
    g.influence = at(g.influence, group * g.N);
    g.indices = indices(group);
    set(values, b, h, item, g.values, g.values_stride);
    set(out, b, h, item, g.out, g.out_stride);
    set(grad, b, h, item, g.grad, g.grad_stride);
    set(grad_values, b, h, item, g.grad_values, g.grad_values_stride);
    g.grad_positions = at(grad_positions, group * g.N * g.D);
    g.grad_queries = at(grad_queries, group * g.M * g.D);
    g.grad_sigma_rows = at(grad_sigma_rows, group * g.M);
    g.grad_influence = at(grad_influence, group * g.N);
    return g;
  }
};

Gather describe(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
                const Tensor& sigma, const std::optional<Tensor>& influence, bool normalize) {
  Gather all = {};
  GatherProblem& g = all.common;
  all.values = rows_of(values, "values");
  STD_TORCH_CHECK(positions.dim() == 4 && indices.dim() == 4, "positions and indices: expected 4 dimensions");
  const int64_t B = all.B = positions.size(0), H = all.H = positions.size(1);
  g.N = positions.size(2), g.D = positions.size(3);
  g.M = indices.size(2), g.k = indices.size(3), g.c = values.size(3);
  g.dtype = dtype_of(values);
  g.accumulate = dtype_of(positions);
  STD_TORCH_CHECK((g.accumulate == Dtype::f64) == (g.dtype == Dtype::f64) &&
                      (g.accumulate == Dtype::f64 || g.accumulate == Dtype::f32),
                  "positions: expected float64 with float64 values, else float32");
  STD_TORCH_CHECK(g.N >> 32 == 0 && g.M >> 32 == 0, "positions: expected fewer than 2^32");
  const auto real = positions.scalar_type();
  all.heads_of_indices = indices.size(1) == 1 ? 1 : H;
  check_dense(positions, "positions", real, {B, H, g.N, g.D});
  check_dense(queries, "query_positions", real, {B, H, g.M, g.D});
  check_shape(values, "values", {B, H, g.N, g.c});
  check_dense(indices, "indices", ScalarType::Long, {B, all.heads_of_indices, g.M, g.k});
  check_dense(sigma, "sigma", real, {H});
  if (influence) check_dense(*influence, "influence", real, {B, H, g.N});
  g.normalize = normalize;
  g.positions = positions.data_ptr();
  g.queries = queries.data_ptr();
  g.indices = static_cast<const int64_t*>(indices.data_ptr());
  g.influence = influence ? influence->data_ptr() : nullptr;
  for (int64_t h = 0; h < H; ++h)
    all.sigmas.push_back(real == ScalarType::Double ? static_cast<const double*>(sigma.data_ptr())[h]
                                                    : static_cast<const float*>(sigma.data_ptr())[h]);
  return all;
}

// body(group, begin, end) for the rows [begin, end) of each group, all groups side by side
template <class F>
void for_rows(int64_t groups, int64_t rows, int64_t grain, const F& body) {
  parallel_for(0, groups * rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin / rows, first = begin % rows;
      const int64_t last = std::min(rows, first + end - begin);
      body(group, first, last);
      begin += last - first;
    }
  });
}

// Queries and entities of each group, in an order that finds neighbours in the cache.
struct Orders {
  std::vector<std::vector<int32_t>> of_queries, of_entities;

  Orders(const std::vector<GatherProblem>& problems, bool entities) : of_queries(problems.size()), of_entities(problems.size()) {
    parallel_for(0, static_cast<int64_t>(problems.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const GatherProblem& g = problems[i];
        const int64_t bytes = g.c * size_of(g.dtype);
        if (g.k < 2) continue;
        of_queries[i] = spatial_order(g.queries, g.accumulate, g.M, g.D, bytes);
        if (entities && g.positions != g.queries) of_entities[i] = spatial_order(g.positions, g.accumulate, g.N, g.D, bytes);
      }
    });
  }
  void give_to(std::vector<GatherProblem>& problems) const {
    for (size_t i = 0; i < problems.size(); ++i) {
      GatherProblem& g = problems[i];
      g.query_order = of_queries[i].empty() ? nullptr : of_queries[i].data();
      const auto& entities = g.positions == g.queries ? of_queries[i] : of_entities[i];
      g.entity_order = entities.empty() ? nullptr : entities.data();
    }
  }
};

Tensor forward(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
               const Tensor& sigma, const std::optional<Tensor>& influence, bool normalize) {
  Gather all = describe(positions, queries, values, indices, sigma, influence, normalize);
  const GatherProblem& g = all.common;
  Tensor out = empty_rows(values, all.B, all.H, g.M, g.c);
  prefer_huge_pages(out);
  all.out = rows_of(out, "out");
  std::vector<GatherProblem> problems;
  for (int64_t group = 0; group < all.groups(); ++group) problems.push_back(all.problem(group));
  const Orders orders(problems, false);
  orders.give_to(problems);
  std::atomic<bool> valid{true};
  for_rows(all.groups(), g.M, grain_size(g.k * (g.c + g.D)), [&](int64_t group, int64_t begin, int64_t end) {
    if (!DFN_CALL_ISA(gather_forward, problems[group], begin, end)) valid = false;
  });
  if (!valid) throw std::out_of_range("gaussian_gather: indices must be -1 or between 0 and " + std::to_string(g.N - 1));
  return out;
}

void backward_hubs(const GatherProblem& g, const Tensor& like) {
  for (int64_t j = 0; j < g.N; ++j) {
    const int64_t count = g.starts[j + 1] - g.starts[j];
    if (count <= kHub) continue;
    const int64_t pieces = (count + kHub - 1) / kHub, size = g.c + g.D + 1;
    Tensor sums = new_empty(like, {pieces, size});
    char* data = static_cast<char*>(sums.data_ptr());
    parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        DFN_CALL_ISA(gather_backward_piece, g, j, p, data + p * size * size_of(g.accumulate));
    });
    DFN_CALL_ISA(gather_backward_hub, g, j, pieces, data);
  }
}

// `wanted`: bits for positions 1, queries 2, values 4, sigma 8, influence 16
// -> grad_positions, grad_queries, grad_values, grad_sigma [H], grad_influence; empty where not wanted
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
    const Tensor& sigma, const std::optional<Tensor>& influence, bool normalize, int64_t wanted) {
  Gather all = describe(positions, queries, values, indices, sigma, influence, normalize);
  GatherProblem& common = all.common;
  const auto [B, H] = std::pair(all.B, all.H);
  const auto [N, M, D, c, k] = std::tuple(common.N, common.M, common.D, common.c, common.k);
  check_shape(grad, "grad", {B, H, M, c});
  STD_TORCH_CHECK(grad.scalar_type() == values.scalar_type(), "grad: expected the dtype of values");
  all.grad = rows_of(grad, "grad");
  const auto nothing = [&] { return new_empty(positions, {0}); };  // one each: outputs may not share memory
  Tensor grad_positions = wanted & 1 ? new_empty(positions, {B, H, N, D}) : nothing();
  Tensor grad_queries = wanted & 2 ? new_empty(positions, {B, H, M, D}) : nothing();
  Tensor grad_values = wanted & 4 ? empty_rows(values, B, H, N, c) : new_empty(values, {0});
  Tensor grad_sigma_rows = wanted & 8 ? new_empty(positions, {B, H, M}) : nothing();
  Tensor grad_influence = influence && wanted & 16 ? new_empty(positions, {B, H, N}) : nothing();
  all.grad_positions = wanted & 1 ? grad_positions.data_ptr() : nullptr;
  all.grad_queries = wanted & 2 ? grad_queries.data_ptr() : nullptr;
  if (wanted & 4) prefer_huge_pages(grad_values);
  if (wanted & 4) all.grad_values = rows_of(grad_values, "grad_values");
  all.grad_sigma_rows = wanted & 8 ? grad_sigma_rows.data_ptr() : nullptr;
  all.grad_influence = influence && wanted & 16 ? grad_influence.data_ptr() : nullptr;
  common.slopes = (wanted & ~4) != 0;
  const bool of_entities = wanted & (1 | 4 | 16);

  // So many batches and heads at a time: enough to share out, and no more memory than that takes.
  const int64_t together = std::clamp<int64_t>((int64_t(1) << 17) / std::max<int64_t>(M, 1), 1, std::max<int64_t>(all.groups(), 1));
  const int64_t edges_each = of_entities ? M * k : 0, grain = grain_size(k * (c + D));
  const int64_t edge_size = common.accumulate == Dtype::f64 ? sizeof(Edge<double>) : sizeof(Edge<float>);
  const Array<char> edges(std::min(together, all.groups()) * edges_each * edge_size);
  for (int64_t from = 0; from < all.groups(); from += together) {
    const int64_t count = std::min(together, all.groups() - from);
    std::vector<GatherProblem> problems;
    for (int64_t i = 0; i < count; ++i) problems.push_back(all.problem(from + i));
    const Orders orders(problems, of_entities);
    orders.give_to(problems);
    std::vector<Incoming> incoming(count);  // of the groups' indices, which heads may share
    if (of_entities) {
      parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          if (i == 0 || all.index_group(from + i) != all.index_group(from + i - 1))
            incoming[i] = incoming_edges(problems[i].indices, M, k, N, problems[i].query_order, problems[i].entity_order);
      });
      for (int64_t i = 0, source = 0; i < count; ++i) {
        if (incoming[i].starts.data() != nullptr) source = i;
        GatherProblem& g = problems[i];
        g.query_order = problems[source].query_order;  // the numbers are by turn
        g.entity_order = problems[source].entity_order;
        g.starts = incoming[source].starts.data();
        g.slots = incoming[source].slots.data();
        g.slots64 = incoming[source].slots64.data();
        g.edges = edges.data() + i * edges_each * edge_size;
      }
    }
    for_rows(count, M, grain, [&](int64_t i, int64_t begin, int64_t end) {
      DFN_CALL_ISA(gather_backward_queries, problems[i], begin, end);
    });
    if (!of_entities) continue;
    for_rows(count, N, grain, [&](int64_t i, int64_t begin, int64_t end) {
      DFN_CALL_ISA(gather_backward_entities, problems[i], begin, end);
    });
    if (M * k > kHub)
      for (const GatherProblem& g : problems) backward_hubs(g, positions);
  }
  const std::vector<int64_t> all_but_heads = {0, 2};
  const torch::headeronly::IntHeaderOnlyArrayRef dims(all_but_heads);
  Tensor grad_sigma = wanted & 8 ? torch::stable::sum(grad_sigma_rows, dims) : nothing();
  return {grad_positions, grad_queries, grad_values, grad_sigma, grad_influence};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("gaussian_gather(Tensor positions, Tensor queries, Tensor values, Tensor indices, Tensor sigma, "
        "Tensor? influence, bool normalize) -> Tensor");
  m.def("gaussian_gather_backward(Tensor grad, Tensor positions, Tensor queries, Tensor values, Tensor indices, "
        "Tensor sigma, Tensor? influence, bool normalize, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("gaussian_gather", TORCH_BOX(&dfn::forward));
  m.impl("gaussian_gather_backward", TORCH_BOX(&dfn::backward));
}
