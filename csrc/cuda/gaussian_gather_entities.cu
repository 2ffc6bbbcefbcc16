// Gaussian gather, backward by entity: one walk over the edges that point to it gives the gradients of its value, position
// and influence. The list of a hub (many points in one place) is cut into pieces of `hub` edges, which are served like
// entities and leave their sums in `parts`; hubs_kernel adds those up in their order.
#include "cuda/gaussian_gather_rows.h"

namespace dfn::gather {
namespace {

__device__ inline int64_t at(const void* numbers, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

// Edges [begin, end) that point to an entity; -1: none.
struct Run {
  int n = -1;
  int64_t begin = 0, end = 0;
  bool head = false;  // of a piece: the first of its hub
};

__device__ inline Run all_of(const Problem& g, int64_t list, int n) {
  return {n, at(g.starts, g.wide, list * g.N + n), at(g.starts, g.wide, list * g.N + n + 1)};
}

__device__ inline bool has_hubs(const Problem& g) {
  return at(g.starts, g.wide, g.B * g.list_heads * g.N + 1) > g.hub;
}

// A list's edges are cut at multiples of `hub`. Such a stretch holds a part of two hubs at most: pieces 2 i and 2 i + 1
// are those of the hubs that its first and its last edge point to.
__device__ inline Run piece_of(const Problem& g, int64_t list, int64_t piece) {
  const int64_t base = at(g.starts, g.wide, list * g.N), total = at(g.starts, g.wide, (list + 1) * g.N) - base;
  const int64_t from = piece / 2 * g.hub, to = from + g.hub < total ? from + g.hub : total;
  if (from >= total) return {};
  const int64_t inside = piece % 2 ? to - 1 : from;
  int low = 0, high = static_cast<int>(g.N);  // the last entity whose list begins at or before `inside`
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (at(g.starts, g.wide, list * g.N + middle) - base <= inside)
      low = middle;
    else
      high = middle;
  }
  const Run all = all_of(g, list, low);
  const int64_t begin = all.begin - base, end = all.end - base;
  if (end - begin <= g.hub || (piece % 2 && begin <= from)) return {};
  return {low, base + (begin > from ? begin : from), base + (end < to ? end : to), begin >= from};
}

// The most that a group of the warp has.
__device__ __forceinline__ int most_of_groups(int x, int lanes) {
#pragma unroll
  for (int step = 16; step >= 4; step /= 2) {
    const int other = __shfl_xor_sync(kAll, x, step);
    if (step >= lanes && other > x) x = other;
  }
  return x;
}

// A lane looks up S edges at a time. ManyDims: more than a lane keeps sums of.
template <class V, int E, int S, bool ManyDims>
__global__ void __launch_bounds__(32 * kWarps, ManyDims || sizeof(V) == 8 ? 2 : 3)
    entities_kernel(const __grid_constant__ Problem g, const __grid_constant__ Shape t) {
  using A = Real<V>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, l = lane & (t.lanes - 1), own = lane >> t.lane_bits;
  const int c = static_cast<int>(g.c), D = static_cast<int>(g.D), hub = static_cast<int>(g.hub), share = S * t.lanes;
  const Group group(g, blockIdx.x / t.blocks);
  const unsigned block = blockIdx.x - group.number * t.blocks;
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(ptx::shared_memory() + warp * t.warp_bytes);
  A* slopes = reinterpret_cast<A*>(edges + (32 >> t.lane_bits) * t.stride) + own * t.stride;  // with ManyDims
  edges += own * t.stride;

  const bool moves = g.grad_positions || g.grad_influence;
  const Slope<A>* edge_slopes = as<const Slope<A>>(g.slopes) + group.number * g.M * g.k;
  const A* queries = as<const A>(g.queries) + group.number * g.M * g.D;
  const A* positions = as<const A>(g.positions) + group.number * g.N * g.D;
  const char* grads = group.rows<V>(g.grad);
  const A sigma = width_of(as<const A>(g.sigma)[group.h]);
  for (int turn = 0; turn < t.turns; ++turn) {
    const unsigned first = ((block * t.turns + turn) * kWarps + warp) * (32 >> t.lane_bits), number = first + own;
    if (first >= g.pieces + g.N) return;
    Run run;
    const int piece = number < g.pieces ? static_cast<int>(number) : -1;
    if (piece >= 0) {
      if (has_hubs(g)) run = piece_of(g, group.list, number);
    } else if (number < g.pieces + g.N) {
      const int n = static_cast<int>(number - g.pieces);
      run = all_of(g, group.list, g.entity_order ? g.entity_order[group.list * g.N + n] : n);
      if (run.end - run.begin > hub) run = {};
    }
    const int64_t row = group.number * g.N + (run.n < 0 ? 0 : run.n);
    const A* position = row_of(positions, run.n < 0 ? 0 : run.n, t.point_bytes);
    A here[kFewDims] = {};
#pragma unroll
    for (int a = 0; !ManyDims && a < kFewDims; ++a)
      if (g.grad_positions && a < D) here[a] = position[a];
    // Not before they are wanted: registers are few.
    const auto part = [&] { return as<A>(g.parts) + (group.number * g.pieces + piece) * (g.c + g.D + 1); };
    const auto grad_position = [&] { return piece >= 0 ? part() + g.c : as<A>(g.grad_positions) + row * g.D; };
    const auto influence = [&] {  // whom nobody lists may hold NaN
      return piece >= 0 || !g.influence || run.begin == run.end ? A(1) : as<const A>(g.influence)[row];
    };
    const int length = static_cast<int>(run.end - run.begin);  // at most `hub`
    const int longest = most_of_groups(length, t.lanes);
    A grad_near[kFewDims] = {}, grad_influence = 0;
    for (int c0 = 0; c0 == 0 || (g.grad_values.data && c0 < c); c0 += t.lanes * E) {
      const bool live = c0 + l * E < c;
      const char* rows = ptx::as_one(grads + (live ? c0 + l * E : c - E) * int{sizeof(V)});  // beyond the end: read along
      A acc[E] = {};
      for (int start = 0; start < longest; start += share) {
        // All numbers of edges, then all that is known of them, before any of it is used.
        int64_t numbers[S];
        Slope<A> known[S];
        int from[S];
        A near[S][kFewDims] = {};
#pragma unroll
        for (int i = 0; i < S; ++i) {
          const int s = start + i * t.lanes + l;
          numbers[i] = s < length ? at(g.edges, g.wide, run.begin + s) : -1;
        }
#pragma unroll
        for (int i = 0; i < S; ++i) {
          known[i] = {0, 0}, from[i] = -1;
          if (numbers[i] < 0) continue;
          known[i] = edge_slopes[numbers[i]];
          from[i] = static_cast<int>(g.wide ? numbers[i] / g.k : t.by_k.of(static_cast<uint32_t>(numbers[i])));
          const A* q = row_of(queries, from[i], t.point_bytes);
#pragma unroll
          for (int a = 0; !ManyDims && a < kFewDims; ++a)
            if (g.grad_positions && c0 == 0 && a < D) near[i][a] = q[a];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < S; ++i) {
          edges[i * t.lanes + l] = {known[i].weight, from[i]};
          if (ManyDims) slopes[i * t.lanes + l] = known[i].slope;
          if (!moves || c0 > 0) continue;
          grad_influence += known[i].slope;
#pragma unroll
          for (int a = 0; !ManyDims && a < kFewDims; ++a)
            if (known[i].slope != 0) grad_near[a] += known[i].slope * (near[i][a] - here[a]);  // one too far may be infinitely so
        }
        __syncwarp();
        const int left = length - start, count = left < 0 ? 0 : left < share ? left : share;
        if (g.grad_values.data)
          add_all_rows<V, E>(acc, edges, most_of_groups(count, t.lanes), -most_of_groups(-count, t.lanes), rows, t.grad_bytes);
        if (ManyDims && g.grad_positions && c0 == 0)  // a lane for each dimension
          for (int a = l; a < D && run.n >= 0; a += t.lanes) {
            A sum = start > 0 ? grad_position()[a] : A(0);
            for (int s = 0; s < count; ++s)
              if (slopes[s] != 0) sum += slopes[s] * (row_of(queries, edges[s].row, t.point_bytes)[a] - position[a]);
            grad_position()[a] = sum;
          }
      }
      if (run.n < 0 || !live || !g.grad_values.data) continue;
      const A factor = influence();
#pragma unroll
      for (int i = 0; i < E; ++i) {
        if (piece >= 0)
          part()[c0 + l * E + i] = acc[i];
        else
          acc[i] *= factor;
      }
      if (piece < 0)
        Unit<V, E>::store(row_of(group.rows<V>(g.grad_values), run.n, t.grad_value_bytes) + (c0 + l * E) * int{sizeof(V)}, acc);
    }

    if (!moves) continue;
    if (g.grad_influence) grad_influence = sum_over(grad_influence, t.lanes);
#pragma unroll
    for (int a = 0; !ManyDims && a < kFewDims; ++a) grad_near[a] = sum_over(grad_near[a], t.lanes);
    if (run.n < 0) continue;
    const A scale = piece >= 0 ? A(1) : influence() / (sigma * sigma);
    if (ManyDims) {
      for (int a = l; g.grad_positions && a < D; a += t.lanes)
        grad_position()[a] = longest == 0 ? A(0) : grad_position()[a] * scale;
    } else if (g.grad_positions && l == 0) {
#pragma unroll
      for (int a = 0; a < kFewDims; ++a)
        if (a < D) grad_position()[a] = grad_near[a] * scale;
    }
    if (l > 0) continue;
    if (piece >= 0)
      part()[g.c + g.D] = grad_influence;
    else if (g.grad_influence)
      as<A>(g.grad_influence)[row] = grad_influence;
  }
}

constexpr int kHubThreads = 256;

// A block for each piece that is the first of a hub; what the pieces lack, influence and sigma, comes here.
template <class V>
__global__ void __launch_bounds__(kHubThreads) hubs_kernel(const __grid_constant__ Problem g) {
  using A = Real<V>;
  if (!has_hubs(g)) return;
  const int64_t room = g.c + g.D + 1;
  for (int64_t number = blockIdx.x; number < g.B * g.H * g.pieces; number += gridDim.x) {
    const Group group(g, static_cast<unsigned>(number / g.pieces));
    const int64_t first = number % g.pieces;
    const Run run = piece_of(g, group.list, first);
    if (run.n < 0 || !run.head) continue;
    const int64_t end = all_of(g, group.list, run.n).end - at(g.starts, g.wide, int64_t{group.list} * g.N);
    const A* parts = as<const A>(g.parts) + group.number * g.pieces * room;
    const A influence = g.influence ? as<const A>(g.influence)[group.number * g.N + run.n] : A(1);
    const A sigma = width_of(as<const A>(g.sigma)[group.h]);
    for (int64_t x = threadIdx.x; x < room; x += kHubThreads) {
      const bool value = x < g.c, position = !value && x < g.c + g.D;
      if (value ? !g.grad_values.data : position ? !g.grad_positions : !g.grad_influence) continue;
      A sum = parts[first * room + x];
      for (int64_t next = first / 2 + 1; next * g.hub < end; ++next) sum += parts[2 * next * room + x];
      if (value)
        narrow(sum * influence, reinterpret_cast<V*>(group.rows<V>(g.grad_values))[run.n * g.grad_values.sN + x]);
      else if (position)
        as<A>(g.grad_positions)[(group.number * g.N + run.n) * g.D + x - g.c] = sum * (influence / (sigma * sigma));
      else
        as<A>(g.grad_influence)[group.number * g.N + run.n] = sum;
    }
  }
}

}  // namespace

void backward_entities(const Problem& g) {
  for_dtype(g, [&](auto v, auto elements) {
    using V = decltype(v);
    using A = Real<V>;
    constexpr int E = decltype(elements)::value;
    Shape t = with_strides<V>(g);
    t.lanes = power_of_two((g.c + E - 1) / E, 4, 32), t.lane_bits = logarithm(t.lanes);
    const int groups = 32 / t.lanes;
    const auto run = [&](auto share, auto many) {
      constexpr int S = decltype(share)::value;
      constexpr bool ManyDims = decltype(many)::value;
      t.stride = t.lanes * S + 2;
      t.warp_bytes = (groups * t.stride * static_cast<int>(sizeof(Edge<A>) + (ManyDims ? sizeof(A) : 0)) + 15) / 16 * 16;
      t.turns = turns_of(g.B * g.H * ((g.N + g.pieces - 1) / (kWarps * groups) + 1));
      const int64_t block = int64_t{kWarps} * groups * t.turns;
      t.blocks = static_cast<unsigned>((g.N + g.pieces + block - 1) / block);
      launch("gaussian_gather", entities_kernel<V, E, S, ManyDims>,
             Grid{g.B * g.H * t.blocks, 32 * kWarps, static_cast<size_t>(kWarps) * t.warp_bytes, g.stream}, g, t);
    };
    if (g.D > kFewDims)
      run(Number<3>{}, std::true_type{});
    else  // a list is not much longer than 16, most of the time
      for_share<3, E == 1>(groups, [&](auto share) { run(share, std::false_type{}); });
    const int64_t all = g.B * g.H * g.pieces, most = int64_t{8} * multiprocessors();
    if (all > 0) launch("gaussian_gather", hubs_kernel<V>,
                        Grid{all < most ? all : most, kHubThreads, 0, g.stream}, g);
  });
}

}  // namespace dfn::gather
