// A group of queries that lie next to each other, and what they have found so far. Included only by kernels.inl, inside
// the namespace of one instruction set.

constexpr int kHalves = 2;                 // registers of queries per group
constexpr int kGroup = kHalves * kLanes;
constexpr uint32_t kStep = 8;              // candidates between two looks at the bounds

template <class T>
using Ids = Lanes<typename BitsOf<T>::type>;

// The state of one group during its search.
template <class T>
struct Group {
  int halves;               // in use
  int count;                // queries
  uint32_t id[kGroup];
  Ids<T> self[kHalves];     // ids, or limits for Mask::limit
  Lanes<T> reach[kHalves];  // the value after the k-th distance so far
  int pending[kHalves];
  bool first[kHalves];      // nothing absorbed yet
};

template <class T>
struct Worker {
  Absorb<T> absorb;
  int k, K, P;
  int64_t room;  // of a pending list
  double* best;
  T* pending;
  uint32_t* pending_id;
  double* keys;

  Worker(const Scratch& s, int k)
      : k(k), K(list_length(k)), P(pending_length(K)), room(P + kStep), best((double*)s.best), pending((T*)s.pending),
        pending_id(s.pending_id), keys((double*)s.keys) {
    absorb = absorb_for<T>(K);
  }
};

DFN_INLINE float after(float x) {
  int32_t b;
  __builtin_memcpy(&b, &x, 4);
  b += x < __builtin_inff();
  __builtin_memcpy(&x, &b, 4);
  return x;
}
DFN_INLINE double after(double x) {
  int64_t b;
  __builtin_memcpy(&b, &x, 8);
  b += x < __builtin_inf();
  __builtin_memcpy(&x, &b, 8);
  return x;
}

DFN_INLINE float key_distance(const double* row, int lane, float) {
  uint64_t b;
  __builtin_memcpy(&b, row + lane, 8);
  uint32_t hi = b >> 32;
  float d;
  __builtin_memcpy(&d, &hi, 4);
  return d;
}
DFN_INLINE double key_distance(const double* row, int lane, double) { return row[lane]; }
DFN_INLINE uint32_t key_id(const double* row, int lane, float) {
  uint64_t b;
  __builtin_memcpy(&b, row + lane, 8);
  return (uint32_t)b;
}
DFN_INLINE uint32_t key_id(const double* row, int lane, double) {
  int64_t b;
  __builtin_memcpy(&b, row + kLanes + lane, 8);
  return (uint32_t)b;
}

// Brings the first `count` pending candidates of one half into its best list and tightens its reach. Exhaustive scans
// see ids in ascending order, so for them a later candidate at the k-th distance loses: `strict`.
template <class T>
static void flush(const Worker<T>& w, Group<T>& g, int h, int count, bool strict) {
  T* pd = w.pending + h * w.room * kLanes;
  uint32_t* pi = w.pending_id + h * w.room;
  double* best = w.best + (int64_t)h * w.K * kRow<T>;
  w.absorb(best, pd, pi, count, g.first[h], w.keys, w.K);
  g.first[h] = false;
  const int left = g.pending[h] - count;
  for (int i = 0; i < left; ++i) {
    store(pd + i * kLanes, load(pd + (count + i) * kLanes));
    pi[i] = pi[count + i];
  }
  g.pending[h] = left;
  const double* row = best + (int64_t)(w.k - 1) * kRow<T>;
  T old[kLanes], now[kLanes];
  store(old, g.reach[h]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const T tau = key_distance(row, lane, T());
    now[lane] = strict ? tau : after(tau);
    if (old[lane] < now[lane]) now[lane] = old[lane];
  }
  g.reach[h] = load(now);
}

template <class T>
DFN_INLINE void start(Group<T>& g, Mask mask, bool self_allowed, T within) {
  g.halves = g.count > kLanes ? 2 : 1;
  for (int i = g.count; i < kGroup; ++i) g.id[i] = g.id[g.count - 1];
  for (int h = 0; h < g.halves; ++h) {
    T reach[kLanes];
    typename BitsOf<T>::type self[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t id = g.id[h * kLanes + l];
      reach[l] = within;
      self[l] = (typename BitsOf<T>::type)id - (mask == Mask::limit && !self_allowed ? 1 : 0);
    }
    __builtin_memcpy(&g.self[h], self, sizeof self);
    g.reach[h] = load(reach);
    g.pending[h] = 0;
    g.first[h] = true;
  }
}

template <class T>
DFN_INLINE void finish(const Worker<T>& w, Group<T>& g, bool strict, const Search<T>& s) {
  for (int h = 0; h < g.halves; ++h) {
    if (g.pending[h] || g.first[h]) flush(w, g, h, g.pending[h], strict);
    const double* best = w.best + (int64_t)h * w.K * kRow<T>;
    const int lanes = g.count - h * kLanes < kLanes ? g.count - h * kLanes : kLanes;
    for (int l = 0; l < lanes; ++l) {
      const int64_t row = (int64_t)g.id[h * kLanes + l] * w.k;
      for (int j = 0; j < w.k; ++j) {
        const double* key = best + j * kRow<T>;
        const T d = key_distance(key, l, T());
        const bool found = d < s.within;  // the lanes share their candidates
        s.out_ids[row + j] = found ? s.first_id + (int64_t)key_id(key, l, T()) : -1;
        s.out_dists[row + j] = found ? d : (T)__builtin_inff();
      }
    }
  }
}

template <class T, Mask mask>
DFN_INLINE Ids<T> visible(const Ids<T>& self, uint32_t id) {
  using I = typename BitsOf<T>::type;
  Ids<T> r;
  for (int i = 0; i < Ids<T>::parts; ++i) {
    const typename Ids<T>::V c = typename Ids<T>::V{} + (I)id;
    if constexpr (mask == Mask::limit)
      r.v[i] = (typename Ids<T>::V)(c <= self.v[i]);
    else
      r.v[i] = (typename Ids<T>::V)(c != self.v[i]);
  }
  return r;
}

// Distances of n <= 8 candidates to all queries of the group; those within reach of some lane become pending.
// q[h * D + dim] holds the queries.
template <class T, int D, Mask mask, bool absolute>
DFN_INLINE void examine(const Worker<T>& w, Group<T>& g, const Lanes<T>* q, int dims, const T* coords, int64_t stride,
                        const uint32_t* ids, int n, bool strict) {
  for (int h = 0; h < g.halves; ++h) {
    T* pd = w.pending + h * w.room * kLanes;
    uint32_t* pi = w.pending_id + h * w.room;
    const Lanes<T> reach = g.reach[h];
    const Ids<T> self = g.self[h];
    const Lanes<T>* qh = q + h * dims;
    int count = g.pending[h];
    auto offer = [&](Lanes<T> d, uint32_t id) __attribute__((always_inline)) {
      if constexpr (mask != Mask::all) d = hide<T>(d, visible<T, mask>(self, id));
      store(pd + count * kLanes, d);
      pi[count] = id;
      count += any_less(d, reach);
    };
    if constexpr (D > 0) {
      for (int c = 0; c < n; ++c) {
        Lanes<T> d;
#pragma GCC unroll 4
        for (int dim = 0; dim < D; ++dim) {
          const Lanes<T> x = splat(coords[dim * stride + c]) - qh[dim];
          d = dim ? d + measure<absolute>(x) : measure<absolute>(x);
        }
        offer(d, ids[c]);
      }
    } else {
      Lanes<T> d[kStep];
      for (int dim = 0; dim < dims; ++dim) {
        const T* column = coords + dim * stride;
        const Lanes<T> qd = qh[dim];
        if (n == (int)kStep) {
#pragma GCC unroll 8
          for (int c = 0; c < (int)kStep; ++c) {
            const Lanes<T> x = splat(column[c]) - qd;
            d[c] = dim ? d[c] + measure<absolute>(x) : measure<absolute>(x);
          }
        } else {
          for (int c = 0; c < n; ++c) {
            const Lanes<T> x = splat(column[c]) - qd;
            d[c] = dim ? d[c] + measure<absolute>(x) : measure<absolute>(x);
          }
        }
      }
      for (int c = 0; c < n; ++c) offer(d[c], ids[c]);
    }
    g.pending[h] = count;
    if (count >= w.P) flush(w, g, h, w.P, strict);
  }
}

// Is there a distance that some query of the group could still accept? Not if k at distance zero are known and the scan
// is in the order of ids.
template <class T>
DFN_INLINE bool any_within(const Group<T>& g) {
  bool any = false;
  for (int h = 0; h < g.halves; ++h) any |= any_less(splat(T(0)), g.reach[h]);
  return any;
}
