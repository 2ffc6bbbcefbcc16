// Which instruction set the CPU kernels run on, decided once per process.
#pragma once

namespace dfn {

enum class Isa { baseline, avx2, avx512 };

// The best one that this CPU has; DFN_CPU_ISA=baseline|avx2|avx512 lowers it (for tests), never raises it.
Isa cpu_isa();

}  // namespace dfn

// Every csrc/cpu/<op>/kernels/*.cpp is compiled once per instruction set, in namespace dfn::<DFN_ISA>.
// DFN_DECLARE_ISA(signature) declares a kernel in each of them; DFN_CALL_ISA(name, args...) calls the right one.
#if defined(__x86_64__) && !defined(DFN_ONE_ISA)
#define DFN_DECLARE_ISA(...)                       \
  namespace baseline { __VA_ARGS__; }              \
  namespace avx2 { __VA_ARGS__; }                  \
  namespace avx512 { __VA_ARGS__; }
#define DFN_CALL_ISA(name, ...)                                              \
  (::dfn::cpu_isa() == ::dfn::Isa::avx512 ? ::dfn::avx512::name(__VA_ARGS__) \
   : ::dfn::cpu_isa() == ::dfn::Isa::avx2 ? ::dfn::avx2::name(__VA_ARGS__)   \
                                          : ::dfn::baseline::name(__VA_ARGS__))
#else
#define DFN_DECLARE_ISA(...) \
  namespace baseline { __VA_ARGS__; }
#define DFN_CALL_ISA(name, ...) ::dfn::baseline::name(__VA_ARGS__)
#endif
