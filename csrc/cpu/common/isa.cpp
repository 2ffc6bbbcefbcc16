#include "cpu/common/isa.h"

#include <cstdlib>
#include <string>

namespace dfn {

static Isa detect() {
  Isa best = Isa::baseline;
#if defined(__x86_64__) && !defined(DFN_ONE_ISA)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    best = Isa::avx512;
#endif
  const char* asked = std::getenv("DFN_CPU_ISA");
  if (asked == nullptr) return best;
  const std::string name(asked);
  Isa limit = name == "baseline" ? Isa::baseline : name == "avx2" ? Isa::avx2 : Isa::avx512;
  return limit < best ? limit : best;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace dfn
