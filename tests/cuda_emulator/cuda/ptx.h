// In place of csrc/cuda/ptx.h: the same functions on the CPU, after the PTX ISA's tables of which lane holds what.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dfn::ptx {

inline char* shared_memory() { return emulator::block().shared; }
inline void keep_here(unsigned&) {}
inline const char* as_one(const char* p) { return p; }
inline uint64_t multiply_wide(uint32_t x, uint32_t y) { return uint64_t{x} * y; }

// ---- memory ---------------------------------------------------------------------------------------------------------
inline uint4 load_16_bytes(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("ld.global.v4: misaligned");
  return *static_cast<const uint4*>(p);
}
template <class T>
T add_atomically(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}

// ---- cp.async -------------------------------------------------------------------------------------------------------
template <int Bytes>
void copy_async(void* shared, const void* global, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::copy_async(shared, global, Bytes, valid);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int Pending>
void copy_wait() {
  emulator::copy_wait(Pending);
}

// ---- ldmatrix -------------------------------------------------------------------------------------------------------
namespace detail {
// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i. Of matrix i, each lane gets
// two neighbours of a row: row lane / 4, columns lane % 4 * 2 and the next; transposed, of a column.
inline void load_matrix(uint32_t (&out)[4], const void* row, bool transposed) {
  emulator::check_shared(row, 16, 16, "ldmatrix");
  struct Call {
    const uint16_t* row;
    uint32_t* out;
  } call{static_cast<const uint16_t*>(row), out};
  emulator::warp_collective(transposed ? "ldmatrix.trans" : "ldmatrix", &call, [transposed](void** slots) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* rows[8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        rows[r] = static_cast<Call*>(slots[8 * i + r])->row;
        banks |= 1u << (reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8);
      }
      emulator::world.bank_conflicts += banks != 0xff;
      for (int lane = 0; lane < 32; ++lane) {
        const int a = lane / 4, b = lane % 4 * 2;
        const uint32_t low = transposed ? rows[b][a] : rows[a][b], high = transposed ? rows[b + 1][a] : rows[a][b + 1];
        static_cast<Call*>(slots[lane])->out[i] = low | high << 16;
      }
    }
  });
}

inline float widen(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float widen(uint16_t bits, __half) { return __half2float({bits}); }
}  // namespace detail

inline void load_matrix(uint32_t (&out)[4], const void* row) { detail::load_matrix(out, row, false); }
inline void load_matrix_transposed(uint32_t (&out)[4], const void* row) { detail::load_matrix(out, row, true); }

// ---- mma.m16n8k16 ---------------------------------------------------------------------------------------------------
// With g = lane / 4, q = lane % 4. a: rows g, g + 8, g, g + 8; columns 2 q, 2 q, 2 q + 8, 2 q + 8, each with the next one.
// b: column g; rows 2 q, 2 q + 8, each with the next one. c: rows g, g, g + 8, g + 8; columns 2 q, 2 q + 1, twice.
template <class V>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Call {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } call{c, a, {b0, b1}};
  emulator::warp_collective("mma.sync", &call, [](void** slots) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Call& of = *static_cast<Call*>(slots[lane]);
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 8; ++i)
        A[g + i / 2 % 2 * 8][2 * q + i % 2 + i / 4 * 8] = detail::widen(of.a[i / 2] >> (i % 2 * 16) & 0xffff, V{});
      for (int i = 0; i < 4; ++i)
        B[2 * q + i % 2 + i / 2 * 8][g] = detail::widen(of.b[i / 2] >> (i % 2 * 16) & 0xffff, V{});
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Call& of = *static_cast<Call*>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = of.c[i];
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
        of.c[i] = sum;
      }
    }
  });
}

}  // namespace dfn::ptx
