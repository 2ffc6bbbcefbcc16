// dfn_cpu::gaussian_gather, its backward, and the transposed neighbour list that the backward walks along.
#include "cpu/gaussian_gather.h"

#include <atomic>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

GatherProblem describe(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
                       const Tensor& sigma, const std::optional<Tensor>& influence, bool normalize) {
  GatherProblem g = {};
  g.values = rows_of(values, "values");
  STD_TORCH_CHECK(positions.dim() == 4 && indices.dim() == 4, "positions and indices: expected 4 dimensions");
  g.B = positions.size(0), g.H = positions.size(1), g.N = positions.size(2), g.D = positions.size(3);
  g.M = indices.size(2), g.k = indices.size(3), g.c = values.size(3);
  g.dtype = dtype_of(values);
  g.accumulate = dtype_of(positions);
  STD_TORCH_CHECK((g.accumulate == Dtype::f64) == (g.dtype == Dtype::f64) &&
                      (g.accumulate == Dtype::f64 || g.accumulate == Dtype::f32),
                  "positions: expected float64 with float64 values, else float32");
  const auto real = positions.scalar_type();
  check_dense(positions, "positions", real, {g.B, g.H, g.N, g.D});
  check_dense(queries, "query_positions", real, {g.B, g.H, g.M, g.D});
  check_shape(values, "values", {g.B, g.H, g.N, g.c});
  check_dense(indices, "indices", ScalarType::Long, {g.B, g.H, g.M, g.k});
  check_dense(sigma, "sigma", real, {g.H});
  if (influence) check_dense(*influence, "influence", real, {g.B, g.H, g.N});
  g.normalize = normalize;
  g.positions = positions.data_ptr();
  g.queries = queries.data_ptr();
  g.indices = static_cast<const int64_t*>(indices.data_ptr());
  g.sigma = sigma.data_ptr();
  g.influence = influence ? influence->data_ptr() : nullptr;
  return g;
}

Tensor forward(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
               const Tensor& sigma, const std::optional<Tensor>& influence, bool normalize) {
  GatherProblem g = describe(positions, queries, values, indices, sigma, influence, normalize);
  Tensor out = empty_rows(values, g.B, g.H, g.M, g.c);
  g.out = rows_of(out, "out");
  std::atomic<bool> valid{true};
  parallel_for(0, g.B * g.H * g.M, grain_size(g.k * (g.c + g.D)), [&](int64_t begin, int64_t end) {
    if (!DFN_CALL_ISA(gather_forward, g, begin, end)) valid = false;
  });
  if (!valid) throw std::out_of_range("gaussian_gather: indices must be -1 or between 0 and " + std::to_string(g.N - 1));
  return out;
}

// For every entity j, the edges (query * k + slot) that point to it, ascending: a counting sort that keeps order.
// Indices outside [0, N) are left out. -> starts [B, H, N + 1], edges [B, H, M * k] (its unused end is undefined)
std::tuple<Tensor, Tensor> transpose_neighbors(const Tensor& indices, int64_t N) {
  const int64_t B = indices.size(0), H = indices.size(1), E = indices.size(2) * indices.size(3);
  check_dense(indices, "indices", ScalarType::Long, {B, H, indices.size(2), indices.size(3)});
  Tensor starts = torch::stable::new_zeros(indices, {B, H, N + 1});
  Tensor edges = new_empty(indices, {B, H, E});
  const int64_t* index = static_cast<const int64_t*>(indices.data_ptr());
  int64_t* start = static_cast<int64_t*>(starts.data_ptr());
  int64_t* edge = static_cast<int64_t*>(edges.data_ptr());
  parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> next(N);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t* from = index + group * E;
      int64_t* first = start + group * (N + 1);
      for (int64_t e = 0; e < E; ++e)
        if (from[e] >= 0 && from[e] < N) ++first[from[e] + 1];
      for (int64_t j = 0; j < N; ++j) {
        next[j] = first[j];
        first[j + 1] += first[j];
      }
      for (int64_t e = 0; e < E; ++e)
        if (from[e] >= 0 && from[e] < N) edge[group * E + next[from[e]]++] = e;
    }
  });
  return {starts, edges};
}

// -> grad_positions, grad_queries, grad_values, grad_sigma [H], grad_influence (empty without influence)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
    const Tensor& sigma, const std::optional<Tensor>& influence, bool normalize) {
  GatherProblem g = describe(positions, queries, values, indices, sigma, influence, normalize);
  check_shape(grad, "grad", {g.B, g.H, g.M, g.c});
  STD_TORCH_CHECK(grad.scalar_type() == values.scalar_type(), "grad: expected the dtype of values");
  g.grad = rows_of(grad, "grad");

  Tensor edge_weight = new_empty(positions, {g.B, g.H, g.M, g.k});
  Tensor edge_slope = new_empty(positions, {g.B, g.H, g.M, g.k});
  Tensor edge_influence = new_empty(positions, {influence ? g.B * g.H * g.M * g.k : 0});
  Tensor grad_sigma_rows = new_empty(positions, {g.B, g.H, g.M});
  Tensor grad_queries = new_empty(positions, {g.B, g.H, g.M, g.D});
  Tensor grad_positions = new_empty(positions, {g.B, g.H, g.N, g.D});
  Tensor grad_influence = influence ? new_empty(positions, {g.B, g.H, g.N}) : new_empty(positions, {0});
  Tensor grad_values = empty_rows(values, g.B, g.H, g.N, g.c);
  g.edge_weight = edge_weight.data_ptr();
  g.edge_slope = edge_slope.data_ptr();
  g.edge_influence = influence ? edge_influence.data_ptr() : nullptr;
  g.grad_sigma_rows = grad_sigma_rows.data_ptr();
  g.grad_queries = grad_queries.data_ptr();
  g.grad_positions = grad_positions.data_ptr();
  g.grad_influence = influence ? grad_influence.data_ptr() : nullptr;
  g.grad_values = rows_of(grad_values, "grad_values");

  const int64_t grain = grain_size(g.k * (g.c + g.D));
  parallel_for(0, g.B * g.H * g.M, grain,
               [&](int64_t begin, int64_t end) { DFN_CALL_ISA(gather_backward_queries, g, begin, end); });
  const auto [starts, edges] = transpose_neighbors(indices, g.N);
  g.edge_starts = static_cast<const int64_t*>(starts.data_ptr());
  g.edges = static_cast<const int64_t*>(edges.data_ptr());
  parallel_for(0, g.B * g.H * g.N, grain,
               [&](int64_t begin, int64_t end) { DFN_CALL_ISA(gather_backward_entities, g, begin, end); });
  const std::vector<int64_t> all_but_heads = {0, 2};
  Tensor grad_sigma = torch::stable::sum(grad_sigma_rows, torch::headeronly::IntHeaderOnlyArrayRef(all_but_heads));
  return {grad_positions, grad_queries, grad_values, grad_sigma, grad_influence};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("gaussian_gather(Tensor positions, Tensor queries, Tensor values, Tensor indices, Tensor sigma, "
        "Tensor? influence, bool normalize) -> Tensor");
  m.def("gaussian_gather_backward(Tensor grad, Tensor positions, Tensor queries, Tensor values, Tensor indices, "
        "Tensor sigma, Tensor? influence, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("transpose_neighbors(Tensor indices, int N) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("gaussian_gather", TORCH_BOX(&dfn::forward));
  m.impl("gaussian_gather_backward", TORCH_BOX(&dfn::backward));
  m.impl("transpose_neighbors", TORCH_BOX(&dfn::transpose_neighbors));
}
