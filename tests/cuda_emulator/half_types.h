// float16 and bfloat16 in place of CUDA's types: storage and conversions, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = uint32_t{x.bits} << 16;
  float out;
  memcpy(&out, &wide, 4);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t wide;
  memcpy(&wide, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  uint32_t wide = (x.bits & 0x7fffu) << 13;  // the exponent still has float16's bias
  float out;
  memcpy(&out, &wide, 4);
  out *= 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) out = x.bits & 0x3ff ? NAN : INFINITY;
  return x.bits >> 15 ? -out : out;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size == 0) return {sign};
  int exponent;
  std::frexp(size, &exponent);  // size = m * 2^exponent, 0.5 <= m < 1
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // the exponent of the last place
  const float rounded = std::nearbyint(std::ldexp(size, -unit));
  // rounded <= 2048; as bits: 1024 per step of the exponent, subnormals at unit == -24
  return {static_cast<uint16_t>(sign | (static_cast<int>(rounded) + (unit + 24) * 1024))};
}
