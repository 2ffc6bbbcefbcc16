// dfn_cuda's operators of the gather: from torch's tensors to the kernels. Arguments as in the CPU's operators of the same
// names; dfn_kernels/cuda/gaussian_gather.py calls them.
#include "cuda/gaussian_gather.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/tensors.h"
#include "cuda/device.h"

namespace dfn::gather {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

constexpr int64_t kInt = (int64_t{1} << 31) - 1;

Rows check_rows(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_shape(t, name, shape);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected the dtype of values");
  // the kernels multiply a row's number by 32 bits
  STD_TORCH_CHECK(t.stride(2) * 8 <= kInt || t.numel() == 0 || t.size(2) <= 1, name, ": rows are too far apart");
  return rows_of(t, name);
}

Problem describe(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices, const Tensor& sigma,
                 const std::optional<Tensor>& influence, const std::optional<Tensor>& sq_dists,
                 const std::optional<Tensor>& query_order, bool normalize, const OnDevice& device) {
  STD_TORCH_CHECK(positions.dim() == 4 && values.dim() == 4 && indices.dim() == 4, "expected 4 dimensions");
  Problem g = {};
  g.dtype = dtype_of(values);
  const ScalarType real = g.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  g.normalize = normalize;
  g.B = positions.size(0), g.H = positions.size(1), g.N = positions.size(2), g.D = positions.size(3);
  g.list_heads = indices.size(1), g.M = indices.size(2), g.k = indices.size(3), g.c = values.size(3);
  STD_TORCH_CHECK(g.list_heads == g.H || g.list_heads == 1, "indices: expected one list for each head, or one for all");
  STD_TORCH_CHECK(g.N <= kInt && g.M <= kInt && g.c <= kInt, "gaussian_gather: a size is above 2^31 - 1");
  STD_TORCH_CHECK(g.k <= 1 << 20 && g.D <= 1 << 20, "gaussian_gather: expected at most 2^20 neighbours and dimensions");
  STD_TORCH_CHECK(g.H * g.c <= kInt / 8, "values: expected fewer channels: rows of the output are too far apart");
  check_dense(positions, "positions", real, {g.B, g.H, g.N, g.D});
  check_dense(queries, "queries", real, {g.B, g.H, g.M, g.D});
  check_dense(indices, "indices", ScalarType::Long, {g.B, g.list_heads, g.M, g.k});
  check_dense(sigma, "sigma", real, {g.H});
  g.values = check_rows(values, "values", {g.B, g.H, g.N, g.c}, values.scalar_type());
  g.positions = positions.data_ptr(), g.queries = queries.data_ptr(), g.sigma = sigma.data_ptr();
  g.indices = static_cast<const int64_t*>(indices.data_ptr());
  if (influence) {
    check_dense(*influence, "influence", real, {g.B, g.H, g.N});
    g.influence = influence->data_ptr();
  }
  if (sq_dists) {
    check_dense(*sq_dists, "sq_dists", real, {g.B, g.H, g.M, g.k});
    g.sq_dists = sq_dists->data_ptr();
  }
  if (query_order) {
    check_dense(*query_order, "query_order", ScalarType::Int, {g.B, g.list_heads, g.M});
    g.query_order = static_cast<const int32_t*>(query_order->data_ptr());
  }
  g.stream = device.stream();
  return g;
}

Tensor forward_op(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices, const Tensor& sigma,
                  const std::optional<Tensor>& influence, const std::optional<Tensor>& sq_dists,
                  const std::optional<Tensor>& query_order, bool normalize) {
  const OnDevice device(values);
  Problem g = describe(positions, queries, values, indices, sigma, influence, sq_dists, query_order, normalize, device);
  Tensor out = empty_rows(values, g.B, g.H, g.M, g.c);
  if (out.numel() == 0) return out;
  if (g.k * g.N == 0) return torch::stable::zero_(out);
  g.out = rows_of(out, "out");
  forward(g);
  return out;
}

bool is_wide(int64_t numbers) { return numbers > kInt; }
ScalarType number_type(bool wide) { return wide ? ScalarType::Long : ScalarType::Int; }

// A list of more than `hub` edges is cut, and its pieces are served side by side.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_op(
    const Tensor& grad, const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
    const Tensor& sigma, const std::optional<Tensor>& influence, const std::optional<Tensor>& sq_dists,
    const std::optional<Tensor>& query_order, const std::optional<Tensor>& entity_order, const std::optional<Tensor>& starts,
    const std::optional<Tensor>& edges, bool normalize, int64_t wanted, int64_t hub) {
  const OnDevice device(values);
  Problem g = describe(positions, queries, values, indices, sigma, influence, sq_dists, query_order, normalize, device);
  const bool by_entity = wanted & (1 | 4 | 16);
  g.grad = check_rows(grad, "grad", {g.B, g.H, g.M, g.c}, values.scalar_type());
  const auto nothing = [&] { return new_empty(positions, {0}); };  // one each: outputs may not share memory
  Tensor grad_positions = wanted & 1 ? new_empty(positions, {g.B, g.H, g.N, g.D}) : nothing();
  Tensor grad_queries = wanted & 2 ? new_empty(positions, {g.B, g.H, g.M, g.D}) : nothing();
  Tensor grad_values = wanted & 4 ? empty_rows(values, g.B, g.H, g.N, g.c) : new_empty(values, {0});
  Tensor grad_sigma = wanted & 8 ? new_empty(positions, {g.B, g.H, g.M}) : nothing();  // by query, to be summed
  Tensor grad_influence = influence && wanted & 16 ? new_empty(positions, {g.B, g.H, g.N}) : nothing();
  const auto result = [&] {
    const int64_t all_but_heads[] = {0, 2};
    if (wanted & 8) grad_sigma = torch::stable::sum(grad_sigma, torch::headeronly::IntHeaderOnlyArrayRef(all_but_heads, 2));
    return std::make_tuple(grad_positions, grad_queries, grad_values, grad_sigma, grad_influence);
  };
  if (g.B * g.H * g.N * g.M * g.k * g.c == 0) {
    for (Tensor* t : {&grad_positions, &grad_queries, &grad_values, &grad_sigma, &grad_influence})
      if (t->numel() > 0) torch::stable::zero_(*t);
    return result();
  }

  if (wanted & 2) g.grad_queries = grad_queries.data_ptr();
  if (wanted & 8) g.grad_sigma_rows = grad_sigma.data_ptr();
  // Chunks of neighbours leave <gradient, value> in `slopes` on their way.
  const bool keeps_slopes = by_entity || g.k > kMostSlots;
  Tensor slopes = new_empty(positions, {keeps_slopes ? g.B : 0, g.H, g.M, g.k, 2});
  if (keeps_slopes) g.slopes = slopes.data_ptr();
  const Rows gradient = g.grad;
  if ((wanted & ~4) == 0) g.grad = {};  // weights are enough
  if (wanted) backward_queries(g);
  if (!by_entity) return result();

  STD_TORCH_CHECK(starts && edges, "starts, edges: expected, for gradients of entities");
  STD_TORCH_CHECK(hub > 0 && hub <= kInt, "hub: expected a positive number");
  const int64_t lists = g.B * g.list_heads;
  g.wide = is_wide(lists * g.M * g.k);
  check_dense(*starts, "starts", number_type(g.wide), {lists * g.N + 2});
  check_dense(*edges, "edges", number_type(g.wide), {g.B, g.list_heads, g.M, g.k});
  g.starts = starts->data_ptr(), g.edges = edges->data_ptr();
  if (entity_order) {
    check_dense(*entity_order, "entity_order", ScalarType::Int, {g.B, g.list_heads, g.N});
    g.entity_order = static_cast<const int32_t*>(entity_order->data_ptr());
  }
  g.grad = gradient;
  g.hub = hub;
  g.pieces = g.M * g.k > hub ? 2 * ((g.M * g.k + hub - 1) / hub) : 0;
  Tensor parts = new_empty(positions, {g.B, g.H, g.pieces, g.c + g.D + 1});
  g.parts = parts.data_ptr();
  if (wanted & 1) g.grad_positions = grad_positions.data_ptr();
  if (wanted & 4) g.grad_values = rows_of(grad_values, "grad_values");
  if (influence && wanted & 16) g.grad_influence = grad_influence.data_ptr();
  backward_entities(g);
  return result();
}

// ---- what calls with the same neighbours share ----------------------------------------------------------------------
// For each of [B, lists] lists of `things` targets: starts, and edges of the shape of targets. Their layout: Problem.
std::tuple<Tensor, Tensor> listed(const Tensor& targets, int64_t places, const int32_t* order, const OnDevice& device) {
  Lists g = {};
  g.order = order, g.per = targets.dim() == 4 ? targets.size(3) : 1;
  g.lists = targets.size(0) * targets.size(1), g.places = places;
  g.things = targets.dim() == 4 ? targets.size(2) * targets.size(3) : targets.size(2);
  g.wide = is_wide(g.lists * g.things);
  const ScalarType number = number_type(g.wide);
  g.targets = targets.data_ptr(), g.narrow_targets = targets.scalar_type() == ScalarType::Int;
  g.stream = device.stream();
  Tensor counts = new_zeros(targets, {g.lists * places}, number), tiles = new_empty(targets, {2, scan_tiles(g)}, number);
  Tensor starts = new_empty(targets, {g.lists * places + 2}, number), scratch = new_empty(targets, {g.lists * g.things}, number);
  // Neighbours may be missing; then zeros are left at the end, so that equal inputs give equal outputs.
  Tensor edges = targets.dim() == 4 ? new_zeros(targets, {targets.size(0), targets.size(1), targets.size(2), targets.size(3)}, number)
                                    : new_empty(targets, {targets.size(0), targets.size(1), targets.size(2)}, number);
  g.counts = counts.data_ptr(), g.tiles = tiles.data_ptr(), g.starts = starts.data_ptr();
  g.scratch = scratch.data_ptr(), g.edges = edges.data_ptr();
  make_lists(g);
  return {starts, edges};
}

std::tuple<Tensor, Tensor> lists_op(const Tensor& indices, int64_t N, const std::optional<Tensor>& query_order) {
  const OnDevice device(indices);
  STD_TORCH_CHECK(indices.dim() == 4 && N >= 0 && N <= kInt, "indices: expected 4 dimensions");
  check_dense(indices, "indices", ScalarType::Long, {indices.size(0), indices.size(1), indices.size(2), indices.size(3)});
  if (query_order) check_dense(*query_order, "query_order", ScalarType::Int, {indices.size(0), indices.size(1), indices.size(2)});
  return listed(indices, N, query_order ? static_cast<const int32_t*>(query_order->data_ptr()) : nullptr, device);
}

// points [B, lists, n, D] -> [B, lists, n] int32
Tensor order_op(const Tensor& points) {
  const OnDevice device(points);
  STD_TORCH_CHECK(points.dim() == 4, "points: expected 4 dimensions");
  Cells g = {};
  g.dtype = dtype_of(points);
  STD_TORCH_CHECK(g.dtype == Dtype::f32 || g.dtype == Dtype::f64, "points: expected float32 or float64");
  g.lists = points.size(0) * points.size(1), g.n = points.size(2), g.D = points.size(3);
  check_dense(points, "points", points.scalar_type(), {points.size(0), points.size(1), g.n, g.D});
  STD_TORCH_CHECK(g.D > 0 && g.lists * g.n > 0 && !is_wide(g.lists * g.n), "points: expected some, fewer than 2^31");
  const int dims = static_cast<int>(std::min<int64_t>(g.D, 3));
  for (g.bits = 1; (g.bits + 1) * dims <= 24 && (int64_t{4} << (g.bits * dims)) < g.n;) ++g.bits;  // about four points in a cell
  Tensor bounds = new_empty(points, {g.lists, 6}, ScalarType::Double);
  Tensor cells = new_empty(points, {points.size(0), points.size(1), g.n}, ScalarType::Int);
  g.points = points.data_ptr(), g.bounds = static_cast<double*>(bounds.data_ptr());
  g.cells = static_cast<int32_t*>(cells.data_ptr()), g.stream = device.stream();
  find_cells(g);
  return std::get<1>(listed(cells, int64_t{1} << (g.bits * dims), nullptr, device));
}

}  // namespace
}  // namespace dfn::gather

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cuda, m) {
  m.def("gaussian_gather(Tensor positions, Tensor queries, Tensor values, Tensor indices, Tensor sigma, Tensor? influence, "
        "Tensor? sq_dists, Tensor? query_order, bool normalize) -> Tensor");
  m.def("gaussian_gather_backward(Tensor grad, Tensor positions, Tensor queries, Tensor values, Tensor indices, Tensor sigma, "
        "Tensor? influence, Tensor? sq_dists, Tensor? query_order, Tensor? entity_order, Tensor? starts, Tensor? edges, "
        "bool normalize, int wanted, int hub) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gather_lists(Tensor indices, int N, Tensor? query_order) -> (Tensor, Tensor)");
  m.def("gather_order(Tensor points) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cuda, DFN_DEVICE, m) {
  m.impl("gaussian_gather", TORCH_BOX(&dfn::gather::forward_op));
  m.impl("gaussian_gather_backward", TORCH_BOX(&dfn::gather::backward_op));
  m.impl("gather_lists", TORCH_BOX(&dfn::gather::lists_op));
  m.impl("gather_order", TORCH_BOX(&dfn::gather::order_op));
}
