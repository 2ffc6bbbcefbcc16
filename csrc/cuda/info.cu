// dfn_cuda::built_for: which real architectures this library holds code for.
#include "common/tensors.h"

#include <string>

namespace {
std::string built_for() { return "sm_80, sm_90a, compute_80 PTX"; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cuda, m) { m.def("built_for() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dfn_cuda, CompositeExplicitAutograd, m) { m.impl("built_for", TORCH_BOX(&built_for)); }
