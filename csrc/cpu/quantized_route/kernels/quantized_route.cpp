#include "cpu/quantized_route/quantized_route.h"

#include <cstring>

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

constexpr int C = QuantizedProblem::kStrip;

// sums[r][c] = sum over quads and their 4 bytes of tokens[q][r] * patterns[q][c]
template <int R>
void multiply_bytes(int64_t quads, const uint8_t* tokens, const int8_t* patterns, int32_t* sums) {
  for (int i = 0; i < R * C; ++i) sums[i] = 0;
  for (int64_t q = 0; q < quads; ++q, tokens += 4 * R, patterns += 4 * C)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {
        int32_t sum = 0;
        for (int b = 0; b < 4; ++b) sum += static_cast<int32_t>(tokens[4 * r + b]) * patterns[4 * c + b];
        sums[r * C + c] += sum;
      }
}

#if defined(__AVX512F__)
template <int R>
__attribute__((target("avx512vnni"))) void multiply_bytes_vnni(int64_t quads, const uint8_t* tokens,
                                                               const int8_t* patterns, int32_t* sums) {
  __m512i acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  for (int64_t q = 0; q < quads; ++q, tokens += 4 * R, patterns += 4 * C) {
    const __m512i left = _mm512_loadu_si512(patterns), right = _mm512_loadu_si512(patterns + 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t quad;
      std::memcpy(&quad, tokens + 4 * r, 4);
      const __m512i token = _mm512_set1_epi32(quad);
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], token, left);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], token, right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_si512(sums + r * C, acc[r][0]);
    _mm512_storeu_si512(sums + r * C + 16, acc[r][1]);
  }
}
#endif

template <int R>
void route(const QuantizedProblem& g, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t strips = (g.O + C - 1) / C;
  alignas(64) int32_t sums[R * C];
  alignas(64) float total[R * C];
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t o0 = strip * C, columns = g.O - o0 < C ? g.O - o0 : C;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t t0 = panel * R, rows = g.T - t0 < R ? g.T - t0 : R;
      const uint8_t* tokens = g.tokens + panel * g.quads * R * 4;
      for (int i = 0; i < R * C; ++i) total[i] = 0;
      for (int64_t p = 0; p < g.P; ++p) {
        const int8_t* patterns = g.patterns + (p * strips + strip) * g.quads * C * 4;
#if defined(__AVX512F__)
        if (g.vnni) multiply_bytes_vnni<R>(g.quads, tokens, patterns, sums);
        else
#endif
          multiply_bytes<R>(g.quads, tokens, patterns, sums);
        const float* scales = g.scales + p * g.O + o0;
        const int32_t* row_sums = g.sums + p * g.O + o0;
        for (int64_t r = 0; r < rows; ++r) {
          const float weight = (g.weights ? g.weights[(t0 + r) * g.P + p] : 1.0f) * g.token_scales[t0 + r];
          for (int64_t c = 0; c < columns; ++c)  // the tokens' bytes are 128 too large
            total[r * C + c] += weight * scales[c] * static_cast<float>(sums[r * C + c] - 128 * row_sums[c]);
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          g.out[(t0 + r) * g.O + o0 + c] = total[r * C + c] + (g.bias ? g.bias[o0 + c] : 0.0f);
    }
  }
}

}  // namespace

void quantize_tokens(const QuantizedProblem& g, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  const int64_t R = g.panel;
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t r = 0; r < R; ++r) {
      uint8_t* bytes = g.tokens + panel * g.quads * R * 4 + 4 * r;
      const int64_t t = panel * R + r;
      const float* x = g.x + (t < g.T ? t : 0) * g.I;
      uint32_t bits = 0;  // magnitudes compare like their bits, and NaN is the largest
      for (int64_t i = 0; i < g.I; ++i) {
        uint32_t one;
        std::memcpy(&one, x + i, 4);
        one &= 0x7fffffffu;
        bits = one > bits ? one : bits;
      }
      float most;
      std::memcpy(&most, &bits, 4);
      if (t < g.T) g.token_scales[t] = most / 127;  // infinite or NaN: so is the whole row of out
      // 127 / most must be finite: tokens of nothing above 4e-37 count as 0.
      const float inverse = t < g.T && most > 4e-37f && most <= 3.4e38f ? 127 / most : 0.0f;
      for (int64_t i = 0; i < g.I; i += kBlock) {
        const int64_t count = g.I - i < kBlock ? g.I - i : kBlock;
        uint8_t block[kBlock];
        if (inverse > 0 && count == kBlock) {
          for (int64_t j = 0; j < kBlock; ++j)
            block[j] = static_cast<uint8_t>(static_cast<int32_t>(x[i + j] * inverse + 128.5f));
        } else {
          for (int64_t j = 0; j < kBlock; ++j) block[j] = 128;
          if (inverse > 0)
            for (int64_t j = 0; j < count; ++j)
              block[j] = static_cast<uint8_t>(static_cast<int32_t>(x[i + j] * inverse + 128.5f));
        }
        for (int64_t j = 0; j < count; j += 4, bytes += 4 * R) std::memcpy(bytes, block + j, 4);
      }
    }
}

void quantized_route(const QuantizedProblem& g, int64_t begin, int64_t end, int64_t first, int64_t last) {
  switch (g.panel) {
    case 1: return route<1>(g, begin, end, first, last);
    case 2: return route<2>(g, begin, end, first, last);
    case 4: return route<4>(g, begin, end, first, last);
    case 8: return route<8>(g, begin, end, first, last);
    default: return route<14>(g, begin, end, first, last);
  }
}

}  // namespace dfn::DFN_ISA
