// The CUDA kernels of pattern_route in the emulator, for tests/test_cuda_emulated.py: memory comes from the caller.
#include "cuda/pattern_route.h"

extern "C" {
using dfn::route::Plan;
using dfn::route::Problem;

void pattern_route_plan(const Problem* g, int64_t* splits, int64_t* part_columns) {
  const Plan plan = dfn::route::plan_sm80(*g);
  *splits = plan.splits;
  *part_columns = plan.part_columns;
}
void pattern_route_run(const Problem* g, int64_t splits, int64_t part_columns) {
  dfn::route::route_sm80(*g, Plan{splits, part_columns});
}
}
