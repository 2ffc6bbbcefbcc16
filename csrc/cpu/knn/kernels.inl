// The search kernels, compiled once per instruction set by knn_kernel.cpp.
// No std:: templates here: the linker would be free to take another instruction set's copy of them.
//
// A group of up to 16 queries that lie next to each other in one strip walks outward from its own place: strips in
// order of their distance, within a strip from the group's place up and down, eight candidates at a time. A candidate
// that may matter to some lane is appended to a pending list; a full list is sorted and merged into the k best.
//
// Exactness. Float subtraction, multiplication and addition round monotonically, so the squared distance to a
// cell's edge, computed with the same operations in the same order of dimensions, is never above the computed distance
// of a point beyond that edge. Cells are skipped only when it exceeds the k-th distance; at equality the search goes
// on, because a lower id may wait there. `reach` is the float after the k-th distance, so `< reach` means `<= tau`.

#include "cpu/knn/types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfn::knn::DFN_ISA {
namespace {

#include "lanes.h"
#include "network.h"

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
  const T* bound;
  double* best;
  T* pending;
  uint32_t* pending_id;
  double* keys;

  Worker(const Scratch& s, int k, const T* bound)
      : k(k), K(list_length(k)), P(pending_length(K)), room(P + kStep), bound(bound), best((double*)s.best), pending((T*)s.pending),
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
DFN_INLINE void start(const Worker<T>& w, Group<T>& g, Mask mask, bool self_allowed) {
  g.halves = g.count > kLanes ? 2 : 1;
  for (int i = g.count; i < kGroup; ++i) g.id[i] = g.id[g.count - 1];
  for (int h = 0; h < g.halves; ++h) {
    T reach[kLanes];
    typename BitsOf<T>::type self[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t id = g.id[h * kLanes + l];
      reach[l] = w.bound ? after(w.bound[id]) : (T)__builtin_inff();
      self[l] = (typename BitsOf<T>::type)id - (mask == Mask::limit && !self_allowed ? 1 : 0);
    }
    __builtin_memcpy(&g.self[h], self, sizeof self);
    g.reach[h] = load(reach);
    g.pending[h] = 0;
    g.first[h] = true;
  }
}

template <class T>
DFN_INLINE void finish(const Worker<T>& w, Group<T>& g, bool strict, int64_t* out_ids, T* out_dists) {
  for (int h = 0; h < g.halves; ++h) {
    if (g.pending[h] || g.first[h]) flush(w, g, h, g.pending[h], strict);
    const double* best = w.best + (int64_t)h * w.K * kRow<T>;
    const int lanes = g.count - h * kLanes < kLanes ? g.count - h * kLanes : kLanes;
    for (int l = 0; l < lanes; ++l) {
      const int64_t row = (int64_t)g.id[h * kLanes + l] * w.k;
      for (int j = 0; j < w.k; ++j) {
        const double* key = best + j * kRow<T>;
        const T d = key_distance(key, l, T());
        out_ids[row + j] = d < (T)__builtin_inff() ? (int64_t)key_id(key, l, T()) : -1;
        out_dists[row + j] = d;
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
template <class T, int D, Mask mask>
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
          d = dim ? d + x * x : x * x;
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
            d[c] = dim ? d[c] + x * x : x * x;
          }
        } else {
          for (int c = 0; c < n; ++c) {
            const Lanes<T> x = splat(column[c]) - qd;
            d[c] = dim ? d[c] + x * x : x * x;
          }
        }
      }
      for (int c = 0; c < n; ++c) offer(d[c], ids[c]);
    }
    g.pending[h] = count;
    if (count >= w.P) flush(w, g, h, w.P, strict);
  }
}

// The first place p in [a, e) with column[p] >= v, found from a guess.
template <class T>
DFN_INLINE uint32_t locate(const T* column, uint32_t a, uint32_t e, uint32_t guess, T v) {
  if (a >= e) return a;
  uint32_t p = guess < a ? a : guess > e ? e : guess, step = 1;
  uint32_t lo, hi;  // column[lo - 1] < v <= column[hi], where these exist
  if (p < e && column[p] < v) {
    lo = p + 1;
    while (lo + step <= e && column[lo + step - 1] < v) {
      lo += step;
      step *= 2;
    }
    hi = lo + step <= e ? lo + step - 1 : e;
  } else {
    hi = p;
    while (hi - a >= step && !(column[hi - step] < v)) {
      hi -= step;
      step *= 2;
    }
    lo = hi - a >= step ? hi - step + 1 : a;
  }
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo) / 2;
    if (column[mid] < v)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

// Squared distance from each query to [lo, hi] along one axis.
template <class T>
DFN_INLINE Lanes<T> edge(const Lanes<T>& q, T lo, T hi) {
  const Lanes<T> e = larger(larger(splat(lo) - q, q - splat(hi)), splat(T(0)));
  return e * e;
}

template <class T, int D, Mask mask>
struct Walk {
  const Grid<T>& points;
  const Worker<T>& w;
  Group<T>& g;
  const Lanes<T>* q;
  int dims;
  const T* sort_column;
  int order;             // of the sort axis among the three grid axes: 0, 1, 2
  bool slab_first;       // slab_axis < strip_axis
  T middle;              // of the group, along the sort axis
  T strip_middle;
  uint32_t *place_hint, *strip_hint;

  __attribute__((always_inline)) bool within(const Lanes<T>* lower) const {
    bool any = false;
    for (int h = 0; h < g.halves; ++h) any |= any_less(lower[h], g.reach[h]);
    return any;
  }

  // Candidates from p upwards (Up) or below p are at least this far: the bound of the strip plus the sort axis.
  __attribute__((always_inline)) bool alive(const Lanes<T>* slab, const Lanes<T>* strip, T z, bool up) const {
    bool any = false;
    for (int h = 0; h < g.halves; ++h) {
      const Lanes<T> qz = q[h * dims + points.sort_axis];
      Lanes<T> e = up ? splat(z) - qz : qz - splat(z);
      e = larger(e, splat(T(0)));
      e = e * e;
      const Lanes<T>& a = slab_first ? slab[h] : strip[h];
      const Lanes<T>& b = slab_first ? strip[h] : slab[h];
      const Lanes<T> lower = order == 2 ? (a + b) + e : order == 1 ? (a + e) + b : (e + a) + b;
      any |= any_less(lower, g.reach[h]);
    }
    return any;
  }

  __attribute__((always_inline)) void at(uint32_t p, int n) const {
    examine<T, D, mask>(w, g, q, dims, points.coords + p, points.stride, points.ids + p, n, false);
  }

  void walk_strip(uint32_t strip, const Lanes<T>* slab_edge) const {
    Lanes<T> strip_edge[kHalves], both[kHalves];
    for (int h = 0; h < g.halves; ++h) {
      strip_edge[h] = edge(q[h * dims + points.strip_axis], points.strip_lo[strip], points.strip_hi[strip]);
      both[h] = slab_edge[h] + strip_edge[h];
    }
    if (!within(both)) return;
    const uint32_t a = points.strip_begin[strip], e = points.strip_begin[strip + 1];
    uint32_t up = locate(sort_column, a, e, place_hint[strip], middle), down = up;
    place_hint[strip] = up;
    bool go_up = true, go_down = true;
    while (go_up | go_down) {
      if (go_up) {
        go_up = up < e && alive(slab_edge, strip_edge, sort_column[up], true);
        if (go_up) {
          const int n = e - up < kStep ? e - up : kStep;
          at(up, n);
          up += n;
        }
      }
      if (go_down) {
        go_down = down > a && alive(slab_edge, strip_edge, sort_column[down - 1], false);
        if (go_down) {
          const int n = down - a < kStep ? down - a : kStep;
          down -= n;
          at(down, n);
        }
      }
    }
  }

  // Is a strip above (or below) the first one visited, or any strip behind it, within reach? The queries of a group
  // may lie beside different strips of this slab, so only the near side counts: that bound grows from strip to strip.
  __attribute__((always_inline)) bool beyond(const Lanes<T>* slab_edge, T border, bool up) const {
    Lanes<T> lower[kHalves];
    for (int h = 0; h < g.halves; ++h) {
      const Lanes<T> qy = q[h * dims + points.strip_axis];
      const Lanes<T> e = larger(up ? splat(border) - qy : qy - splat(border), splat(T(0)));
      lower[h] = slab_edge[h] + e * e;
    }
    return within(lower);
  }

  // False if the slab is out of reach, and so every slab behind it.
  bool walk_slab(uint32_t slab, uint32_t own) const {
    Lanes<T> slab_edge[kHalves];
    for (int h = 0; h < g.halves; ++h)
      slab_edge[h] = edge(q[h * dims + points.slab_axis], points.slab_lo[slab], points.slab_hi[slab]);
    if (!within(slab_edge)) return false;
    const uint32_t a = points.slab_begin[slab], e = points.slab_begin[slab + 1];
    if (e - a == 1) {
      walk_strip(a, slab_edge);
      return true;
    }
    uint32_t up = own;
    if (own == kNoPoint) {  // the last strip that begins at or below the group
      up = locate(points.strip_lo, a, e, strip_hint[slab], strip_middle);
      strip_hint[slab] = up;
      if (up == e || (up > a && points.strip_lo[up] > strip_middle)) --up;
    }
    uint32_t down = up;
    walk_strip(up++, slab_edge);
    bool go_up = true, go_down = true;
    while (go_up | go_down) {
      go_up = go_up && up < e && beyond(slab_edge, points.strip_lo[up], true);
      if (go_up) walk_strip(up++, slab_edge);
      go_down = go_down && down > a && beyond(slab_edge, points.strip_hi[down - 1], false);
      if (go_down) walk_strip(--down, slab_edge);
    }
    return true;
  }

  void run(uint32_t slab, uint32_t strip) const {
    walk_slab(slab, strip);
    uint32_t up = slab + 1, down = slab;
    bool go_up = true, go_down = true;
    while (go_up | go_down) {
      go_up = go_up && up < points.slabs && walk_slab(up++, kNoPoint);
      go_down = go_down && down > 0 && walk_slab(--down, kNoPoint);
    }
  }
};

template <class T, int D, Mask mask>
static void search_cells(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  const Grid<T>& queries = *s.queries;
  const Grid<T>& points = *s.points;
  const int dims = D > 0 ? D : points.dims;
  const Worker<T> w(scratch, s.k, s.bound);
  Group<T> g;
  Lanes<T>* q = (Lanes<T>*)scratch.queries;
  const int below = (points.slab_axis < points.sort_axis) + (points.strip_axis < points.sort_axis);
  uint32_t strip = 0, slab = 0;
  for (uint32_t lo = 0, hi = queries.strips; lo < hi;) {  // the last strip that begins at or before `begin`
    const uint32_t mid = lo + (hi - lo) / 2;
    if (queries.strip_begin[mid + 1] <= begin)
      strip = lo = mid + 1;
    else
      strip = hi = mid;
  }
  for (uint32_t at = begin; at < end;) {
    while (queries.strip_begin[strip + 1] <= at) ++strip;
    while (points.slab_begin[slab + 1] <= strip) ++slab;
    const uint32_t stop = queries.strip_begin[strip + 1] < end ? queries.strip_begin[strip + 1] : end;
    uint32_t place[kGroup];
    g.count = 0;
    for (; at < stop && g.count < kGroup; ++at) {
      place[g.count] = at;
      g.id[g.count] = queries.ids[at];
      g.count += queries.ids[at] >= s.first_query;
    }
    if (g.count == 0) continue;
    for (int i = g.count; i < kGroup; ++i) place[i] = place[g.count - 1];
    start(w, g, mask, s.self_allowed);
    for (int h = 0; h < g.halves; ++h)
      for (int dim = 0; dim < dims; ++dim) {
        T x[kLanes];
        for (int l = 0; l < kLanes; ++l) x[l] = queries.coords[dim * queries.stride + place[h * kLanes + l]];
        q[h * dims + dim] = load(x);
      }
    const uint32_t middle = place[g.count / 2];
    const Walk<T, D, mask> walk{points, w, g, q, dims, points.coords + points.sort_axis * points.stride, below,
                                points.slab_axis < points.strip_axis,
                                queries.coords[points.sort_axis * queries.stride + middle],
                                queries.coords[points.strip_axis * queries.stride + middle],
                                scratch.place_hint, scratch.strip_hint};
    walk.run(slab, strip);
    finish(w, g, false, s.out_ids, s.out_dists);
  }
}

// Every query against every point; both in ascending order of ids.
template <class T, Mask mask>
static void scan_points(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  const Grid<T>& queries = *s.queries;
  const Grid<T>& points = *s.points;
  const int dims = points.dims;
  const Worker<T> w(scratch, s.k, s.bound);
  Group<T> g;
  Lanes<T>* q = (Lanes<T>*)scratch.queries;
  for (uint32_t at = begin; at < end; at += g.count) {
    g.count = end - at < kGroup ? end - at : kGroup;
    for (int i = 0; i < g.count; ++i) g.id[i] = queries.ids[at + i];
    start(w, g, mask, s.self_allowed);
    for (int h = 0; h < g.halves; ++h)
      for (int dim = 0; dim < dims; ++dim) {
        T x[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          const int i = h * kLanes + l < g.count ? h * kLanes + l : g.count - 1;
          x[l] = queries.coords[dim * queries.stride + at + i];
        }
        q[h * dims + dim] = load(x);
      }
    for (uint32_t p = 0; p < points.n; p += kStep) {
      if (mask == Mask::limit && points.ids[p] > g.id[kGroup - 1]) break;
      const int count = points.n - p < kStep ? points.n - p : kStep;
      examine<T, 0, mask>(w, g, q, dims, points.coords + p, points.stride, points.ids + p, count, true);
    }
    finish(w, g, true, s.out_ids, s.out_dists);
  }
}

template <class T, int D>
static void search_dims(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  switch (s.mask) {
    case Mask::all: return search_cells<T, D, Mask::all>(s, begin, end, scratch);
    case Mask::limit: return search_cells<T, D, Mask::limit>(s, begin, end, scratch);
    case Mask::not_self: return search_cells<T, D, Mask::not_self>(s, begin, end, scratch);
  }
}

template <class T>
static void search(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  if constexpr (sizeof(T) == 4) {  // unrolled for the usual cases only: every copy costs seconds of compilation
    if (s.points->dims == 1) return search_dims<T, 1>(s, begin, end, scratch);
    if (s.points->dims == 2) return search_dims<T, 2>(s, begin, end, scratch);
    if (s.points->dims == 3) return search_dims<T, 3>(s, begin, end, scratch);
  }
  search_dims<T, 0>(s, begin, end, scratch);
}

template <class T>
static void scan(const Search<T>& s, uint32_t begin, uint32_t end, const Scratch& scratch) {
  switch (s.mask) {
    case Mask::all: return scan_points<T, Mask::all>(s, begin, end, scratch);
    case Mask::limit: return scan_points<T, Mask::limit>(s, begin, end, scratch);
    case Mask::not_self: return scan_points<T, Mask::not_self>(s, begin, end, scratch);
  }
}

}  // namespace

extern const KernelTable table;
const KernelTable table = {{search<float>, scan<float>}, {search<double>, scan<double>}};

}  // namespace dfn::knn::DFN_ISA
