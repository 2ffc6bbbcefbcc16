// Vectors for the kernels: GCC/Clang vector extensions, as wide as the instruction set this file is compiled for.
// Everything is in the namespace of that instruction set, so that the copies never mix.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dfn::DFN_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class A> constexpr int kLanes = kBytes / sizeof(A);

template <class A> struct VecOf;
template <> struct VecOf<float> { typedef float type __attribute__((vector_size(kBytes))); };
template <> struct VecOf<double> { typedef double type __attribute__((vector_size(kBytes))); };
template <class A> using Vec = typename VecOf<A>::type;

typedef int32_t IntVec __attribute__((vector_size(kBytes)));
typedef uint32_t UintVec __attribute__((vector_size(kBytes)));
typedef uint16_t ShortVec __attribute__((vector_size(kBytes / 2)));

// ---- one element -------------------------------------------------------------------------------------------------
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  float f;
  if (rest >= 0x7c00) {  // inf, NaN
    const uint32_t bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  // The exponent bias differs by 112, and multiplying by 2^112 also normalises subnormals.
  const uint32_t bits = rest << 13;
  std::memcpy(&f, &bits, 4);
  f *= 5.192296858534828e33f;
  return sign ? -f : f;
#endif
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(double x, double* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
  }
}
inline void from_float(float x, Half* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    out->bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: let the float adder do the rounding at 2^-24
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&bits, &f, 4);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000));
  } else {
    out->bits = static_cast<uint16_t>(sign | (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
  }
#endif
}

// ---- kLanes elements ---------------------------------------------------------------------------------------------
inline Vec<float> load(const float* p) { Vec<float> v; std::memcpy(&v, p, kBytes); return v; }
inline Vec<double> load(const double* p) { Vec<double> v; std::memcpy(&v, p, kBytes); return v; }
inline Vec<float> load(const BFloat16* p) {
  ShortVec s;
  std::memcpy(&s, p, kBytes / 2);
  const UintVec wide = __builtin_convertvector(s, UintVec) << 16;
  Vec<float> v;
  std::memcpy(&v, &wide, kBytes);
  return v;
}
inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = to_float(p[l]);
  return v;
#endif
}

inline void store(Vec<float> v, float* p) { std::memcpy(p, &v, kBytes); }
inline void store(Vec<double> v, double* p) { std::memcpy(p, &v, kBytes); }
inline void store(Vec<float> v, BFloat16* p) {
  UintVec bits;
  std::memcpy(&bits, &v, kBytes);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const ShortVec out = __builtin_convertvector(v != v ? UintVec{} + 0x7fc0 : rounded, ShortVec);
  std::memcpy(p, &out, kBytes / 2);
}
inline void store(Vec<float> v, Half* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int l = 0; l < kLanes<float>; ++l) from_float(v[l], p + l);
#endif
}

template <class A> inline Vec<A> splat(A x) { return x - Vec<A>{}; }

// Lanes are added in halves: as short a chain as there is.
template <class A> inline A sum(Vec<A> v) {
  A lane[kLanes<A>];
  std::memcpy(lane, &v, kBytes);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}
#if defined(__AVX512F__)
template <> inline float sum<float>(Vec<float> v) { return _mm512_reduce_add_ps((__m512)v); }
template <> inline double sum<double>(Vec<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#endif

// a * b + c, rounded once where the CPU can: for sums whose last bit is nobody's contract. (The distances of knn and
// everything written with * and + are not contracted: -ffp-contract=off.)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// ---- exp(x) for x <= 0 -------------------------------------------------------------------------------------------
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts), exp(r) by its Taylor polynomial of degree 7: the error stays
// below 2 units in the last place. Below -87 the result would be subnormal: 0.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const IntVec tiny = x < -87.0f;
  const IntVec nan = x != x;
  const Vec<float> magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (tiny | nan) ? Vec<float>{} : (x * 1.44269504f + magic) - magic;
  const Vec<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec<float> p = splat<float>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec<float> scale;
  std::memcpy(&scale, &exponent, kBytes);
  return tiny ? Vec<float>{} : p * scale;
}

inline void exp_nonpositive(float* x, int64_t n) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(exp_nonpositive(load(x + i)), x + i);
  if (i < n) {
    float tail[L] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof(float));
    store(exp_nonpositive(load(tail)), tail);
    std::memcpy(x + i, tail, (n - i) * sizeof(float));
  }
}
inline void exp_nonpositive(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = ::exp(x[i]);
}

// Scratch memory of one thread. (std::vector would put shared inline functions into this namespace's objects.)
template <class T> struct Scratch {
  T* data;
  explicit Scratch(int64_t n) : data(static_cast<T*>(std::malloc((n > 0 ? n : 1) * sizeof(T)))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace dfn::DFN_ISA

// name<A, V>(problem, ...) for the problem's type of arithmetic A and of stored values V.
#define DFN_BY_DTYPE(problem, name, ...)                                            \
  ((problem).accumulate == Dtype::f64 ? name<double, double>(problem, __VA_ARGS__)  \
   : (problem).dtype == Dtype::f32    ? name<float, float>(problem, __VA_ARGS__)    \
   : (problem).dtype == Dtype::bf16   ? name<float, BFloat16>(problem, __VA_ARGS__) \
                                      : name<float, Half>(problem, __VA_ARGS__))
