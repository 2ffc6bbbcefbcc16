// The way of a group through the cells. Included only by kernels.inl, inside the namespace of one instruction set.

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

// Distance from each query to [lo, hi] along one axis, as it counts in the sum.
template <bool absolute, class T>
DFN_INLINE Lanes<T> edge(const Lanes<T>& q, T lo, T hi) {
  return measure<absolute>(larger(larger(splat(lo) - q, q - splat(hi)), splat(T(0))));
}

template <class T, int D, Mask mask, bool absolute>
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
      e = measure<absolute>(larger(e, splat(T(0))));
      const Lanes<T>& a = slab_first ? slab[h] : strip[h];
      const Lanes<T>& b = slab_first ? strip[h] : slab[h];
      const Lanes<T> lower = order == 2 ? (a + b) + e : order == 1 ? (a + e) + b : (e + a) + b;
      any |= any_less(lower, g.reach[h]);
    }
    return any;
  }

  __attribute__((always_inline)) void at(uint32_t p, int n) const {
    examine<T, D, mask, absolute>(w, g, q, dims, points.coords + p, points.stride, points.ids + p, n, false);
  }

  void walk_strip(uint32_t strip, const Lanes<T>* slab_edge) const {
    Lanes<T> strip_edge[kHalves], both[kHalves];
    for (int h = 0; h < g.halves; ++h) {
      strip_edge[h] = edge<absolute>(q[h * dims + points.strip_axis], points.strip_lo[strip], points.strip_hi[strip]);
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
      lower[h] = slab_edge[h] + measure<absolute>(e);
    }
    return within(lower);
  }

  // False if the slab is out of reach, and so every slab behind it.
  bool walk_slab(uint32_t slab, uint32_t own) const {
    Lanes<T> slab_edge[kHalves];
    for (int h = 0; h < g.halves; ++h)
      slab_edge[h] = edge<absolute>(q[h * dims + points.slab_axis], points.slab_lo[slab], points.slab_hi[slab]);
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
