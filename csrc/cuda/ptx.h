// The PTX instructions that the kernels use, one thin function each. Kernels contain no asm of their own, so that the
// tests can compile them for the CPU: tests/cuda_emulator/cuda/ptx.h has the same functions, after the PTX ISA's tables.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dfn::ptx {

// The block's dynamic shared memory: the only one the kernels use.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Keeps the compiler from computing what follows from x before a loop, in registers that are wanted there.
__device__ __forceinline__ void keep_here(unsigned& x) { asm volatile("" : "+r"(x)); }
// The pointer, as one number: lest each address is summed up of its parts again.
__device__ __forceinline__ const char* as_one(const char* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// The whole product of two 32-bit numbers, in one instruction; the compiler ends up in 64-bit products by itself.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t x, uint32_t y) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
  return product;
}

// ---- memory ---------------------------------------------------------------------------------------------------------
// Read-only for the kernel; volatile, so that what follows waits in the order of the loads.
__device__ __forceinline__ uint4 load_16_bytes(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
// Both return what was there before.
__device__ __forceinline__ int32_t add_atomically(int32_t* to, int32_t x) { return atomicAdd(to, x); }
__device__ __forceinline__ int64_t add_atomically(int64_t* to, int64_t x) {
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x)));
}

// ---- cp.async: copies Bytes (4, 8 or 16, both sides so aligned), of which those from `valid` on become 0 --------------
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16)  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes), "r"(valid) : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `Pending` last groups of this thread are incomplete. Others' copies need a barrier after it.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- ldmatrix: four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i ---------------
// Of matrix i, a lane gets in out[i] the columns lane % 4 * 2 and the next of row lane / 4.
__device__ __forceinline__ void load_matrix(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}
// The same with rows and columns exchanged.
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}

// ---- mma.m16n8k16: c [16, 8] += a [16, 16] b [16, 8] in float32 -------------------------------------------------------
// With g = lane / 4, q = lane % 4. a: rows g, g + 8, g, g + 8; columns 2 q, 2 q, 2 q + 8, 2 q + 8, each with the next one.
// b: column g; rows 2 q, 2 q + 8, each with the next one. c: rows g, g, g + 8, g + 8; columns 2 q, 2 q + 1, twice.
template <class V>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace dfn::ptx
