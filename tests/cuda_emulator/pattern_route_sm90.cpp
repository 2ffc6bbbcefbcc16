// The Hopper kernels of pattern_route in the emulator, for tests/kernels/test_cuda_emulated_sm90.py.
#include "cuda/pattern_route.h"

extern "C" {
using dfn::route::Plan;
using dfn::route::Problem;

bool pattern_route_takes(const Problem* g) { return dfn::route::takes_sm90(*g); }
void pattern_route_plan(const Problem* g, Plan* plan) { *plan = dfn::route::plan_sm90(*g); }
void pattern_route_run(const Problem* g, const Plan* plan) { dfn::route::route_sm90(*g, *plan); }
}
