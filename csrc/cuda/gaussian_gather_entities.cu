// Gaussian gather, backward by entity: one walk over the edges that point to it gives the gradients of its value, position
// and influence. The list of a hub (many points in one place) is cut into pieces of `hub` edges, which are served like
// entities and leave their sums in `parts`; hubs_kernel adds those up in their order. Compiled, run in the tests' emulator,
// not yet run on a GPU; the prototype of entities_kernel was.
#include "cuda/gaussian_gather_rows.h"

namespace dfn::gather {
namespace {

constexpr int kFewDims = 3;  // whose sums a lane keeps in registers

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

// ManyDims: more than a lane keeps sums of.
template <class V, int E, bool ManyDims>
__global__ void __launch_bounds__(32 * kWarps, ManyDims || E == 4 ? 2 : 3)
    entities_kernel(const __grid_constant__ Problem g, const __grid_constant__ Shape t) {
  using A = Real<V>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, l = lane % t.lanes, own = lane / t.lanes, groups = 32 / t.lanes;
  const int group = static_cast<int>(blockIdx.x / t.blocks);
  const int64_t list = group / g.H * g.list_heads + group % g.H % g.list_heads;
  const int64_t turn = (blockIdx.x % t.blocks * kWarps + warp) * groups + own;
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(ptx::shared_memory() + warp * t.warp_bytes);
  A* slopes = reinterpret_cast<A*>(edges + groups * t.stride) + own * t.stride;
  edges += own * t.stride;

  Run run;
  const int piece = turn < g.pieces ? static_cast<int>(turn) : -1;
  if (piece >= 0) {
    if (has_hubs(g)) run = piece_of(g, list, turn);
  } else if (turn < g.pieces + g.N) {
    const int n = static_cast<int>(turn - g.pieces);
    run = all_of(g, list, g.entity_order ? g.entity_order[list * g.N + n] : n);
    if (run.end - run.begin > g.hub) run = {};
  }
  const bool moves = g.grad_positions || g.grad_influence;
  const Slope<A>* edge_slopes = as<const Slope<A>>(g.slopes) + int64_t{group} * g.M * g.k;
  const A* queries = as<const A>(g.queries) + int64_t{group} * g.M * g.D;
  const int64_t row = int64_t{group} * g.N + (run.n < 0 ? 0 : run.n);
  const A* position = as<const A>(g.positions) + row * g.D;
  // Not before they are wanted: registers are few.
  const auto part = [&] { return as<A>(g.parts) + (int64_t{group} * g.pieces + piece) * (g.c + g.D + 1); };
  const auto grad_position = [&] { return piece >= 0 ? part() + g.c : as<A>(g.grad_positions) + row * g.D; };
  const auto influence = [&] {  // whom nobody lists may hold NaN
    return piece >= 0 || !g.influence || run.begin == run.end ? A(1) : as<const A>(g.influence)[row];
  };
  const int length = static_cast<int>(run.end - run.begin);  // at most `hub`
  int longest = length;
  for (int step = t.lanes; step < 32; step *= 2) {
    const int other = __shfl_xor_sync(kAll, longest, step);
    longest = other > longest ? other : longest;
  }
  A grad_near[kFewDims] = {}, grad_influence = 0;
  for (int c0 = 0; c0 == 0 || (g.grad_values.data && c0 < g.c); c0 += t.lanes * E) {
    const bool live = c0 + l * E < g.c;
    const int channel = live ? c0 + l * E : 0;
    const char* rows = unit_of<V>(g.grad, group, g.H, channel);
    const uint32_t row_bytes = static_cast<uint32_t>(g.grad.sN * sizeof(V));
    A acc[E] = {};
    for (int start = 0; start < longest; start += t.lanes) {
      Edge<A> edge = {0, -1};
      A slope = 0;
      if (start + l < length) {
        const int64_t number = at(g.edges, g.wide, run.begin + start + l);
        edge.row = g.wide ? static_cast<int>(number / g.k) : static_cast<int>(static_cast<uint32_t>(number) / static_cast<uint32_t>(g.k));
        const Slope<A> known = edge_slopes[number];
        edge.weight = known.weight, slope = known.slope;
        if (moves && c0 == 0) {
          grad_influence += slope;
          if (!ManyDims && g.grad_positions) {
            const A* q = queries + edge.row * g.D;
#pragma unroll
            for (int a = 0; a < kFewDims; ++a)
              if (a < g.D && slope != 0) grad_near[a] += slope * (q[a] - position[a]);  // one too far may be infinitely so
          }
        }
      }
      edges[l] = edge, slopes[l] = slope;
      __syncwarp();
      const int left = length - start, count = left < 0 ? 0 : left < t.lanes ? left : t.lanes;
      if (g.grad_values.data) {
        int most = count, least = count;
        for (int step = t.lanes; step < 32; step *= 2) {
          const int other = __shfl_xor_sync(kAll, most, step), few = __shfl_xor_sync(kAll, least, step);
          most = other > most ? other : most, least = few < least ? few : least;
        }
        add_all_rows<V, E>(acc, edges, most, least, rows, row_bytes);
      }
      if (ManyDims && g.grad_positions && c0 == 0)  // a lane for each dimension
        for (int64_t a = l; a < g.D && run.n >= 0; a += t.lanes) {
          A sum = start > 0 ? grad_position()[a] : A(0);
          for (int s = 0; s < count; ++s)
            if (slopes[s] != 0) sum += slopes[s] * (queries[edges[s].row * g.D + a] - position[a]);
          grad_position()[a] = sum;
        }
      __syncwarp();
    }
    if (run.n < 0 || !live || !g.grad_values.data) continue;
    const A factor = influence();
#pragma unroll
    for (int i = 0; i < E; ++i) {
      if (piece >= 0)
        part()[channel + i] = acc[i];
      else
        acc[i] *= factor;
    }
    if (piece < 0) Unit<V, E>::store(unit_of<V>(g.grad_values, group, g.H, channel) + run.n * g.grad_values.sN * int{sizeof(V)}, acc);
  }

  if (!moves) return;
  grad_influence = sum_over(grad_influence, t.lanes);
#pragma unroll
  for (int a = 0; !ManyDims && a < kFewDims; ++a) grad_near[a] = sum_over(grad_near[a], t.lanes);
  if (run.n < 0) return;
  const A sigma = width_of(as<const A>(g.sigma)[group % g.H]), scale = piece >= 0 ? A(1) : influence() / (sigma * sigma);
  if (ManyDims) {
    for (int64_t a = l; g.grad_positions && a < g.D; a += t.lanes)
      grad_position()[a] = longest == 0 ? A(0) : grad_position()[a] * scale;
  } else if (g.grad_positions && l == 0) {
#pragma unroll
    for (int a = 0; a < kFewDims; ++a)
      if (a < g.D) grad_position()[a] = grad_near[a] * scale;
  }
  if (l > 0) return;
  if (piece >= 0)
    part()[g.c + g.D] = grad_influence;
  else if (g.grad_influence)
    as<A>(g.grad_influence)[row] = grad_influence;
}

constexpr int kHubThreads = 256;

// A block for each piece that is the first of a hub; what the pieces lack, influence and sigma, comes here.
template <class V>
__global__ void __launch_bounds__(kHubThreads) hubs_kernel(const __grid_constant__ Problem g) {
  using A = Real<V>;
  if (!has_hubs(g)) return;
  const int64_t room = g.c + g.D + 1;
  for (int64_t number = blockIdx.x; number < g.B * g.H * g.pieces; number += gridDim.x) {
    const int64_t group = number / g.pieces, first = number % g.pieces;
    const int64_t list = group / g.H * g.list_heads + group % g.H % g.list_heads;
    const Run run = piece_of(g, list, first);
    if (run.n < 0 || !run.head) continue;
    const int64_t end = all_of(g, list, run.n).end - at(g.starts, g.wide, list * g.N);
    const A* parts = as<const A>(g.parts) + group * g.pieces * room;
    const A influence = g.influence ? as<const A>(g.influence)[group * g.N + run.n] : A(1);
    const A sigma = width_of(as<const A>(g.sigma)[group % g.H]);
    for (int64_t x = threadIdx.x; x < room; x += kHubThreads) {
      const bool value = x < g.c, position = !value && x < g.c + g.D;
      if (value ? !g.grad_values.data : position ? !g.grad_positions : !g.grad_influence) continue;
      A sum = parts[first * room + x];
      for (int64_t next = first / 2 + 1; next * g.hub < end; ++next) sum += parts[2 * next * room + x];
      if (value)
        narrow(sum * influence, *reinterpret_cast<V*>(unit_of<V>(g.grad_values, group, g.H, x) + run.n * g.grad_values.sN * int{sizeof(V)}));
      else if (position)
        as<A>(g.grad_positions)[(group * g.N + run.n) * g.D + x - g.c] = sum * (influence / (sigma * sigma));
      else
        as<A>(g.grad_influence)[group * g.N + run.n] = sum;
    }
  }
}

}  // namespace

void backward_entities(const Problem& g) {
  for_dtype(g, [&](auto v, auto elements) {
    using V = decltype(v);
    using A = Real<V>;
    constexpr int E = decltype(elements)::value;
    Shape t = {};
    t.lanes = power_of_two((g.c + E - 1) / E, 4, 32);
    t.stride = t.lanes + 1;
    const int groups = 32 / t.lanes;
    t.warp_bytes = (groups * t.stride * static_cast<int>(sizeof(Edge<A>) + sizeof(A)) + 15) / 16 * 16;
    t.blocks = (g.N + g.pieces + kWarps * groups - 1) / (kWarps * groups);
    launch("gaussian_gather", g.D > kFewDims ? entities_kernel<V, E, true> : entities_kernel<V, E, false>,
           Grid{g.B * g.H * t.blocks, 32 * kWarps, static_cast<size_t>(kWarps) * t.warp_bytes, g.stream}, g, t);
    const int64_t all = g.B * g.H * g.pieces, most = int64_t{8} * multiprocessors();
    if (all > 0) launch("gaussian_gather", hubs_kernel<V>,
                        Grid{all < most ? all : most, kHubThreads, 0, g.stream}, g);
  });
}

}  // namespace dfn::gather
