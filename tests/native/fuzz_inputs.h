// Bytes of the fuzzer as the arguments of an operator: sizes, coins, tensors.
#pragma once

#include <cstring>

#include "ops.h"

namespace inputs {

using ops::Dtype;
using ops::Tensor;

// Bytes become arguments; where they end, zeros follow.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return at_ >= size_; }
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t between(int64_t low, int64_t high) { return low + (byte() | byte() << 8) % (high - low + 1); }
  bool coin() { return byte() & 1; }
  uint32_t word() {
    uint32_t w = 0;
    for (int i = 0; i < 4; ++i) w |= uint32_t(byte()) << 8 * i;
    return w;
  }
  float real() {
    const uint32_t w = word();
    float x;
    std::memcpy(&x, &w, 4);
    return x;
  }
  int64_t wild(int64_t n) {  // an index: mostly in range
    switch (byte() % 16) {
      case 0: return static_cast<int64_t>(uint64_t(word()) << 32 | word());
      case 1: return n;
      case 2: return -int64_t(byte());
      default: return n > 0 ? between(0, n - 1) : -1;
    }
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// Many floats from few bytes: a palette of any floats, which a generator picks from, and perhaps noise of any scale.
inline Tensor reals(Bytes& in, std::vector<int64_t> sizes, Dtype type) {
  Tensor t(sizes, type);
  float palette[8];
  const int colors = 1 + in.byte() % 8;
  for (int i = 0; i < colors; ++i) palette[i] = in.real();
  const float noise = in.coin() ? in.real() : 0.0f;
  uint32_t state = in.word() | 1;
  for (int64_t i = 0; i < t.numel(); ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = palette[(state >> 20) % colors] + noise * ((state >> 8 & 0xFFF) * 0x1p-12f);
    if (type == Dtype::Double)
      t.data<double>()[i] = x;
    else
      t.data<float>()[i] = x;
  }
  return t;
}

// Whole numbers from -2 to 2 in any dtype, for what only gets multiplied.
inline Tensor plain(std::vector<int64_t> sizes, Dtype type = Dtype::Float) {
  constexpr uint16_t bfloat16[] = {0xC000, 0xBF80, 0, 0x3F80, 0x4000}, half[] = {0xC000, 0xBC00, 0, 0x3C00, 0x4000};
  Tensor t(sizes, type);
  for (int64_t i = 0; i < t.numel(); ++i) switch (type) {
      case Dtype::Double: t.data<double>()[i] = double(i % 5) - 2; break;
      case Dtype::Float: t.data<float>()[i] = float(i % 5) - 2; break;
      case Dtype::BFloat16: t.data<uint16_t>()[i] = bfloat16[i % 5]; break;
      case Dtype::Half: t.data<uint16_t>()[i] = half[i % 5]; break;
      case Dtype::Int: t.data<int32_t>()[i] = int32_t(i % 5) - 2; break;
      default: t.data<int8_t>()[i] = int8_t(i % 5 - 2);
    }
  return t;
}

// What the values are stored in, and what goes with it for positions, weights and sums.
inline Dtype any_float(Bytes& in) {
  constexpr Dtype types[] = {Dtype::Float, Dtype::Double, Dtype::BFloat16, Dtype::Half};
  return types[in.byte() % 4];
}
inline Dtype sums_of(Dtype type) { return type == Dtype::Double ? Dtype::Double : Dtype::Float; }

inline Tensor wild_indices(Bytes& in, std::vector<int64_t> sizes, int64_t n) {
  Tensor t(sizes, Dtype::Long);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<int64_t>()[i] = in.empty() && n > 0 ? i % n : in.wild(n);
  return t;
}

}  // namespace inputs
