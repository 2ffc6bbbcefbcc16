// What the fuzzer runs: the first byte of an input picks an entry point, the rest is its arguments. Results are held
// against exhaustive search; AddressSanitizer and UndefinedBehaviorSanitizer watch the memory (the shim's tensors are
// exactly as large as they must be).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

#include "fuzz_inputs.h"
#include "host/streams.h"

namespace {

using namespace inputs;
using namespace ops;

[[noreturn]] void wrong(const char* what) {
  std::fprintf(stderr, "wrong result: %s\n", what);
  std::abort();
}

// Row i of a search, by comparing all: k least (distance, id) among the points that are visible and nearer than within.
template <class T, class Visible>
void check_row(const T* points, int64_t n, int64_t D, const T* q, int64_t k, const int64_t* ids, const T* dists,
               const Visible& visible, const char* what, bool absolute = false,
               T within = std::numeric_limits<T>::infinity()) {
  const dfn::knn::ExactFloats exact;
  const auto finite = [&](const T* x) {
    return std::all_of(x, x + D, [](T v) { return std::isfinite(v); });
  };
  std::vector<std::pair<T, int64_t>> all;
  for (int64_t j = 0; j < n && finite(q); ++j) {
    if (!visible(j) || !finite(points + j * D)) continue;
    T sum = 0;
    for (int64_t d = 0; d < D; ++d) {
      const T away = points[j * D + d] - q[d];
      sum += absolute ? std::abs(away) : away * away;
    }
    if (sum < within) all.push_back({sum, j});
  }
  const int64_t found = std::min<int64_t>(k, all.size());
  std::partial_sort(all.begin(), all.begin() + found, all.end());
  for (int64_t s = 0; s < k; ++s) {
    const T d = s < found ? all[s].first : std::numeric_limits<T>::infinity();
    if (ids[s] != (s < found ? all[s].second : -1) || std::memcmp(&dists[s], &d, sizeof d)) wrong(what);
  }
}

Tensor offsets(Bytes& in, int64_t S, int64_t n) {
  Tensor ptr({S + 1}, Dtype::Long);
  int64_t* at = ptr.data<int64_t>();
  for (int64_t s = 0; s <= S; ++s) at[s] = in.between(0, n);
  std::sort(at, at + S + 1);
  at[0] = 0, at[S] = n;
  return ptr;
}

template <class T>
void knn_of(Bytes& in, Dtype type, int64_t least_dims = 1) {
  const int64_t B = 1 + in.byte() % 2, D = least_dims + in.byte() % (least_dims > 1 ? 70 : 10);
  const int64_t N = in.between(0, 1500);
  const int64_t k = in.coin() ? in.between(1, 20) : in.between(1, std::clamp<int64_t>(30000 / (N + 1), 20, 1024));
  bool causal = in.coin(), include_self = in.coin();
  const Tensor points = reals(in, {B, N, D}, type);
  Maybe queries, lengths, query_lengths;
  int64_t M = N;
  if (in.coin()) {
    M = in.between(0, 200);
    queries = reals(in, {B, M, D}, type);
    if (M != N) causal = false, include_self = true;
  }
  Maybe ptr, query_ptr;
  if (in.coin()) {
    const int64_t S = 1 + in.byte() % 5;
    ptr = offsets(in, S, N);
    if (queries) query_ptr = causal || !include_self ? ptr : offsets(in, S, M);
  } else if (in.coin()) {
    lengths = wild_indices(in, {B}, N + 1);
  }
  if (queries && !ptr && in.coin()) query_lengths = wild_indices(in, {B}, M + 1);
  int64_t index = 0;
  if (in.coin()) index = op<KnnIndex>("knn_index")(points, lengths, ptr);
  if (in.coin() && lengths) lengths->data<int64_t>()[0] = in.wild(N + 1);  // not those of the index
  const bool absolute = !causal && include_self && in.coin();
  std::optional<double> within;
  if (in.coin()) within = std::abs(in.real());
  const auto [ids, dists] = op<Knn>("knn")(points, queries, lengths, query_lengths, k, causal, include_self, index, ptr,
                                           query_ptr, within, absolute);
  if (index) op<KnnForget>("knn_forget")(index);
  for (int64_t b = 0; b < B; ++b) {
    const auto length = [&](const Maybe& l, int64_t most) {
      return l ? std::clamp<int64_t>(l->data<int64_t>()[b], 0, most) : most;
    };
    const int64_t n = length(lengths, N), m = queries ? length(query_lengths, M) : n;
    const T* p = points.data<T>() + b * N * D;
    const T* q = queries ? queries->data<T>() + b * M * D : p;
    for (int64_t i = 0; i < M; i += i < 8 || i + 8 > M ? 1 : 1 + M / 16) {
      const auto set_of = [&](const Tensor& sets, int64_t row) {
        const int64_t* at = sets.data<int64_t>();
        return std::upper_bound(at, at + sets.size(0), row) - at;
      };
      const auto visible = [&](int64_t j) {
        if (ptr && set_of(*ptr, j) != set_of(query_ptr ? *query_ptr : *ptr, i)) return false;
        return i < m && (include_self || j != i) && (!causal || j <= i);
      };
      const int64_t row = (b * M + i) * k;
      check_row(p, n, D, q + i * D, k, ids.data<int64_t>() + row, dists.data<T>() + row, visible, "knn", absolute,
                within ? static_cast<T>(*within) : std::numeric_limits<T>::infinity());
    }
  }
}

// Small whole numbers, so that sums are exact in any order.
template <class T>
void knn_backward(Bytes& in, Dtype type) {
  const int64_t B = 1 + in.byte() % 2, N = in.between(1, 300), D = 1 + in.byte() % 5, k = 1 + in.byte() % 20;
  const bool absolute = in.coin(), own = in.coin(), of_points = own || in.coin(), of_queries = !own && in.coin();
  const int64_t M = own ? N : in.between(0, 300);
  const Tensor points = plain({B, N, D}, type), grad = plain({B, M, k}, type), indices = wild_indices(in, {B, M, k}, N);
  Maybe queries;
  if (!own) queries = plain({B, M, D}, type);
  bool bad = false;
  std::vector<T> to_points(B * N * D), to_queries(B * M * D);
  for (int64_t edge = 0; edge < indices.numel(); ++edge) {
    const int64_t b = edge / (M * k), i = edge / k % M, j = indices.data<int64_t>()[edge];
    bad |= j < -1 || j >= N;
    if (j < 0 || j >= N) continue;
    for (int64_t d = 0; d < D; ++d) {
      const int64_t p = (b * N + j) * D + d, q = (b * M + i) * D + d;
      const T away = points.data<T>()[p] - (own ? points : *queries).data<T>()[q];
      const T push = grad.data<T>()[edge] * (absolute ? T((away > 0) - (away < 0)) : 2 * away);
      to_points[p] += push;
      (own ? to_points : to_queries)[q] -= push;
    }
  }
  try {
    const auto [a, b] = op<KnnBackward>("knn_backward")(grad, points, queries, indices, absolute, of_points, of_queries);
    if (bad) wrong("knn_backward accepted an index out of range");
    if (of_points && !std::equal(to_points.begin(), to_points.end(), a.template data<T>())) wrong("knn_backward: points");
    if (of_queries && !std::equal(to_queries.begin(), to_queries.end(), b.template data<T>())) wrong("knn_backward: queries");
  } catch (const std::out_of_range&) {
    if (!bad) wrong("knn_backward refused good indices");
  }
}

template <class T>
void farthest(Bytes& in, Dtype type) {
  const int64_t N = in.between(0, 400), D = 1 + in.byte() % 6, S = 1 + in.byte() % 4, total = in.between(0, 200);
  const Tensor points = reals(in, {N, D}, type), ptr = offsets(in, S, N), out_ptr = offsets(in, S, total);
  Maybe start;
  if (in.coin()) start = wild_indices(in, {S}, N);
  const Tensor out = op<FarthestPoints>("farthest_points")(points, ptr, out_ptr, start, total);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t first = ptr.data<int64_t>()[s], n = ptr.data<int64_t>()[s + 1] - first;
    const T* x = points.data<T>() + first * D;
    const auto finite = [&](int64_t i) {
      return std::all_of(x + i * D, x + (i + 1) * D, [](T v) { return std::isfinite(v); });
    };
    std::vector<T> away(n);  // -1: chosen
    for (int64_t i = 0; i < n; ++i) away[i] = finite(i) ? std::numeric_limits<T>::infinity() : T(0);
    int64_t next = std::clamp<int64_t>(start ? start->data<int64_t>()[s] : 0, 0, std::max<int64_t>(n - 1, 0));
    for (int64_t at = out_ptr.data<int64_t>()[s]; at < out_ptr.data<int64_t>()[s + 1]; ++at) {
      const bool left = at - out_ptr.data<int64_t>()[s] < n;
      if (out.data<int64_t>()[at] != (left ? first + next : -1)) wrong("farthest_points");
      if (!left) continue;
      away[next] = -1;
      for (int64_t i = 0; i < n && finite(next); ++i) {
        T sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += (x[i * D + d] - x[next * D + d]) * (x[i * D + d] - x[next * D + d]);
        if (finite(i)) away[i] = std::min(away[i], sum);
      }
      next = std::max_element(away.begin(), away.end()) - away.begin();
    }
  }
}

template <class T>
void means(Bytes& in, Dtype type) {
  const int64_t B = 1 + in.byte() % 3, N = in.between(0, 600), S = 1 + in.byte() % 6;
  const bool causal = in.coin();
  const Tensor x = reals(in, {B, N}, type), ptr = offsets(in, S, N);
  const Tensor mean = op<SetMeans>("set_means")(x, ptr, causal), back = op<SetMeans>("set_means_backward")(x, ptr, causal);
  const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  for (int64_t row = 0; row < B * S; ++row) {
    const int64_t first = row / S * N + ptr.data<int64_t>()[row % S], end = row / S * N + ptr.data<int64_t>()[row % S + 1];
    double sum = 0, whole = 0;
    for (int64_t i = first; i < end; ++i) whole += x.data<T>()[i];
    for (int64_t i = first; i < end; ++i) {
      sum += x.data<T>()[i];
      const double expected = causal ? sum / (i - first + 1) : whole / (end - first);
      if (!same(mean.data<T>()[i], T(expected))) wrong("set_means");
    }
    sum = whole = 0;
    for (int64_t i = end; i-- > first;) whole += x.data<T>()[i];
    for (int64_t i = end; i-- > first;) {
      sum += double(x.data<T>()[i]) / (i - first + 1);
      if (!same(back.data<T>()[i], T(causal ? sum : whole / (end - first)))) wrong("set_means_backward");
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
  const Dtype stored = any_float(in), type = sums_of(stored);
  const int64_t B = 1 + in.byte() % 2, H = 1 + in.byte() % 2, N = in.between(0, 60), M = in.between(0, 60);
  const int64_t D = 1 + in.byte() % 4, c = in.byte() % 40, k = in.byte() % 9;
  const bool normalize = in.coin();
  const Tensor positions = reals(in, {B, H, N, D}, type), queries = reals(in, {B, H, M, D}, type);
  const int64_t lists = in.coin() ? H : 1;
  const Tensor indices = wild_indices(in, {B, lists, M, k}, N);
  const Tensor values = plain({B, H, N, c}, stored), sigma = reals(in, {H}, type), grad = plain({B, H, M, c}, stored);
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
  const Dtype stored = any_float(in);
  const int64_t T = in.between(0, 100), P = 1 + in.byte() % 6, I = in.byte() % 150, O = in.byte() % 150, k = in.byte() % 4;
  const Tensor x = plain({T, I}, stored), weights = reals(in, {T, P}, sums_of(stored)), patterns = plain({P, O, I}, stored);
  const Tensor grad = plain({T, O}, stored);
  Maybe chosen, blocks;
  if (in.coin()) chosen = wild_indices(in, {T, k}, P);
  if (!chosen && in.coin()) {
    blocks = Tensor({P, (O + 127) / 128, (I + 63) / 64}, Dtype::Bool, 0);
    for (int64_t i = 0; i < blocks->numel(); ++i) blocks->data<bool>()[i] = in.coin();
  }
  bool bad = false;
  for (int64_t i = 0; chosen && i < chosen->numel(); ++i) {  // out of range, or twice in a row
    const int64_t* row = chosen->data<int64_t>() + i / k * k;
    bad |= row[i % k] < 0 || row[i % k] >= P || std::count(row, row + k, row[i % k]) > 1;
  }
  try {
    op<Route>("pattern_route")(x, weights, patterns, {}, chosen, blocks, in.coin());
    op<RouteBackward>("pattern_route_backward")(grad, x, weights, patterns, chosen, blocks, in.coin(), in.coin(), in.coin());
    if (bad) wrong("pattern_route accepted bad patterns");
  } catch (const std::runtime_error&) {
    if (!bad) wrong("pattern_route refused good patterns");
  }
}

void quantized(Bytes& in) {
  const int64_t T = in.between(0, 70), P = 1 + in.byte() % 5, I = in.byte() % 90, O = in.byte() % 90, r = 1 + in.byte() % 9;
  const Tensor x = reals(in, {T, I}, Dtype::Float), weights = reals(in, {T, P}, Dtype::Float);
  const auto packed = [](int64_t patterns, int64_t rows, int64_t columns) {
    return plain({patterns, (rows + 31) / 32, (columns + 3) / 4, 32, 4}, Dtype::Char);
  };
  Maybe bias;
  if (in.coin()) bias = plain({O});
  op<QuantizedRoute>("quantized_route")(x, weights, packed(P, O, I), plain({P, O}), plain({P, O}, Dtype::Int), bias);
  const int64_t rows = P * (r + 1);
  op<QuantizedLowRank>("quantized_low_rank")(x, packed(1, rows, I), plain({1, rows}), plain({1, rows}, Dtype::Int),
                                             plain({P}), packed(1, O, P * r), plain({1, O}), plain({1, O}, Dtype::Int), bias);
}

void density(Bytes& in) {
  const Dtype type = in.coin() ? Dtype::Double : Dtype::Float;
  const int64_t T = in.between(0, 90), P = 1 + in.byte() % 5, I = in.byte() % 70, O = in.byte() % 70;
  const Tensor x = plain({T, I}, type), weights = reals(in, {T, P}, type), patterns = plain({P, O, I}, type);
  const Tensor threshold = reals(in, {T}, type);
  Maybe bias;
  if (in.coin()) bias = plain({O}, type);
  const auto [out, kept] = op<Density>("pattern_route_density")(x, weights, patterns, threshold, bias);
  for (int64_t t = 0; t < T; ++t)
    if (kept.data<int64_t>()[t] < 0 || kept.data<int64_t>()[t] > O * I) wrong("pattern_route_density: kept");
  op<DensityBackward>("pattern_route_density_backward")(plain({T, O}, type), x, weights, patterns, threshold);
  const int64_t S = in.between(1, 300);
  op<MagnitudeAbove>("magnitude_above")(reals(in, {T, S}, type), in.between(0, S - 1));
}

void drift(Bytes& in) {
  const Dtype stored = any_float(in), type = sums_of(stored);
  const int64_t B = 1 + in.byte() % 3, H = 1 + in.byte() % 4, N = in.between(0, 80), d = in.byte() % 70, D = 1 + in.byte() % 5;
  const Tensor states = plain({B, N, d}, stored), positions = reals(in, {B, H, N, D}, type);
  const Tensor weight = reals(in, {H, D, d}, type), alpha = plain({H}, type);
  Maybe bias;
  if (in.coin()) bias = plain({H, D}, type);
  const Triple out = op<Drift>("flow_drift")(states, positions, weight, bias, alpha);
  op<DriftBackward>("flow_drift_backward")(positions, plain({B, H, N, D}, type), plain({B, H, N}, type), states, weight,
                                           alpha, std::get<1>(out));
}

void norm(Bytes& in) {
  const Dtype stored = any_float(in);
  const int64_t B = 1 + in.byte() % 3, N = in.between(0, 80), d = in.byte() % 40;
  const char* mode = std::array{"mean", "causal", "entity"}[in.byte() % 3];
  const Tensor states = plain({B, N, d}, stored), energy = reals(in, {B, N}, sums_of(stored)), grad = plain({B, N, d}, stored);
  Maybe lengths;
  if (in.coin()) lengths = wild_indices(in, {B}, N + 1);
  op<Norm>("flow_norm")(states, energy, lengths, 1e-6, mode);
  op<NormBackward>("flow_norm_backward")(grad, states, energy, lengths, 1e-6, mode);
}

void convolution(Bytes& in) {
  const Dtype stored = any_float(in);
  const int64_t B = 1 + in.byte() % 3, N = in.between(0, 80), d = in.byte() % 40, W = 1 + in.byte() % 9;
  const Tensor x = plain({B, N, d}, stored), weight = reals(in, {W, d}, sums_of(stored)), grad = plain({B, N, d}, stored);
  Maybe place;
  if (in.coin()) place = wild_indices(in, {N}, N + 1);
  op<Convolution>("short_convolution")(x, weight, place);
  op<ConvolutionBackward>("short_convolution_backward")(grad, x, weight, place);
}

}  // namespace

void run_target(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  switch (in.byte() % 20) {
    case 0:
    case 1: return knn_of<float>(in, Dtype::Float);
    case 2: return knn_of<double>(in, Dtype::Double);
    case 3: return streaming<float>(in, Dtype::Float);
    case 4: return streaming<double>(in, Dtype::Double);
    case 5: return gather(in);
    case 6: return route(in);
    case 7: return norm(in);
    case 8: return drift(in);
    case 9: return quantized(in);
    case 10: return density(in);
    case 11: return knn_of<float>(in, Dtype::Float, 9);  // by products
    case 12: return knn_of<double>(in, Dtype::Double, 9);
    case 13: return knn_backward<float>(in, Dtype::Float);
    case 14: return knn_backward<double>(in, Dtype::Double);
    case 15: return farthest<float>(in, Dtype::Float);
    case 16: return farthest<double>(in, Dtype::Double);
    case 17: return means<float>(in, Dtype::Float);
    case 18: return means<double>(in, Dtype::Double);
    default: return convolution(in);
  }
}
