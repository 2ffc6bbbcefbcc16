#include "cpu/farthest_points/farthest_points.h"

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

template <class A>
Farthest pass(const FarthestPoints& g, int64_t chosen, int64_t begin, int64_t end) {
  using Mask = decltype(Vec<A>{} < Vec<A>{});
  const A* coords = static_cast<const A*>(g.coords);
  A* dists = static_cast<A*>(g.dists);
  Vec<A> best = Vec<A>{} - A(2);
  Mask steps = {}, step = {};  // which step a lane's farthest point was met in
  int64_t i = begin;
  for (; i + kLanes<A> <= end; i += kLanes<A>, step += 1) {
    Vec<A> d = load(dists + i);
    if (chosen >= 0) {
      Vec<A> sum = {};
      for (int a = 0; a < g.dims; ++a) {
        const A* column = coords + a * g.stride;
        const Vec<A> x = load(column + i) - column[chosen];
        sum += x * x;
      }
      d = sum < d ? sum : d;
      store(d, dists + i);
    }
    const Mask farther = d > best;
    best = farther ? d : best;
    steps = farther ? step : steps;
  }
  Farthest out{-2, -1};
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    const int64_t at = begin + int64_t(steps[lane]) * kLanes<A> + lane;
    if (best[lane] > out.dist || (best[lane] == out.dist && at < out.index)) out = {best[lane], at};
  }
  for (; i < end; ++i) {
    A d = dists[i];
    if (chosen >= 0) {
      A sum = 0;
      for (int a = 0; a < g.dims; ++a) {
        const A x = coords[a * g.stride + i] - coords[a * g.stride + chosen];
        sum += x * x;
      }
      dists[i] = d = sum < d ? sum : d;
    }
    if (d > out.dist) out = {d, i};
  }
  return out;
}

}  // namespace

Farthest farthest_point(const FarthestPoints& g, int64_t chosen, int64_t begin, int64_t end) {
  return g.wide ? pass<double>(g, chosen, begin, end) : pass<float>(g, chosen, begin, end);
}

}  // namespace dfn::DFN_ISA
