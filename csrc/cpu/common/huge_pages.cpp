// dfn_cpu::prefer_huge_pages: for large outputs that are allocated in Python.
#include "common/tensors.h"
#include "cpu/common/memory.h"

namespace dfn {
namespace {

void hint(const Tensor& x) { prefer_huge_pages(x); }

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) { m.def("prefer_huge_pages(Tensor x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) { m.impl("prefer_huge_pages", TORCH_BOX(&dfn::hint)); }
