// Sorting eight lists at once, one per lane. Included only by kernels.inl, inside the namespace of one instruction set.
//
// A key orders a candidate by (distance, id). For float32 both are packed into the 64 bits of a double: the bits of a
// non-negative float order as an integer, the bits of a non-negative double order as its value, and a float's bits
// never reach the NaN patterns of a double (inf = 0x7F800000 in the high word is still finite). So one key costs one
// register, and min and max are single instructions from SSE2 on. float64 keeps (distance, id) as a pair.

constexpr int kKeyWidth = DFN_VECTOR_BYTES / 8;  // lanes of a key register
constexpr int kKeyParts = kLanes / kKeyWidth;

typedef double KeyD __attribute__((vector_size(DFN_VECTOR_BYTES)));
typedef int64_t KeyI __attribute__((vector_size(DFN_VECTOR_BYTES)));
typedef uint32_t HalfI __attribute__((vector_size(DFN_VECTOR_BYTES / 2)));

template <class T>
struct Key;

template <>
struct Key<float> {
  static constexpr int words = 1;  // 64-bit words per lane
  KeyD d;

  DFN_INLINE Key make(const float* dist, uint32_t id) {
    HalfI bits;
    __builtin_memcpy(&bits, dist, sizeof bits);
    return {(KeyD)((__builtin_convertvector(bits, KeyI) << 32) | (int64_t)id)};
  }
  DFN_INLINE Key none() { return {(KeyD)(KeyI{} + (int64_t)0x7F800000FFFFFFFF)}; }
  DFN_INLINE Key load(const double* p) {
    Key r;
    __builtin_memcpy(&r.d, p, sizeof r.d);
    return r;
  }
  DFN_INLINE void store(double* p, const Key& a) { __builtin_memcpy(p, &a.d, sizeof a.d); }
  DFN_INLINE void order(Key& a, Key& b) {
#if DFN_VECTOR_BYTES == 64
    const __m512d x = (__m512d)a.d, y = (__m512d)b.d;
    a.d = (KeyD)_mm512_min_pd(x, y);
    b.d = (KeyD)_mm512_max_pd(x, y);
#elif DFN_VECTOR_BYTES == 32
    const __m256d x = (__m256d)a.d, y = (__m256d)b.d;
    a.d = (KeyD)_mm256_min_pd(x, y);
    b.d = (KeyD)_mm256_max_pd(x, y);
#elif defined(__SSE2__)
    const __m128d x = (__m128d)a.d, y = (__m128d)b.d;
    a.d = (KeyD)_mm_min_pd(x, y);
    b.d = (KeyD)_mm_max_pd(x, y);
#else
    const KeyI less = a.d < b.d;
    const KeyD x = a.d, y = b.d;
    a.d = less ? x : y;
    b.d = less ? y : x;
#endif
  }
};

template <>
struct Key<double> {
  static constexpr int words = 2;
  KeyD d;
  KeyI id;

  DFN_INLINE Key make(const double* dist, uint32_t i) {
    Key r;
    __builtin_memcpy(&r.d, dist, sizeof r.d);
    r.id = KeyI{} + (int64_t)i;
    return r;
  }
  DFN_INLINE Key none() { return {KeyD{} + __builtin_inf(), KeyI{} + (int64_t)kNoPoint}; }
  DFN_INLINE Key load(const double* p) {
    Key r;
    __builtin_memcpy(&r.d, p, sizeof r.d);
    __builtin_memcpy(&r.id, p + kLanes, sizeof r.id);
    return r;
  }
  DFN_INLINE void store(double* p, const Key& a) {
    __builtin_memcpy(p, &a.d, sizeof a.d);
    __builtin_memcpy(p + kLanes, &a.id, sizeof a.id);
  }
  DFN_INLINE void order(Key& a, Key& b) {
    const KeyI less = (a.d < b.d) | ((a.d == b.d) & (a.id < b.id));
    const Key x = a, y = b;
    a.d = less ? x.d : y.d;
    b.d = less ? y.d : x.d;
    a.id = less ? x.id : y.id;
    b.id = less ? y.id : x.id;
  }
};

// A list of N keys per lane lies in memory as [N][words][8] 64-bit words; these work on one register's width of lanes.
template <class T>
constexpr int kRow = Key<T>::words * kLanes;

// Batcher's odd-even merge sort, unrolled at compile time.
template <class T, int Lo, int N, int R>
DFN_INLINE void odd_even_merge(Key<T>* a) {
  if constexpr (R * 2 < N) {
    odd_even_merge<T, Lo, N, R * 2>(a);
    odd_even_merge<T, Lo + R, N, R * 2>(a);
#pragma GCC unroll 32
    for (int i = Lo + R; i + R < Lo + N; i += R * 2) Key<T>::order(a[i], a[i + R]);
  } else {
    Key<T>::order(a[Lo], a[Lo + R]);
  }
}

template <class T, int Lo, int N>
DFN_INLINE void sort_registers(Key<T>* a) {
  if constexpr (N > 1) {
    sort_registers<T, Lo, N / 2>(a);
    sort_registers<T, Lo + N / 2, N / 2>(a);
    odd_even_merge<T, Lo, N, 1>(a);
  }
}

// A bitonic list becomes a sorted one.
template <class T, int Lo, int N>
DFN_INLINE void clean_registers(Key<T>* a) {
  if constexpr (N > 1) {
#pragma GCC unroll 32
    for (int i = 0; i < N / 2; ++i) Key<T>::order(a[Lo + i], a[Lo + i + N / 2]);
    clean_registers<T, Lo, N / 2>(a);
    clean_registers<T, Lo + N / 2, N / 2>(a);
  }
}

template <class T>
DFN_INLINE void clean_memory(double* a, int n) {  // n: a power of two, at least 16
  for (int h = n / 2; h >= 16; h /= 2)
    for (int base = 0; base < n; base += 2 * h)
      for (int i = base; i < base + h; ++i) {
        Key<T> x = Key<T>::load(a + i * kRow<T>), y = Key<T>::load(a + (i + h) * kRow<T>);
        Key<T>::order(x, y);
        Key<T>::store(a + i * kRow<T>, x);
        Key<T>::store(a + (i + h) * kRow<T>, y);
      }
  for (int base = 0; base < n; base += 16) {
    Key<T> r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = Key<T>::load(a + (base + i) * kRow<T>);
    clean_registers<T, 0, 16>(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) Key<T>::store(a + (base + i) * kRow<T>, r[i]);
  }
}

// Sorts `count` <= P pending candidates (distances [.][8], ids [.]) and keeps the K least of them and of `best`.
template <class T, int K, int P>
__attribute__((noinline)) static void absorb(
    double* best, const T* dists, const uint32_t* ids, int count, bool first, double*, int) {
  for (int part = 0; part < kKeyParts; ++part) {
    Key<T> r[P];
    const T* d = dists + part * kKeyWidth;
    double* b = best + part * kKeyWidth;
    if (count == P) {
#pragma GCC unroll 32
      for (int i = 0; i < P; ++i) r[i] = Key<T>::make(d + i * kLanes, ids[i]);
    } else {
#pragma GCC unroll 32
      for (int i = 0; i < P; ++i) r[i] = i < count ? Key<T>::make(d + i * kLanes, ids[i]) : Key<T>::none();
    }
    if constexpr (K == 1) {
#pragma GCC unroll 32
      for (int h = P / 2; h > 0; h /= 2)
        for (int i = 0; i < h; ++i) Key<T>::order(r[i], r[i + h]);
    } else {
      sort_registers<T, 0, P>(r);
    }
    if (!first) {
#pragma GCC unroll 32
      for (int i = 0; i < K; ++i) {
        Key<T> x = Key<T>::load(b + (K - 1 - i) * kRow<T>);
        Key<T>::order(r[i], x);
      }
      clean_registers<T, 0, K>(r);
    }
#pragma GCC unroll 32
    for (int i = 0; i < K; ++i) Key<T>::store(b + i * kRow<T>, r[i]);
  }
}

// The same for K = 32, 64, ..., 1024, through memory.
template <class T>
__attribute__((noinline)) static void absorb_large(
    double* best, const T* dists, const uint32_t* ids, int count, bool first, double* keys, int K) {
  for (int part = 0; part < kKeyParts; ++part) {
    const T* d = dists + part * kKeyWidth;
    double* a = (first ? best : keys) + part * kKeyWidth;
    double* b = best + part * kKeyWidth;
    for (int base = 0; base < K; base += 16) {
      Key<T> r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = base + i < count ? Key<T>::make(d + (base + i) * kLanes, ids[base + i]) : Key<T>::none();
      sort_registers<T, 0, 16>(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) Key<T>::store(a + (base + i) * kRow<T>, r[i]);
    }
    for (int run = 16; run < K; run *= 2)
      for (int base = 0; base < K; base += 2 * run) {
        double* lo = a + base * kRow<T>;
        double* hi = lo + (2 * run - 1) * kRow<T>;
        for (int i = 0; i < run; ++i) {
          Key<T> x = Key<T>::load(lo + i * kRow<T>), y = Key<T>::load(hi - i * kRow<T>);
          Key<T>::order(x, y);
          Key<T>::store(lo + i * kRow<T>, x);
          Key<T>::store(hi - i * kRow<T>, y);
        }
        clean_memory<T>(lo, run);
        clean_memory<T>(lo + run * kRow<T>, run);
      }
    if (first) continue;
    for (int i = 0; i < K; ++i) {
      Key<T> x = Key<T>::load(b + i * kRow<T>), y = Key<T>::load(a + (K - 1 - i) * kRow<T>);
      Key<T>::order(x, y);
      Key<T>::store(b + i * kRow<T>, x);
    }
    clean_memory<T>(b, K);
  }
}

template <class T>
using Absorb = void (*)(double*, const T*, const uint32_t*, int, bool, double*, int);

// K, the length of the lists: the next size that has a network. P, how many candidates are collected for one merge.
DFN_INLINE int list_length(int k) {
  if (k <= 1) return 1;
  int K = 4;
  while (K < k) K *= 2;
  return K;
}
DFN_INLINE int pending_length(int K) { return K < 8 ? 8 : K; }

template <class T>
static Absorb<T> absorb_for(int K) {
  switch (K) {
    case 1: return absorb<T, 1, 8>;
    case 4: return absorb<T, 4, 8>;
    case 8: return absorb<T, 8, 8>;
    case 16: return absorb<T, 16, 16>;
    default: return absorb_large<T>;
  }
}
