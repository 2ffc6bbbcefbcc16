// For ThreadSanitizer: the operators on four threads, two callers at a time on the same inputs, and the stateful indexes
// shared by callers. Also checks that results do not depend on the number of threads.
#include <cstdio>
#include <random>

#include "host/streams.h"
#include "ops.h"

namespace {

using namespace ops;

Tensor random(std::vector<int64_t> sizes, uint32_t seed) {
  Tensor t(sizes, Dtype::Float);
  std::mt19937 bits(seed);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<float>()[i] = (bits() >> 8) * 0x1p-24f;
  return t;
}

Tensor random_indices(std::vector<int64_t> sizes, int64_t n, uint32_t seed) {
  Tensor t(sizes, Dtype::Long);
  std::mt19937 bits(seed);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<int64_t>()[i] = int64_t(bits() % (n + 1)) - 1;
  return t;
}

bool same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].sizes() != b[i].sizes() || std::memcmp(a[i].data_ptr(), b[i].data_ptr(), a[i].numel() * a[i].element_size()))
      return false;
  return a.size() == b.size();
}

template <class Tuple>
std::vector<Tensor> listed(const Tuple& t) {
  return std::apply([](const auto&... x) { return std::vector<Tensor>{x...}; }, t);
}

// Two callers at a time, each on four threads, against one caller on one thread.
template <class F>
void twice(const char* name, const F& call) {
  torch::stable::shim_threads() = 1;
  const std::vector<Tensor> want = call();
  torch::stable::shim_threads() = 4;
  std::vector<Tensor> got[2];
  std::thread callers[2];
  for (int c = 0; c < 2; ++c) callers[c] = std::thread([&, c] { got[c] = call(); });
  for (auto& caller : callers) caller.join();
  if (!same(got[0], want) || !same(got[1], want)) {
    std::fprintf(stderr, "%s: other bits on more threads\n", name);
    std::exit(1);
  }
  std::printf("%s\n", name);
}

void knn() {
  const auto search = [](const Tensor& points, int64_t k, bool causal, bool include_self, int64_t index, Maybe ptr = {}) {
    return op<Knn>("knn")(points, {}, {}, {}, k, causal, include_self, index, ptr, {}, {}, false);
  };
  for (int64_t D : {1, 2, 3, 9, 40}) {
    Tensor points = random({2, 2500, D}, 1);
    for (int64_t i = 0; i < points.numel(); i += 3) points.data<float>()[i] = (i % 7) * 0.1f;  // ties and repeats
    for (int causal : {0, 1})
      twice("knn", [&] { return listed(search(points, 9, causal, !causal, 0)); });
    const int64_t index = op<KnnIndex>("knn_index")(points, {}, {});
    twice("KNNIndex, causal", [&] { return listed(search(points, 20, true, true, index)); });
    twice("KNNIndex", [&] { return listed(search(points, 20, false, true, index)); });
    op<KnnForget>("knn_forget")(index);
  }
  // The prefixes of an index are built by whichever caller comes first.
  const Tensor points = random({1, 4000, 2}, 2);
  const int64_t index = op<KnnIndex>("knn_index")(points, {}, {});
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&, c] { search(points, 5, c % 2, true, index); });
  for (auto& caller : callers) caller.join();
  Tensor tiny = random({1, 3000, 2}, 3);
  for (int64_t i = 0; i < tiny.numel(); ++i) tiny.data<float>()[i] *= 1e-22f;
  twice("knn, underflowing", [&] { return listed(search(tiny, 9, false, true, 0)); });
  const Tensor many = random({6, 900, 2}, 4);
  twice("knn, one thread each", [&] { return listed(search(many, 9, true, true, 0)); });
  const Tensor packed = random({1, 7000, 2}, 5);
  Tensor ptr({42}, Dtype::Long);  // 40 small sets, an empty one, a large one
  for (int64_t s = 0; s < 42; ++s) ptr.data<int64_t>()[s] = s < 41 ? s / 2 * 40 : 7000;
  twice("knn, packed sets", [&] { return listed(search(packed, 9, true, true, 0, ptr)); });
}

void gather() {
  for (int64_t M : {700, 9000}) {
    const int64_t N = 800, k = 7, c = 33;
    const Tensor positions = random({2, 2, N, 3}, 1), queries = random({2, 2, M, 3}, 2), values = random({2, 2, N, c}, 3);
    Tensor indices = random_indices({2, 1, M, k}, N, 4);
    for (int64_t i = 0; i < indices.numel(); i += 2) indices.data<int64_t>()[i] = 5;  // a hub
    const Tensor sigma = random({2}, 5), influence = random({2, 2, N}, 6), grad = random({2, 2, M, c}, 7);
    const auto planned = [&](bool plan) {
      Maybe query_order, entity_order, starts, slots;
      if (plan) {
        query_order = op<SpatialOrder>("spatial_order")(random({2, 1, M, 3}, 8));
        entity_order = op<SpatialOrder>("spatial_order")(random({2, 1, N, 3}, 9));
        std::tie(starts, slots) = op<TransposeNeighbors>("transpose_neighbors")(indices, *query_order, *entity_order);
      }
      const Tensor out = op<Gather>("gaussian_gather")(positions, queries, values, indices, sigma, influence, {},
                                                       query_order, true);
      auto all = listed(op<GatherBackward>("gaussian_gather_backward")(
          grad, positions, queries, values, indices, sigma, influence, {}, query_order, entity_order, starts, slots, true, 31));
      all[2] = torch::stable::transpose(all[2], 1, 2);
      all.push_back(torch::stable::transpose(out, 1, 2));
      return all;
    };
    twice("gaussian_gather and its gradients", [&] { return planned(false); });
    twice("gaussian_gather and its gradients, planned", [&] { return planned(true); });
  }
}

void norm_and_drift() {
  const Tensor states = random({3, 1700, 19}, 1), energy = random({3, 1700}, 2), grad = random({3, 1700, 19}, 3);
  for (const char* mode : {"mean", "causal", "entity"}) {
    twice("flow_norm", [&] { return std::vector<Tensor>{op<Norm>("flow_norm")(states, energy, {}, 1e-6, mode)}; });
    twice("flow_norm_backward",
          [&] { return listed(op<NormBackward>("flow_norm_backward")(grad, states, energy, {}, 1e-6, mode)); });
  }
  const Tensor taps = random({4, 19}, 8);
  twice("short_convolution", [&] { return std::vector<Tensor>{op<Convolution>("short_convolution")(states, taps, {})}; });
  twice("short_convolution_backward",
        [&] { return listed(op<ConvolutionBackward>("short_convolution_backward")(grad, states, taps, {})); });
  const Tensor weight = random({2, 3, 19}, 4), alpha = random({2}, 5), positions = random({3, 2, 1700, 3}, 6);
  const auto drift = [&] { return op<Drift>("flow_drift")(states, positions, weight, {}, alpha); };
  twice("flow_drift", [&] { return listed(drift()); });
  const Tensor flow = std::get<1>(drift()), to_energy = random({3, 2, 1700}, 7);
  twice("flow_drift_backward", [&] {
    return listed(op<DriftBackward>("flow_drift_backward")(positions, positions, to_energy, states, weight, alpha, flow));
  });
}

void route() {
  const int64_t T = 700, P = 5, I = 67, O = 131;
  const Tensor x = random({T, I}, 1), weights = random({T, P}, 2), patterns = random({P, O, I}, 3), grad = random({T, O}, 4);
  Tensor chosen = random_indices({T, 2}, P - 2, 5);  // -1 to P - 3; each token takes two that differ
  for (int64_t i = 0; i < chosen.numel(); ++i)
    chosen.data<int64_t>()[i] = i % 2 ? (chosen.data<int64_t>()[i - 1] + 1) % P : chosen.data<int64_t>()[i] + 1;
  for (const Maybe& lists : {Maybe(), Maybe(chosen)}) {
    twice("pattern_route",
          [&] { return std::vector<Tensor>{op<Route>("pattern_route")(x, weights, patterns, {}, lists, {}, false)}; });
    twice("pattern_route_backward", [&] {
      return listed(op<RouteBackward>("pattern_route_backward")(grad, x, weights, patterns, lists, {}, true, true, true));
    });
  }
}

void quantized_and_density() {
  const int64_t T = 900, P = 5, I = 67, O = 131, r = 6, rows = P * (r + 1);
  const auto bytes = [](std::vector<int64_t> sizes) {
    Tensor t(sizes, Dtype::Char);
    for (int64_t i = 0; i < t.numel(); ++i) t.data<int8_t>()[i] = static_cast<int8_t>(i * 37 % 255 - 127);
    return t;
  };
  const auto sums = [](std::vector<int64_t> sizes) {
    Tensor t(sizes, Dtype::Int);
    for (int64_t i = 0; i < t.numel(); ++i) t.data<int32_t>()[i] = static_cast<int32_t>(i % 91);
    return t;
  };
  const Tensor x = random({T, I}, 1), weights = random({T, P}, 2), grad = random({T, O}, 3);
  const Tensor packed = bytes({P, (O + 31) / 32, (I + 3) / 4, 32, 4}), scales = random({P, O}, 4), of_rows = sums({P, O});
  twice("quantized_route",
        [&] { return std::vector<Tensor>{op<QuantizedRoute>("quantized_route")(x, weights, packed, scales, of_rows, {})}; });
  const Tensor down = bytes({1, (rows + 31) / 32, (I + 3) / 4, 32, 4}), up = bytes({1, (O + 31) / 32, (P * r + 3) / 4, 32, 4});
  twice("quantized_low_rank", [&] {
    return listed(op<QuantizedLowRank>("quantized_low_rank")(x, down, random({1, rows}, 5), sums({1, rows}), random({P}, 6),
                                                             up, random({1, O}, 7), sums({1, O}), {}));
  });
  const Tensor patterns = random({P, O, I}, 8), threshold = random({T}, 9);
  twice("pattern_route_density",
        [&] { return listed(op<Density>("pattern_route_density")(x, weights, patterns, threshold, {})); });
  twice("pattern_route_density_backward",
        [&] { return listed(op<DensityBackward>("pattern_route_density_backward")(grad, x, weights, patterns, threshold)); });
  twice("magnitude_above", [&] { return std::vector<Tensor>{op<MagnitudeAbove>("magnitude_above")(random({T, 300}, 10), 31)}; });
}

void streams() {
  dfn::Streams<float> index(2, 3);
  const Tensor points = random({500, 2, 3}, 1);
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&, c] {
      std::vector<int64_t> ids(2 * 4);
      std::vector<float> dists(2 * 4);
      for (int i = c; i < 500; i += 4) {
        index.append(points.data<float>() + i * 6, 4, ids.data(), dists.data());
        index.query(points.data<float>() + i * 6, 1, 4, ids.data(), dists.data());
        if (i % 50 == c) dfn::Streams<float>(index).extend(index.points().data(), 1);
      }
    });
  for (auto& caller : callers) caller.join();
  if (index.size() != 500) std::exit(1);
  std::printf("StreamingKNN\n");
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  knn();
  gather();
  norm_and_drift();
  route();
  quantized_and_density();
  streams();
}
