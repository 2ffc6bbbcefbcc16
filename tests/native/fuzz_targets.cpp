// What the fuzzer runs: the first byte of an input picks an entry point, the rest is its arguments. Results are held
// against exhaustive search; AddressSanitizer and UndefinedBehaviorSanitizer watch the memory (the shim's tensors are
// exactly as large as they must be).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

#include "host/streams.h"
#include "ops.h"

namespace {

using namespace ops;

// Bytes become arguments; where they end, zeros follow.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return at_ >= size_; }
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t between(int64_t low, int64_t high) { return low + (byte() | byte() << 8) % (high - low + 1); }
  bool coin() { return byte() & 1; }
  uint32_t word() {
    uint32_t w = 0;
    for (int i = 0; i < 4; ++i) w |= uint32_t(byte()) << 8 * i;
    return w;
  }
  float real() {
    const uint32_t w = word();
    float x;
    std::memcpy(&x, &w, 4);
    return x;
  }
  int64_t wild(int64_t n) {  // an index: mostly in range
    switch (byte() % 16) {
      case 0: return static_cast<int64_t>(uint64_t(word()) << 32 | word());
      case 1: return n;
      case 2: return -int64_t(byte());
      default: return n > 0 ? between(0, n - 1) : -1;
    }
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

template <class T>
void set(const Tensor& t, int64_t i, double x) {
  t.data<T>()[i] = static_cast<T>(x);
}

// Many floats from few bytes: a palette of any floats, which a generator picks from, and perhaps noise of any scale.
Tensor reals(Bytes& in, std::vector<int64_t> sizes, Dtype type) {
  Tensor t(sizes, type);
  float palette[8];
  const int colors = 1 + in.byte() % 8;
  for (int i = 0; i < colors; ++i) palette[i] = in.real();
  const float noise = in.coin() ? in.real() : 0.0f;
  uint32_t state = in.word() | 1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = palette[(state >> 20) % colors] + noise * ((state >> 8 & 0xFFF) * 0x1p-12f);
    if (type == Dtype::Double)
      set<double>(t, i, x);
    else
      set<float>(t, i, x);
  }
  return t;
}

// Ordinary numbers, for what only gets multiplied.
Tensor plain(std::vector<int64_t> sizes, Dtype type = Dtype::Float) {
  Tensor t(sizes, type);
  for (int64_t i = 0; i < t.numel(); ++i) type == Dtype::Double ? set<double>(t, i, i % 5 - 2) : set<float>(t, i, i % 5 - 2);
  return t;
}

Tensor wild_indices(Bytes& in, std::vector<int64_t> sizes, int64_t n) {
  Tensor t(sizes, Dtype::Long);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<int64_t>()[i] = in.empty() && n > 0 ? i % n : in.wild(n);
  return t;
}

[[noreturn]] void wrong(const char* what) {
  std::fprintf(stderr, "wrong result: %s\n", what);
  std::abort();
}

// Row i of a search, by comparing all: k least (distance, id) among the points that are visible.
template <class T, class Visible>
void check_row(const T* points, int64_t n, int64_t D, const T* q, int64_t k, const int64_t* ids, const T* dists,
               const Visible& visible, const char* what) {
  const dfn::knn::ExactFloats exact;
  const auto finite = [&](const T* x) {
    return std::all_of(x, x + D, [](T v) { return std::isfinite(v); });
  };
  std::vector<std::pair<T, int64_t>> all;
  for (int64_t j = 0; j < n && finite(q); ++j) {
    if (!visible(j) || !finite(points + j * D)) continue;
    T sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += (points[j * D + d] - q[d]) * (points[j * D + d] - q[d]);
    if (sum < std::numeric_limits<T>::infinity()) all.push_back({sum, j});
  }
  const int64_t found = std::min<int64_t>(k, all.size());
  std::partial_sort(all.begin(), all.begin() + found, all.end());
  for (int64_t s = 0; s < k; ++s) {
    const T d = s < found ? all[s].first : std::numeric_limits<T>::infinity();
    if (ids[s] != (s < found ? all[s].second : -1) || std::memcmp(&dists[s], &d, sizeof d)) wrong(what);
  }
}

template <class T>
void knn_of(Bytes& in, Dtype type) {
  const int64_t B = 1 + in.byte() % 2, D = 1 + in.byte() % 10, N = in.between(0, 1500);
  const int64_t k = in.coin() ? in.between(1, 20) : in.between(1, std::clamp<int64_t>(30000 / (N + 1), 20, 1024));
  bool causal = in.coin(), include_self = in.coin();
  const Tensor points = reals(in, {B, N, D}, type);
  Maybe queries, lengths, query_lengths, warm;
  int64_t M = N;
  if (in.coin()) {
    M = in.between(0, 200);
    queries = reals(in, {B, M, D}, type);
    if (M != N) causal = false, include_self = true;
  }
  if (in.coin()) lengths = wild_indices(in, {B}, N + 1);
  if (queries && in.coin()) query_lengths = wild_indices(in, {B}, M + 1);
  if (in.coin()) warm = wild_indices(in, {B, M, k}, N);
  int64_t index = 0;
  if (in.coin()) index = op<KnnIndex>("knn_index")(points, lengths);
  if (in.coin() && lengths) lengths->data<int64_t>()[0] = in.wild(N + 1);  // not those of the index
  const auto [ids, dists] =
      op<Knn>("knn")(points, queries, lengths, query_lengths, k, causal, include_self, warm, index);
  if (index) op<KnnForget>("knn_forget")(index);
  for (int64_t b = 0; b < B; ++b) {
    const auto length = [&](const Maybe& l, int64_t most) {
      return l ? std::clamp<int64_t>(l->data<int64_t>()[b], 0, most) : most;
    };
    const int64_t n = length(lengths, N), m = queries ? length(query_lengths, M) : n;
    const T* p = points.data<T>() + b * N * D;
    const T* q = queries ? queries->data<T>() + b * M * D : p;
    for (int64_t i = 0; i < M; i += i < 8 || i + 8 > M ? 1 : 1 + M / 16) {
      const auto visible = [&](int64_t j) { return i < m && (include_self || j != i) && (!causal || j <= i); };
      const int64_t row = (b * M + i) * k;
      check_row(p, n, D, q + i * D, k, ids.data<int64_t>() + row, dists.data<T>() + row, visible, "knn");
    }
  }
}

template <class T>
void streaming(Bytes& in, Dtype type) {
  const int64_t S = 1 + in.byte() % 2, D = 1 + in.byte() % 5;
  dfn::Streams<T> index(S, static_cast<int>(D));
  std::vector<std::vector<T>> all(S);
  for (int step = 0; step < 64 && !in.empty(); ++step) {
    const int kind = in.byte() % 3;
    const int64_t n = kind == 1 ? in.between(0, 200) : 1, k = 1 + in.byte() % 40;
    const Tensor given = reals(in, {S, n, D}, type);
    const T* p = given.data<T>();
    std::vector<int64_t> ids(S * k);
    std::vector<T> dists(S * k);
    if (kind == 0) index.append(p, static_cast<int>(k), ids.data(), dists.data());
    if (kind == 2) index.query(p, 1, static_cast<int>(k), ids.data(), dists.data());
    for (int64_t s = 0; s < S; ++s) {
      if (kind != 1)
        check_row(all[s].data(), static_cast<int64_t>(all[s].size()) / D, D, p + s * D, k, ids.data() + s * k,
                  dists.data() + s * k, [](int64_t) { return true; }, "StreamingKNN");
      if (kind != 2) all[s].insert(all[s].end(), p + s * n * D, p + (s + 1) * n * D);
    }
    if (kind == 1) index.extend(p, n);
    if (in.byte() == 7) dfn::Streams<T>(index).extend(index.points().data(), index.size());
  }
  if (index.size() * D != static_cast<int64_t>(all[0].size())) wrong("StreamingKNN: size");
}

void gather(Bytes& in) {
  const Dtype type = in.coin() ? Dtype::Double : Dtype::Float;
  const int64_t B = 1 + in.byte() % 2, H = 1 + in.byte() % 2, N = in.between(0, 60), M = in.between(0, 60);
  const int64_t D = 1 + in.byte() % 4, c = in.byte() % 40, k = in.byte() % 9;
  const bool normalize = in.coin();
  const Tensor positions = reals(in, {B, H, N, D}, type), queries = reals(in, {B, H, M, D}, type);
  const int64_t lists = in.coin() ? H : 1;
  const Tensor indices = wild_indices(in, {B, lists, M, k}, N);
  const Tensor values = plain({B, H, N, c}, type), sigma = reals(in, {H}, type), grad = plain({B, H, M, c}, type);
  const int64_t wanted = in.byte() % 32;
  bool bad = false;
  for (int64_t i = 0; i < indices.numel(); ++i) bad |= indices.data<int64_t>()[i] < -1 || indices.data<int64_t>()[i] >= N;
  Maybe query_order, entity_order, starts, slots;
  if (in.coin()) {
    query_order = op<SpatialOrder>("spatial_order")(reals(in, {B, lists, M, D}, type));
    entity_order = op<SpatialOrder>("spatial_order")(reals(in, {B, lists, N, D}, type));
    std::tie(starts, slots) = op<TransposeNeighbors>("transpose_neighbors")(indices, *query_order, *entity_order);
  }
  try {
    op<Gather>("gaussian_gather")(positions, queries, values, indices, sigma, {}, {}, query_order, normalize);
    if (bad && c > 0) wrong("gaussian_gather accepted an index out of range");
  } catch (const std::out_of_range&) {
    if (!bad) wrong("gaussian_gather refused good indices");
  }
  op<GatherBackward>("gaussian_gather_backward")(grad, positions, queries, values, indices, sigma, {}, {}, query_order,
                                                 entity_order, starts, slots, normalize, wanted);
}

void route(Bytes& in) {
  const int64_t T = in.between(0, 100), P = 1 + in.byte() % 6, I = in.byte() % 80, O = in.byte() % 80, k = in.byte() % 4;
  const Tensor x = plain({T, I}), weights = reals(in, {T, P}, Dtype::Float), patterns = plain({P, O, I});
  const Tensor grad = plain({T, O});
  Maybe chosen;
  if (in.coin()) chosen = wild_indices(in, {T, k}, P);
  bool bad = false;
  for (int64_t i = 0; chosen && i < chosen->numel(); ++i) {  // out of range, or twice in a row
    const int64_t* row = chosen->data<int64_t>() + i / k * k;
    bad |= row[i % k] < 0 || row[i % k] >= P || std::count(row, row + k, row[i % k]) > 1;
  }
  try {
    op<Route>("pattern_route")(x, weights, patterns, {}, chosen, {}, false);
    op<RouteBackward>("pattern_route_backward")(grad, x, weights, patterns, chosen, {}, in.coin(), in.coin(), in.coin());
    if (bad) wrong("pattern_route accepted bad patterns");
  } catch (const std::runtime_error&) {
    if (!bad) wrong("pattern_route refused good patterns");
  }
}

void norm(Bytes& in) {
  const int64_t B = 1 + in.byte() % 3, N = in.between(0, 80), d = in.byte() % 40;
  const char* mode = std::array{"mean", "causal", "entity"}[in.byte() % 3];
  const Tensor states = plain({B, N, d}), energy = reals(in, {B, N}, Dtype::Float), grad = plain({B, N, d});
  Maybe lengths;
  if (in.coin()) lengths = wild_indices(in, {B}, N + 1);
  op<Norm>("flow_norm")(states, energy, lengths, 1e-6, mode);
  op<NormBackward>("flow_norm_backward")(grad, states, energy, lengths, 1e-6, mode);
}

}  // namespace

void run_target(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  switch (in.byte() % 8) {
    case 0:
    case 1: return knn_of<float>(in, Dtype::Float);
    case 2: return knn_of<double>(in, Dtype::Double);
    case 3: return streaming<float>(in, Dtype::Float);
    case 4: return streaming<double>(in, Dtype::Double);
    case 5: return gather(in);
    case 6: return route(in);
    default: return norm(in);
  }
}
