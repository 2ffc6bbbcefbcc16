// dfn_cpu::instruction_set: which of the compiled instruction sets runs in this process.
#include "common/tensors.h"
#include "cpu/common/isa.h"

#include <string>

namespace {
std::string instruction_set() {
  const dfn::Isa isa = dfn::cpu_isa();
  return isa == dfn::Isa::avx512 ? "avx512" : isa == dfn::Isa::avx2 ? "avx2" : "baseline";
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) { m.def("instruction_set() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
