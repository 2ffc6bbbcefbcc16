// The CUDA kernels of pattern_route in the emulator, for tests/cuda_emulated.py: memory comes from the caller.
#include "cuda/pattern_route.h"

extern "C" {
using dfn::Dtype;
using dfn::route::Plan;
using dfn::route::Problem;

static bool simple(const Problem& g) { return g.dtype == Dtype::f32 || g.dtype == Dtype::f64; }

void pattern_route_plan(const Problem* g, Plan* plan) {
  *plan = simple(*g) ? dfn::route::plan_simple(*g) : dfn::route::plan_sm80(*g);
}
void pattern_route_run(const Problem* g, const Plan* plan) {
  simple(*g) ? dfn::route::route_simple(*g, *plan) : dfn::route::route_sm80(*g, *plan);
}
}
