// The instructions of sm_90a: cluster, mbarrier, bulk tensor copies (TMA), wgmma.
// Semantics: PTX ISA, the chapters named at each part. tests/cuda_emulator has a header of the same name and functions
// that runs them on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.h"
#include "cuda/tensor_map.h"

// Defined where the code is compiled for sm_90a itself; elsewhere the kernels are empty.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DFN_SM90A 1
#endif

namespace dfn::ptx {

// ---- cluster: blocks that run at the same time and reach each other's shared memory --------------------------------
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster. The threads of a warp may come one by one.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- registers: a whole warpgroup gives back or takes some --------------------------------------------------------
template <int Count>
__device__ inline void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- mbarrier: a phase ends when its arrivals have come and its bytes have landed ----------------------------------
using Barrier = uint64_t;  // in shared memory

__device__ inline void init(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine and to the other blocks of the cluster; then cluster_sync.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// At the barrier of block `rank` of the cluster that lies where `barrier` lies here. It tells that reads are over, so it
// publishes nothing: release at cluster scope would cost a fence of the whole memory.
__device__ inline void arrive_at(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity has ended: 0 for the first, third, ... phase. The phase before the first counts as
// ended, with parity 1.
__device__ inline void wait(Barrier& barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (!ended)
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
}

// ---- TMA: one thread copies a box; its bytes count at the barrier; outside of the tensor it is filled with zeros ---
__device__ inline void copy_box(void* to, const TensorMap& from, int c0, int c1, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&from), "r"(shared_address(&barrier)), "r"(c0), "r"(c1)
      : "memory");
}

// To the same place in every block of the cluster whose bit is set, each told at its own barrier.
__device__ inline void copy_box_to_all(void* to, const TensorMap& from, int c0, int c1, int c2, Barrier& barrier,
                                       uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(&from), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

// ---- wgmma: a warpgroup multiplies 64 x 16 by 16 x N out of shared memory, which descriptors tell where -------------
// Before the first wgmma, and before one whose accumulators other instructions have touched.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` committed groups still read shared memory and write accumulators.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving, copying or computing ahead what these registers hold; accumulators, while wgmma owns them.
template <int Count>
__device__ inline void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int Count>
__device__ inline void pin(uint32_t (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(d[i]));
}

// d = a b, or d += a b: thread `lane` of warp `w` holds, for n = 8 j + 2 (lane % 4) + {0, 1}, in d[4 j + {0, 1}] row
// 16 w + lane / 4 and in d[4 j + {2, 3}] the row 8 below. AlongColumns: how the lines of b lie.
template <class V, int N, bool AlongColumns>
__device__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add);

#define DFN_OUT8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),   \
      "+f"(d[i + 7])
#define DFN_64_NAMES                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "        \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "   \
  "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DFN_96_NAMES                                                                                            \
  DFN_64_NAMES ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "   \
               "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DFN_64_OUT DFN_OUT8(0), DFN_OUT8(8), DFN_OUT8(16), DFN_OUT8(24), DFN_OUT8(32), DFN_OUT8(40), DFN_OUT8(48), DFN_OUT8(56)
#define DFN_96_OUT DFN_64_OUT, DFN_OUT8(64), DFN_OUT8(72), DFN_OUT8(80), DFN_OUT8(88)

// A, B, ADD: the numbers of the operands that follow the accumulators.
#define DFN_WGMMA(V, NAME, N, COLUMNS, TRANSPOSE, OUT, NAMES, A, B, ADD)                                        \
  template <>                                                                                                   \
  __device__ inline void wgmma<V, N, COLUMNS>(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {            \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " ADD ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N     \
                 "k16.f32." NAME "." NAME " {" NAMES "}, " A ", " B ", p, 1, 1, 0, " TRANSPOSE ";\n\t}"         \
                 : OUT                                                                                          \
                 : "l"(a), "l"(b), "r"(int(add)));                                                              \
  }
#define DFN_WGMMAS(V, NAME)                                                                     \
  DFN_WGMMA(V, NAME, 128, false, "0", DFN_64_OUT, DFN_64_NAMES, "%64", "%65", "%66")            \
  DFN_WGMMA(V, NAME, 128, true, "1", DFN_64_OUT, DFN_64_NAMES, "%64", "%65", "%66")             \
  DFN_WGMMA(V, NAME, 192, false, "0", DFN_96_OUT, DFN_96_NAMES, "%96", "%97", "%98")

DFN_WGMMAS(__nv_bfloat16, "bf16")
DFN_WGMMAS(__half, "f16")
#undef DFN_WGMMAS
#undef DFN_WGMMA
#undef DFN_96_OUT
#undef DFN_64_OUT
#undef DFN_96_NAMES
#undef DFN_64_NAMES
#undef DFN_OUT8

}  // namespace dfn::ptx
