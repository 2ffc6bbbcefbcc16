// What a warp does when a packet of 32 queries walks over the tree of dfn_kernels/triton/knn, counted on the CPU.
// Built and called by walk_steps.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

using Key = uint64_t;  // distance bits << 32 | index
using Place = unsigned __int128;  // on the curve, up to 31 bits an axis
constexpr Key kFar = 0x7F80000000000000;
constexpr int kLanes = 32, kMostDimensions = 16;

struct Shape {
  int D, k, leaf, fan, cap, seeds, bits;
  float middle, reach;
  int firsts;
};

struct Box {
  float low[kMostDimensions], high[kMostDimensions];
  uint32_t first;
};

struct Counts {
  double packets = 0, steps = 0, tests = 0, leaves = 0, thinned = 0, moved = 0, batches = 0, zeros = 0, most_tests = 0;
};

Key key_of(float d, uint32_t index) {
  uint32_t bits;
  memcpy(&bits, &d, 4);
  return Key(bits) << 32 | index;
}

// J. Skilling, AIP Conference Proceedings 707 (2004)
Place hilbert(uint32_t* x, int D, int bits) {
  for (uint32_t bit = 1u << (bits - 1); bit > 1; bit >>= 1)
    for (int a = 0; a < D; a++) {
      uint32_t swap = x[a] & bit ? 0 : (x[0] ^ x[a]) & (bit - 1);
      x[0] ^= x[a] & bit ? bit - 1 : swap;
      if (a > 0) x[a] ^= swap;
    }
  for (int a = 1; a < D; a++) x[a] ^= x[a - 1];
  uint32_t turn = 0;
  for (uint32_t bit = 1u << (bits - 1); bit > 1; bit >>= 1)
    if (x[D - 1] & bit) turn ^= bit - 1;
  Place key = 0;
  for (int s = bits - 1; s >= 0; s--)
    for (int a = 0; a < D; a++) key = key << 1 | ((x[a] ^ turn) >> s & 1);
  return key;
}

std::vector<Place> places(const float* x, int64_t N, const Shape& shape, float& scale) {
  const int D = shape.D, samples = std::min<int64_t>(1024, N);
  std::vector<float> column(samples), center(D);
  float narrow = 0, wide = 0;
  for (int a = 0; a < D; a++) {
    for (int s = 0; s < samples; s++) column[s] = x[(s * N / samples) * D + a];
    std::sort(column.begin(), column.end());
    float low = column[samples / 10], high = column[samples - 1 - samples / 10];
    center[a] = low / 2 + high / 2;
    narrow = std::max(narrow, high / 2 - low / 2);
    wide = std::max(wide, column.back() / 2 - column.front() / 2);
  }
  scale = narrow > 0 ? narrow : wide > 0 ? wide : 1;
  float half = 1u << (shape.bits - 1);
  std::vector<Place> keys(N);
  for (int64_t i = 0; i < N; i++) {
    uint32_t cell[kMostDimensions];
    for (int a = 0; a < D; a++) {
      float t = (x[i * D + a] - center[a]) / scale, far = std::fabs(t);
      if (far > shape.middle) far = shape.middle * (1 + std::log2(far / shape.middle) / 4);
      if (!(far < shape.reach)) far = shape.reach;
      double at = (t < 0 ? -far : far) * (half / shape.reach);
      cell[a] = int64_t(std::min<double>(std::max<double>(std::trunc(at), -half), half - 1.0)) + int64_t(half);
    }
    keys[i] = hilbert(cell, D, shape.bits);
  }
  return keys;
}

struct Segment {
  const Shape& shape;
  const float* all;
  float scale;
  std::vector<uint32_t> ids;
  std::vector<float> points;
  std::vector<Box> leaves, nodes, branches;

  Segment(const Shape& s, const float* x, float scale) : shape(s), all(x), scale(scale) {}

  template <class Each>
  Box around(Each each) const {
    Box box;
    box.first = ~0u;
    std::fill_n(box.low, kMostDimensions, INFINITY);
    std::fill_n(box.high, kMostDimensions, -INFINITY);
    each([&](const float* low, const float* high, uint32_t first) {
      for (int a = 0; a < shape.D; a++) {
        box.low[a] = std::min(box.low[a], low[a]);
        box.high[a] = std::max(box.high[a], high[a]);
      }
      box.first = std::min(box.first, first);
    });
    return box;
  }

  std::vector<Box> group(const std::vector<Box>& of) const {
    std::vector<Box> boxes;
    for (size_t c = 0; c < of.size(); c += shape.fan)
      boxes.push_back(around([&](auto add) {
        for (size_t e = c; e < std::min(of.size(), c + shape.fan); e++) add(of[e].low, of[e].high, of[e].first);
      }));
    return boxes;
  }

  void build() {
    for (uint32_t i : ids) points.insert(points.end(), all + size_t(i) * shape.D, all + size_t(i + 1) * shape.D);
    for (size_t s = 0; s < ids.size(); s += shape.leaf)
      leaves.push_back(around([&](auto add) {
        for (size_t e = s; e < std::min(ids.size(), s + shape.leaf); e++)
          add(&points[e * shape.D], &points[e * shape.D], ids[e]);
      }));
    nodes = group(leaves);
    branches = group(nodes);
  }
};

struct Lane {
  const float* q;
  uint32_t limit;
  Key worst = kFar;
  std::vector<Key> best, list;
  std::vector<uint32_t> near;  // the k smallest distances
  size_t old = 0;
};

struct Packet {
  const Segment& in;
  const Shape& shape;
  std::vector<Lane> lanes;
  Box box;
  uint32_t limit = 0;
  Key worst = kFar;
  double steps = 0, tests = 0, leaves = 0, thinned = 0, moved = 0, batches = 0, zeros = 0;

  Key least(const Box& b, const float* low, const float* high, uint32_t last) const {
    float d = 0;
    for (int a = 0; a < shape.D; a++) {
      float off = std::max(std::max(b.low[a] - high[a], low[a] - b.high[a]), 0.f);
      d = d + off * off;
    }
    return b.first <= last && d < INFINITY ? key_of(d, b.first) : kFar;
  }
  Key least(const Box& b) const { return least(b, box.low, box.high, limit); }

  size_t longest() const {
    size_t most = 0;
    for (const Lane& lane : lanes) most = std::max(most, lane.list.size());
    return most;
  }

  size_t K() const { return shape.k <= 4 ? 4 : shape.k <= 8 ? 8 : 16; }  // of thinning

  void bound() {
    worst = 0;
    for (Lane& lane : lanes) worst = std::max(worst, lane.worst);
  }

  // The k smallest distances tell which keys of the lists are still wanted.
  void thin() {
    size_t fresh = 0;
    for (Lane& lane : lanes) fresh = std::max(fresh, lane.list.size() - lane.old);
    thinned += double((fresh + K() - 1) / K());
    moved += double((longest() + 7) / 8);
    for (Lane& lane : lanes) {
      for (size_t e = lane.old; e < lane.list.size(); e++) lane.near.push_back(lane.list[e] >> 32);
      std::sort(lane.near.begin(), lane.near.end());
      if (lane.near.size() >= size_t(shape.k)) {
        lane.near.resize(shape.k);
        lane.worst = std::min(lane.worst, Key(lane.near.back()) << 32 | 0xFFFFFFFF);
      }
      auto unwanted = [&](Key key) { return !(key < lane.worst); };
      lane.list.erase(std::remove_if(lane.list.begin(), lane.list.end(), unwanted), lane.list.end());
      lane.old = lane.list.size();
    }
  }

  void merge() {
    size_t K = shape.k > 4 ? 8 : 4;
    batches += double((longest() + K - 1) / K) * double((shape.k + K - 1) / K);
    for (Lane& lane : lanes) {
      lane.best.insert(lane.best.end(), lane.list.begin(), lane.list.end());
      lane.list.clear();
      lane.old = 0;
      std::sort(lane.best.begin(), lane.best.end());
      if (lane.best.size() >= size_t(shape.k)) {
        lane.best.resize(shape.k);
        lane.worst = std::min(lane.worst, lane.best.back());
      }
    }
  }

  void full(bool last) {
    if (shape.k <= 16) thin();
    if (shape.k > 16 || last || longest() > size_t(shape.cap - shape.leaf)) merge();
    bound();
  }

  // Where squares of differences round to zero: lanes with k zeros among the first points are done.
  void zeros_first() {
    double expected = shape.k;
    for (int a = 0; a < shape.D; a++) expected *= std::max(std::min(in.scale, 1e-19f) * 4.7e22, 1.0);
    if (!(expected * 2 < shape.firsts)) return;
    std::vector<int> count(lanes.size());
    for (int j = 0; j < shape.firsts; j++) {
      if (j % 8 == 0 && *std::min_element(count.begin(), count.end()) == shape.k) break;
      zeros++;
      for (size_t l = 0; l < lanes.size(); l++) {
        float d = 0;
        for (int a = 0; a < shape.D; a++) {
          float step = in.all[size_t(j) * shape.D + a] - lanes[l].q[a];
          d = d + step * step;
        }
        count[l] += count[l] < shape.k && d == 0 && uint32_t(j) <= lanes[l].limit;
      }
    }
    std::vector<Lane> walk;
    for (size_t l = 0; l < lanes.size(); l++)
      if (count[l] < shape.k) walk.push_back(lanes[l]);
    lanes = walk;
  }

  void look_into(size_t leaf) {
    leaves++;
    for (Lane& lane : lanes)
      for (size_t s = leaf * shape.leaf; s < std::min(in.ids.size(), (leaf + 1) * shape.leaf); s++) {
        float d = 0;
        for (int a = 0; a < shape.D; a++) {
          float step = in.points[s * shape.D + a] - lane.q[a];
          d = d + step * step;
        }
        Key key = key_of(d, in.ids[s]);
        if (key < lane.worst && in.ids[s] <= lane.limit) lane.list.push_back(key);
      }
    if (longest() > size_t(shape.cap - shape.leaf)) full(false);
  }

  bool needed(const Box& b) {
    tests++;
    for (const Lane& lane : lanes)
      if (least(b, lane.q, lane.q, lane.limit) < lane.worst) return true;
    return false;
  }

  void test(size_t leaf) {
    if (needed(in.leaves[leaf])) look_into(leaf);
  }

  // Children of one box, nearest first.
  template <class Visit>
  void nearest_first(const std::vector<Box>& boxes, size_t from, Visit visit) {
    std::vector<Key> keys;
    for (size_t c = from; c < std::min(boxes.size(), from + shape.fan); c++) keys.push_back(least(boxes[c]));
    for (steps++;; steps++) {
      if (worst == kFar && longest() > 0) full(false);  // any bound is better than none
      size_t at = std::min_element(keys.begin(), keys.end()) - keys.begin();
      if (!(keys[at] < worst)) return;
      keys[at] = kFar;
      if (needed(boxes[from + at])) visit(from + at);
    }
  }

  void walk(size_t seat) {
    if (lanes.empty()) return;
    for (const Lane& lane : lanes) limit = std::max(limit, lane.limit);
    box = in.around([&](auto add) {
      for (const Lane& lane : lanes) add(lane.q, lane.q, 0);
    });
    size_t middle = seat / shape.leaf, node = middle / shape.fan * shape.fan, end = in.leaves.size();
    size_t first = std::max<int64_t>(node, std::min<int64_t>(int64_t(middle) - shape.seeds / 2, node + shape.fan - shape.seeds));
    size_t last = std::min({first + shape.seeds, node + shape.fan, end});
    for (size_t leaf = first; leaf < last; leaf++) test(leaf);
    for (size_t top = 0; top < in.branches.size(); top += shape.fan)
      nearest_first(in.branches, top, [&](size_t branch) {
        nearest_first(in.nodes, branch * shape.fan, [&](size_t n) {
          std::vector<Key> keys;
          for (size_t leaf = n * shape.fan; leaf < std::min(end, (n + 1) * shape.fan); leaf++)
            keys.push_back(leaf < first || leaf >= last ? least(in.leaves[leaf]) : kFar);
          for (;;) {
            size_t which = keys.size();
            uint32_t nearest = ~0u;
            for (size_t c = 0; c < keys.size(); c++)
              if (keys[c] < worst && (keys[c] >> 32) / shape.fan < nearest) nearest = (keys[c] >> 32) / shape.fan, which = c;
            if (which == keys.size()) break;
            keys[which] = kFar;
            test(n * shape.fan + which);
          }
        });
      });
    full(true);
  }
};

// Of the queries first, .. end - 1, how far they go before the order jumps.
size_t before_jump(const float* x, int D, const std::vector<uint32_t>& rows, size_t first, size_t end, float jump) {
  float widest = 0, sum = 0;
  size_t at = end;
  for (size_t l = first + 1; l < end; l++) {
    float gap = 0;
    for (int a = 0; a < D; a++) gap = std::max(gap, std::fabs(x[size_t(rows[l]) * D + a] - x[size_t(rows[l - 1]) * D + a]));
    gap = std::min(gap, 1e37f);
    sum += gap;
    if (gap > widest) widest = gap, at = l;
  }
  return widest * jump > sum ? at : end;
}

}  // namespace

// Per packet: packets, steps over boxes, leaves tested, leaves looked into, K distances sorted and merged into the
// nearest, 8 keys of a list moved, K keys sorted and merged into the best, first points looked at, most boxes tested.
extern "C" void walk_steps(const float* x, int64_t N, int D, int k, int causal, int leaf, int fan, int seeds, int cap,
                           int bits, float middle, float reach, int firsts, int early, int every, float jump, double* out) {
  Shape shape{D, k, leaf, fan, cap, seeds, bits, middle, reach, int(std::min<int64_t>(firsts, N))};
  float scale;
  std::vector<Place> keys = places(x, N, shape, scale);
  std::vector<uint32_t> order(N);
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t i, uint32_t j) { return keys[i] < keys[j]; });
  Counts total;
  for (int64_t size = N, half;; size = half) {  // prefixes
    half = (size + 1) / 2;
    bool shortest = !causal || half <= early;
    Segment segment(shape, x, scale);
    std::vector<uint32_t> rows, seats;
    for (uint32_t i : order)
      if (i < size) {
        if (shortest || i >= half) rows.push_back(i), seats.push_back(segment.ids.size());
        segment.ids.push_back(i);
      }
    segment.build();
    for (size_t r = 0; r < rows.size(); r += size_t(kLanes) * every) {
      size_t end = std::min(r + kLanes, rows.size());
      double tests = 0;
      for (size_t first = r, behind; first < end; first = behind) {
        behind = before_jump(x, D, rows, first, end, jump);
        Packet packet{segment, shape, {}, {}};
        for (size_t l = first; l < behind; l++)
          packet.lanes.push_back({x + size_t(rows[l]) * D, causal ? rows[l] : ~0u});
        packet.zeros_first();
        packet.walk((seats[first] + seats[behind - 1]) / 2);
        total.steps += packet.steps;
        total.leaves += packet.leaves;
        total.thinned += packet.thinned;
        total.moved += packet.moved;
        total.batches += packet.batches;
        total.zeros += packet.zeros;
        tests += packet.tests;
      }
      total.packets++;
      total.tests += tests;
      total.most_tests = std::max(total.most_tests, tests);
    }
    if (shortest) break;
  }
  double p = total.packets;
  double counted[] = {p, total.steps / p, total.tests / p, total.leaves / p, total.thinned / p, total.moved / p,
                      total.batches / p, total.zeros / p, total.most_tests};
  memcpy(out, counted, sizeof counted);
}
