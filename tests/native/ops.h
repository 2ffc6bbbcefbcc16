// The operators of csrc/cpu as typed functions, for programs on the torch shim.
#pragma once

#include "torch_shim.h"

namespace ops {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Dtype = torch::headeronly::ScalarType;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class F>
F* op(const char* name) {
  return torch::stable::Library::get().op<F>(name);
}

using Knn = Pair(const Tensor&, const Maybe&, const Maybe&, const Maybe&, int64_t, bool, bool, int64_t, const Maybe&,
                 const Maybe&, std::optional<double>, bool);
using KnnBackward = Pair(const Tensor&, const Tensor&, const Maybe&, const Tensor&, bool, bool, bool);
using KnnIndex = int64_t(const Tensor&, const Maybe&, const Maybe&);
using KnnForget = void(int64_t);
using Gather = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                      const Maybe&, const Maybe&, bool);
using GatherBackward = Five(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, bool,
                            int64_t);
using SpatialOrder = Tensor(const Tensor&);
using TransposeNeighbors = Pair(const Tensor&, const Tensor&, const Tensor&);
using Drift = Triple(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Tensor&);
using DriftBackward = Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const Tensor&);
using Norm = Tensor(const Tensor&, const Tensor&, const Maybe&, double, std::string);
using NormBackward = Pair(const Tensor&, const Tensor&, const Tensor&, const Maybe&, double, std::string);
using Convolution = Tensor(const Tensor&, const Tensor&, const Maybe&);
using ConvolutionBackward = Pair(const Tensor&, const Tensor&, const Tensor&, const Maybe&);
using SetMeans = Tensor(const Tensor&, const Tensor&, bool);
using FarthestPoints = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, int64_t);
using Route = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, bool);
using RouteBackward = Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, bool,
                           bool, bool);
using QuantizedRoute = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&);
using QuantizedLowRank = Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const Maybe&);
using Density = Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&);
using DensityBackward = Triple(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using MagnitudeAbove = Tensor(const Tensor&, int64_t);

}  // namespace ops
