// Farthest point sampling on the CPU: the kernels' interface. Meaning: dfn_kernels/farthest_points.py.
#pragma once

#include "common/problem.h"
#include "cpu/common/isa.h"

namespace dfn {

struct FarthestPoints {
  const void* coords;  // [D][stride], the points as columns; those that are not finite as zeros
  void* dists;         // [n] squared distance to the nearest chosen point; -1 for chosen ones
  int64_t stride;
  int dims;
  bool wide;           // double instead of float
};

struct Farthest {
  double dist;
  int64_t index;
};

// Takes the point `chosen`, if it is not negative, into the distances of the points [begin, end), and finds the farthest
// of them: of equals the first.
DFN_DECLARE_ISA(Farthest farthest_point(const FarthestPoints& g, int64_t chosen, int64_t begin, int64_t end))

}  // namespace dfn
