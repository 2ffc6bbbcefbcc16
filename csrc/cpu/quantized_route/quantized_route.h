// Pattern routing with int8 patterns, on the CPU. Formula, shapes and meaning: dfn_kernels/quantized_route.py.
#pragma once

#include <cstdint>

#include "cpu/common/isa.h"

namespace dfn {

struct QuantizedProblem {
  static constexpr int64_t kStrip = 32;  // columns that are packed together
  int64_t T, P, O, I, quads;   // quads = ceil(I / 4)
  int64_t panel;               // tokens that are packed together: 1, 2, 4, 8 or 14
  bool vnni;                   // the CPU multiplies quads of bytes
  const float* x;              // [T, I]
  const float* weights;        // [T, P], or null: all 1
  const int8_t* patterns;      // [P, ceil(O / 32), quads, 32, 4]
  const float* scales;         // [P, O]
  const int32_t* sums;         // [P, O] sums of the int8 rows
  const float* bias;           // [O] or null
  uint8_t* tokens;             // [ceil(T / panel), quads, panel, 4], x / token_scales + 128
  float* token_scales;         // [T]
  float* out;                  // [T, O]
};

// Fills tokens and token_scales for panels [begin, end).
DFN_DECLARE_ISA(void quantize_tokens(const QuantizedProblem& g, int64_t begin, int64_t end))
// out for strips [begin, end) of ceil(O / 32) and panels [first, last).
DFN_DECLARE_ISA(void quantized_route(const QuantizedProblem& g, int64_t begin, int64_t end, int64_t first, int64_t last))

}  // namespace dfn
