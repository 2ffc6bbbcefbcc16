// dfn_cpu::gaussian_gather and its backward: heads and batches around the kernels, which know one of each.
#include "cpu/gaussian_gather/gaussian_gather.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/gaussian_gather/neighbors.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// What an earlier call or the search has found out already; null where it has not. For each batch and each head with
// indices of its own ("list").
struct Reuse {
  const int32_t *query_order, *entity_order;  // [B, lists, M], [B, lists, N]
  const int64_t* starts;                      // [B, lists, N + 1], see neighbors.h
  const void* slots;                          // [B, lists, M, k] uint32, or int64 from 2^32 edges on
};

// All batches and heads; problem(b * H + h) is one of them.
struct Gather {
  // Tensors begin with [B, H], or with fewer dimensions where there are no heads, or no batch either: B = H = 1. (Views
  // would make them alike, and take longer than a small problem does.)
  int64_t lead, B, H, heads_of_indices;
  GatherProblem common = {};
  Rows values = {}, out = {}, grad = {}, grad_values = {};
  Reuse reuse = {};
  void *grad_positions = nullptr, *grad_queries = nullptr, *grad_sigma_rows = nullptr, *grad_influence = nullptr;
  std::vector<double> sigmas;  // [H]

  int64_t groups() const { return B * H; }
  void check(const Tensor& t, const char* name, ScalarType dtype, int64_t heads, std::initializer_list<int64_t> sizes) const {
    const int64_t after = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(t.dim() == lead + after, name, ": expected ", lead + after, " dimensions, got ", t.dim());
    STD_TORCH_CHECK((lead < 1 || t.size(0) == B) && (lead < 2 || t.size(1) == heads), name, ": unexpected batch or heads");
    int64_t axis = lead;
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " in dimension ", axis, ", got ", t.size(axis));
      ++axis;
    }
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": unexpected dtype");
  }
  void check_dense(const Tensor& t, const char* name, ScalarType dtype, int64_t heads, std::initializer_list<int64_t> sizes) const {
    check(t, name, dtype, heads, sizes);
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  }
  // [B, H, n, c], stored as [B, n, H, c] if there are heads
  Tensor empty_rows(const Tensor& like, int64_t n, int64_t c) const {
    return lead == 2 ? dfn::empty_rows(like, B, H, n, c) : lead == 1 ? allocate(like, {B, n, c}) : allocate(like, {n, c});
  }
  Tensor empty(const Tensor& like, int64_t n, int64_t c) const {
    return lead == 2 ? allocate(like, {B, H, n, c}) : empty_rows(like, n, c);
  }
  Tensor empty(const Tensor& like, int64_t n) const {
    return lead == 2 ? allocate(like, {B, H, n}) : lead == 1 ? allocate(like, {B, n}) : allocate(like, {n});
  }
  int64_t index_group(int64_t group) const { return heads_of_indices == 1 ? group / H : group; }

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
    g.sq_dists = at(g.sq_dists, group * g.M * g.k);
    const int64_t list = index_group(group), edges = list * g.M * g.k;
    g.indices = common.indices + edges;
    if (reuse.query_order) g.query_order = reuse.query_order + list * g.M;
    if (reuse.entity_order) g.entity_order = reuse.entity_order + list * g.N;
    if (reuse.starts) {
      g.starts = reuse.starts + list * (g.N + 1);
      if (g.M * g.k >> 32) g.slots64 = static_cast<const int64_t*>(reuse.slots) + edges;
      else g.slots = static_cast<const uint32_t*>(reuse.slots) + edges;
    }
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
                const Tensor& sigma, const std::optional<Tensor>& influence, const std::optional<Tensor>& sq_dists,
                const std::optional<Tensor>& query_order, bool normalize) {
  Gather all = {};
  GatherProblem& g = all.common;
  all.values = rows_of(values, "values");
  const int64_t lead = all.lead = values.dim() - 2;
  STD_TORCH_CHECK(positions.dim() == values.dim() && indices.dim() == values.dim(), "positions and indices: expected the dimensions of values");
  const int64_t B = all.B = lead > 0 ? positions.size(0) : 1, H = all.H = lead > 1 ? positions.size(1) : 1;
  g.N = positions.size(lead), g.D = positions.size(lead + 1);
  g.M = indices.size(lead), g.k = indices.size(lead + 1), g.c = values.size(lead + 1);
  g.dtype = dtype_of(values);
  g.accumulate = dtype_of(positions);
  STD_TORCH_CHECK((g.accumulate == Dtype::f64) == (g.dtype == Dtype::f64) &&
                      (g.accumulate == Dtype::f64 || g.accumulate == Dtype::f32),
                  "positions: expected float64 with float64 values, else float32");
  STD_TORCH_CHECK(g.N >> 32 == 0 && g.M >> 32 == 0, "positions: expected fewer than 2^32");
  const auto real = positions.scalar_type();
  all.heads_of_indices = lead < 2 || indices.size(1) == 1 ? 1 : H;
  all.check_dense(positions, "positions", real, H, {g.N, g.D});
  all.check_dense(queries, "query_positions", real, H, {g.M, g.D});
  all.check(values, "values", values.scalar_type(), H, {g.N, g.c});
  all.check_dense(indices, "indices", ScalarType::Long, all.heads_of_indices, {g.M, g.k});
  check_dense(sigma, "sigma", real, {H});
  if (influence) all.check_dense(*influence, "influence", real, H, {g.N});
  if (sq_dists) all.check_dense(*sq_dists, "sq_dists", real, H, {g.M, g.k});
  if (query_order) check_dense(*query_order, "query_order", ScalarType::Int, {B, all.heads_of_indices, g.M});
  g.normalize = normalize;
  g.positions = positions.data_ptr();
  g.queries = queries.data_ptr();
  g.indices = static_cast<const int64_t*>(indices.data_ptr());
  g.influence = influence ? influence->data_ptr() : nullptr;
  g.sq_dists = sq_dists ? sq_dists->data_ptr() : nullptr;
  all.reuse.query_order = query_order ? static_cast<const int32_t*>(query_order->data_ptr()) : nullptr;
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

// Finds for each problem the orders that it lacks: those that find neighbours in the cache.
class Orders {
 public:
  Orders(std::vector<GatherProblem>& problems, bool entities) : of_queries_(problems.size()), of_entities_(problems.size()) {
    parallel_for(0, static_cast<int64_t>(problems.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        GatherProblem& g = problems[i];
        const int64_t bytes = g.c * size_of(g.dtype);
        if (g.k < 2) continue;
        if (!g.query_order) {
          of_queries_[i] = spatial_order(g.queries, g.accumulate, g.M, g.D, bytes);
          g.query_order = of_queries_[i].empty() ? nullptr : of_queries_[i].data();
        }
        if (!entities || g.entity_order || g.starts) continue;
        if (g.positions != g.queries) of_entities_[i] = spatial_order(g.positions, g.accumulate, g.N, g.D, bytes);
        g.entity_order = g.positions == g.queries   ? g.query_order
                         : of_entities_[i].empty() ? nullptr
                                                   : of_entities_[i].data();
      }
    });
  }

 private:
  std::vector<std::vector<int32_t>> of_queries_, of_entities_;
};

Tensor forward(const Tensor& positions, const Tensor& queries, const Tensor& values, const Tensor& indices,
               const Tensor& sigma, const std::optional<Tensor>& influence, const std::optional<Tensor>& sq_dists,
               const std::optional<Tensor>& query_order, bool normalize) {
  Gather all = describe(positions, queries, values, indices, sigma, influence, sq_dists, query_order, normalize);
  const GatherProblem& g = all.common;
  Tensor out = all.empty_rows(values, g.M, g.c);
  prefer_huge_pages(out);
  all.out = rows_of(out, "out");
  std::vector<GatherProblem> problems;
  for (int64_t group = 0; group < all.groups(); ++group) problems.push_back(all.problem(group));
  const Orders orders(problems, false);
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
    Tensor sums = allocate(like, {pieces, size});
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
    const Tensor& sigma, const std::optional<Tensor>& influence, const std::optional<Tensor>& sq_dists,
    const std::optional<Tensor>& query_order, const std::optional<Tensor>& entity_order,
    const std::optional<Tensor>& starts, const std::optional<Tensor>& slots, bool normalize, int64_t wanted) {
  Gather all = describe(positions, queries, values, indices, sigma, influence, sq_dists, query_order, normalize);
  GatherProblem& common = all.common;
  const int64_t B = all.B, H = all.H;
  const auto [N, M, D, c, k] = std::tuple(common.N, common.M, common.D, common.c, common.k);
  all.check(grad, "grad", values.scalar_type(), H, {M, c});
  if (entity_order) {
    check_dense(*entity_order, "entity_order", ScalarType::Int, {B, all.heads_of_indices, N});
    all.reuse.entity_order = static_cast<const int32_t*>(entity_order->data_ptr());
  }
  if (starts) {
    STD_TORCH_CHECK(slots && query_order && entity_order, "starts, slots, query_order, entity_order: expected together");
    check_dense(*starts, "starts", ScalarType::Long, {B, all.heads_of_indices, N + 1});
    check_dense(*slots, "slots", M * k >> 32 ? ScalarType::Long : ScalarType::Int, {B, all.heads_of_indices, M, k});
    all.reuse.starts = static_cast<const int64_t*>(starts->data_ptr());
    all.reuse.slots = slots->data_ptr();
  }
  all.grad = rows_of(grad, "grad");
  const auto nothing = [&] { return allocate(positions, {0}); };  // one each: outputs may not share memory
  Tensor grad_positions = wanted & 1 ? all.empty(positions, N, D) : nothing();
  Tensor grad_queries = wanted & 2 ? all.empty(positions, M, D) : nothing();
  Tensor grad_values = wanted & 4 ? all.empty_rows(values, N, c) : allocate(values, {0});
  Tensor grad_sigma_rows = wanted & 8 ? allocate(positions, {B, H, M}) : nothing();
  Tensor grad_influence = influence && wanted & 16 ? all.empty(positions, N) : nothing();
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
    std::vector<Incoming> incoming(count);  // of the groups' indices, which heads may share
    if (of_entities) {
      const auto first_of_list = [&](int64_t i) {
        return i == 0 || all.index_group(from + i) != all.index_group(from + i - 1);
      };
      parallel_for(0, starts ? 0 : count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          if (first_of_list(i))
            incoming[i] = incoming_edges(problems[i].indices, M, k, N, problems[i].query_order, problems[i].entity_order);
      });
      for (int64_t i = 0, source = 0; i < count; ++i) {
        GatherProblem& g = problems[i];
        g.edges = edges.data() + i * edges_each * edge_size;
        if (starts) continue;
        if (first_of_list(i)) source = i;
        g.query_order = problems[source].query_order;  // the numbers are by turn
        g.entity_order = problems[source].entity_order;
        g.starts = incoming[source].starts.data();
        g.slots = incoming[source].slots.data();
        g.slots64 = incoming[source].slots64.data();
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

// ---- what calls with the same neighbours can share ----------------------------------------------------------------
template <class A>
A* list_of(const Tensor& t, int64_t list, int64_t size) {
  return static_cast<A*>(t.data_ptr()) + list * size;
}

// points [B, lists, n, D] -> [B, lists, n] int32
Tensor order_op(const Tensor& points) {
  STD_TORCH_CHECK(points.dim() == 4, "points: expected 4 dimensions");
  const int64_t lists = points.size(0) * points.size(1), n = points.size(2), D = points.size(3);
  const auto real = points.scalar_type();
  STD_TORCH_CHECK(real == ScalarType::Float || real == ScalarType::Double, "points: expected float32 or float64");
  check_dense(points, "points", real, {points.size(0), points.size(1), n, D});
  STD_TORCH_CHECK(n >> 31 == 0, "points: expected fewer than 2^31");
  Tensor order = allocate(points, {points.size(0), points.size(1), n}, ScalarType::Int);
  const int64_t item = real == ScalarType::Double ? 8 : 4;
  parallel_for(0, lists, 1, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list) {
      const void* data = static_cast<const char*>(points.data_ptr()) + list * n * D * item;
      const std::vector<int32_t> found = spatial_order(data, dtype_of(points), n, D, int64_t(1) << 19);
      int32_t* out = list_of<int32_t>(order, list, n);
      if (found.empty())
        std::iota(out, out + n, 0);
      else
        std::copy(found.begin(), found.end(), out);
    }
  });
  return order;
}

// indices [B, lists, M, k] and both orders -> starts, slots as in Reuse
std::tuple<Tensor, Tensor> lists_op(const Tensor& indices, const Tensor& query_order, const Tensor& entity_order) {
  STD_TORCH_CHECK(indices.dim() == 4 && entity_order.dim() == 3, "indices: expected 4 dimensions");
  const int64_t B = indices.size(0), H = indices.size(1), M = indices.size(2), k = indices.size(3);
  const int64_t N = entity_order.size(2);
  check_dense(indices, "indices", ScalarType::Long, {B, H, M, k});
  check_dense(query_order, "query_order", ScalarType::Int, {B, H, M});
  check_dense(entity_order, "entity_order", ScalarType::Int, {B, H, N});
  const bool wide = M * k >> 32;
  Tensor starts = allocate(indices, {B, H, N + 1}, ScalarType::Long);
  Tensor slots = allocate(indices, {B, H, M, k}, wide ? ScalarType::Long : ScalarType::Int);
  parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list) {
      const Incoming in = incoming_edges(list_of<int64_t>(indices, list, M * k), M, k, N,
                                         list_of<int32_t>(query_order, list, M), list_of<int32_t>(entity_order, list, N));
      std::copy_n(in.starts.data(), N + 1, list_of<int64_t>(starts, list, N + 1));
      if (wide)
        std::copy_n(in.slots64.data(), M * k, list_of<int64_t>(slots, list, M * k));
      else
        std::copy_n(in.slots.data(), M * k, list_of<uint32_t>(slots, list, M * k));
    }
  });
  return {starts, slots};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("gaussian_gather(Tensor positions, Tensor queries, Tensor values, Tensor indices, Tensor sigma, "
        "Tensor? influence, Tensor? sq_dists, Tensor? query_order, bool normalize) -> Tensor");
  m.def("gaussian_gather_backward(Tensor grad, Tensor positions, Tensor queries, Tensor values, Tensor indices, "
        "Tensor sigma, Tensor? influence, Tensor? sq_dists, Tensor? query_order, Tensor? entity_order, Tensor? starts, "
        "Tensor? slots, bool normalize, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("spatial_order(Tensor points) -> Tensor");
  m.def("transpose_neighbors(Tensor indices, Tensor query_order, Tensor entity_order) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("gaussian_gather", TORCH_BOX(&dfn::forward));
  m.impl("gaussian_gather_backward", TORCH_BOX(&dfn::backward));
  m.impl("spatial_order", TORCH_BOX(&dfn::order_op));
  m.impl("transpose_neighbors", TORCH_BOX(&dfn::lists_op));
}
