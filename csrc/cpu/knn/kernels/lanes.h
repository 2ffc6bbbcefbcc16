// Eight queries side by side. Included only by kernels.inl, inside the namespace of one instruction set.
// Everything is `static inline`: no symbol leaves the translation unit.

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define DFN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DFN_VECTOR_BYTES 32
#else
#define DFN_VECTOR_BYTES 16
#endif

#define DFN_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 8;

template <class T, int Bytes>
struct Native {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <>
struct BitsOf<int32_t> {
  using type = int32_t;
};
template <>
struct BitsOf<int64_t> {
  using type = int64_t;
};

// Eight values of T in as few registers as the instruction set allows.
template <class T>
struct Lanes {
  static constexpr int bytes = sizeof(T) * kLanes < DFN_VECTOR_BYTES ? sizeof(T) * kLanes : DFN_VECTOR_BYTES;
  static constexpr int parts = sizeof(T) * kLanes / bytes;
  static constexpr int width = kLanes / parts;
  using V = typename Native<T, bytes>::type;
  using M = typename Native<typename BitsOf<T>::type, bytes>::type;
  V v[parts];
};

template <class T>
DFN_INLINE Lanes<T> splat(T x) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) r.v[i] = x - typename Lanes<T>::V{};
  return r;
}

template <class T>
DFN_INLINE Lanes<T> load(const T* p) {
  Lanes<T> r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}

template <class T>
DFN_INLINE void store(T* p, const Lanes<T>& a) {
  __builtin_memcpy(p, &a, sizeof a);
}

#define DFN_LANEWISE(NAME, EXPR)                                                    \
  template <class T>                                                                \
  DFN_INLINE Lanes<T> NAME(const Lanes<T>& a, const Lanes<T>& b) {                  \
    Lanes<T> r;                                                                     \
    for (int i = 0; i < Lanes<T>::parts; ++i) r.v[i] = EXPR;                        \
    return r;                                                                       \
  }
DFN_LANEWISE(operator+, a.v[i] + b.v[i])
DFN_LANEWISE(operator-, a.v[i] - b.v[i])
DFN_LANEWISE(operator*, a.v[i] * b.v[i])
DFN_LANEWISE(larger, (a.v[i] > b.v[i] ? a.v[i] : b.v[i]))
DFN_LANEWISE(smaller, (a.v[i] < b.v[i] ? a.v[i] : b.v[i]))
#undef DFN_LANEWISE

// What a difference along one axis adds to a distance.
template <bool absolute, class T>
DFN_INLINE Lanes<T> measure(const Lanes<T>& x) {
  if constexpr (absolute)
    return larger(x, splat(T(0)) - x);
  else
    return x * x;
}

// Is a < b in any lane?
template <class T>
DFN_INLINE bool any_less(const Lanes<T>& a, const Lanes<T>& b) {
#if DFN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm256_cmp_ps_mask((__m256)a.v[0], (__m256)b.v[0], _CMP_LT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask((__m512d)a.v[0], (__m512d)b.v[0], _CMP_LT_OQ) != 0;
#elif DFN_VECTOR_BYTES == 32
  int mask = 0;
  for (int i = 0; i < Lanes<T>::parts; ++i) {
    if constexpr (sizeof(T) == 4)
      mask |= _mm256_movemask_ps((__m256)(a.v[i] < b.v[i]));
    else
      mask |= _mm256_movemask_pd((__m256d)(a.v[i] < b.v[i]));
  }
  return mask != 0;
#else
  typename Lanes<T>::M m = a.v[0] < b.v[0];
  for (int i = 1; i < Lanes<T>::parts; ++i) m |= a.v[i] < b.v[i];
  typename Native<int64_t, 16>::type w = (typename Native<int64_t, 16>::type)m;
  return (w[0] | w[1]) != 0;
#endif
}

// Where the candidate's id is masked for a query, its distance becomes infinite.
template <class T>
DFN_INLINE Lanes<T> hide(const Lanes<T>& d, const Lanes<typename BitsOf<T>::type>& allowed) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i)
    r.v[i] = allowed.v[i] ? d.v[i] : (typename Lanes<T>::V{} + (T)__builtin_inff());
  return r;
}
