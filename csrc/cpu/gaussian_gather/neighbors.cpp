#include "cpu/gaussian_gather/neighbors.h"

#include <algorithm>
#include <cmath>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

// Where the bits of x go so that `dims` such numbers interleave.
uint32_t spread(uint32_t x, int dims) {
  if (dims == 1) return x;
  uint32_t out = 0;
  for (int bit = 0; x >> bit; ++bit) out |= (x >> bit & 1) << (bit * dims);
  return out;
}

template <class A>
std::vector<int32_t> order_of(const A* points, int64_t n, int64_t D) {
  const int dims = static_cast<int>(std::min<int64_t>(D, 3));
  int bits = 1;  // per dimension: about four points in a cell
  while (bits * dims < 24 && (int64_t(4) << (bits * dims)) < n) ++bits;
  // The grid spans the bulk of the points; what lies outside belongs to its border. So outliers do no harm.
  const int64_t cells = int64_t(1) << bits;
  std::vector<uint32_t> table(cells);
  for (int64_t i = 0; i < cells; ++i) table[i] = spread(static_cast<uint32_t>(i), dims);
  double low[3], scale[3];
  const int64_t stride = std::max<int64_t>(1, n / 4096);
  for (int a = 0; a < dims; ++a) {
    double sum = 0, squares = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += stride) {
      const double x = points[i * D + a];
      if (!std::isfinite(x)) continue;
      sum += x, squares += x * x, ++count;
    }
    const double mean = count ? sum / count : 0;
    const double deviation = count ? std::sqrt(std::max(squares / count - mean * mean, 0.0)) : 0;
    low[a] = mean - 2.2 * deviation;
    scale[a] = deviation > 0 ? cells / (4.4 * deviation) : 0;
  }
  std::vector<uint32_t> code(n);
  parallel_for(0, n, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint32_t cell = 0;
      for (int a = 0; a < dims; ++a) {
        const double x = (points[i * D + a] - low[a]) * scale[a];
        const int64_t at = !(x > 0) ? 0 : x >= double(cells) ? cells - 1 : static_cast<int64_t>(x);
        cell |= table[at] << a;
      }
      code[i] = cell;
    }
  });
  std::vector<uint32_t> next((size_t(1) << (bits * dims)) + 1);
  for (int64_t i = 0; i < n; ++i) ++next[code[i] + 1];
  for (size_t cell = 1; cell < next.size(); ++cell) next[cell] += next[cell - 1];
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[next[code[i]]++] = static_cast<int32_t>(i);
  return order;
}

template <class Slot>
void number_edges(const int64_t* indices, int64_t M, int64_t k, int64_t N, const int32_t* query_order,
                  const int32_t* entity_order, Array<int64_t>& starts, Array<Slot>& slots) {
  Array<int32_t> turn(entity_order ? N : 0);
  if (entity_order)
    for (int64_t u = 0; u < N; ++u) turn[entity_order[u]] = static_cast<int32_t>(u);
  // Blocks of queries are counted and numbered side by side; how many there are does not show in the result.
  const int64_t blocks = std::clamp<int64_t>(M * k >> 17, 1, 8), size = (M + blocks - 1) / blocks;
  Array<Slot> next(blocks * N);
  slots = Array<Slot>(M * k);
  // First slots hold each edge's entity, by turn; later the edge's number.
  const Slot nobody = static_cast<Slot>(-1);
  const auto each_block = [&](auto&& body) {
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(next.data() + b * N, b * size, std::min((b + 1) * size, M));
    });
  };
  each_block([&](Slot* count, int64_t first, int64_t last) {
    std::fill(count, count + N, Slot(0));
    for (int64_t t = first; t < last; ++t) {
      if (query_order && t + 16 < last) __builtin_prefetch(indices + query_order[t + 16] * k);
      const int64_t* index = indices + (query_order ? query_order[t] : t) * k;
      for (int64_t s = 0; s < k; ++s) {
        const bool inside = static_cast<uint64_t>(index[s]) < static_cast<uint64_t>(N);
        const Slot u = !inside ? nobody : entity_order ? static_cast<Slot>(turn[index[s]]) : static_cast<Slot>(index[s]);
        slots[t * k + s] = u;
        if (inside) ++count[u];
      }
    }
  });
  starts = Array<int64_t>(N + 1);
  int64_t total = 0;
  for (int64_t u = 0; u < N; ++u) {
    starts[u] = total;
    for (int64_t b = 0; b < blocks; ++b) {
      const Slot count = next[b * N + u];
      next[b * N + u] = static_cast<Slot>(total);
      total += count;
    }
  }
  starts[N] = total;
  each_block([&](Slot* at, int64_t first, int64_t last) {
    for (int64_t e = first * k; e < last * k; ++e)
      if (slots[e] != nobody) slots[e] = at[slots[e]]++;
  });
}

}  // namespace

std::vector<int32_t> spatial_order(const void* points, Dtype dtype, int64_t n, int64_t D, int64_t bytes_per_row) {
  constexpr int64_t kCache = 1 << 19;  // what the second-level cache holds needs no order
  if (n * bytes_per_row <= kCache || n >= (int64_t(1) << 31) || D == 0) return {};
  return dtype == Dtype::f64 ? order_of(static_cast<const double*>(points), n, D)
                             : order_of(static_cast<const float*>(points), n, D);
}

Incoming incoming_edges(const int64_t* indices, int64_t M, int64_t k, int64_t N, const int32_t* query_order,
                        const int32_t* entity_order) {
  Incoming in;
  if (M * k >> 32)
    number_edges(indices, M, k, N, query_order, entity_order, in.starts, in.slots64);
  else
    number_edges(indices, M, k, N, query_order, entity_order, in.starts, in.slots);
  return in;
}

}  // namespace dfn
