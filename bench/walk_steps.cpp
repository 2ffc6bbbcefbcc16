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
constexpr Key kFar = 0x7F80000000000000;
constexpr int kLanes = 32, kMostDimensions = 16;

struct Shape {
  int D, k, leaf, fan, cap, seeds, bits;
  float middle, reach;
};

struct Box {
  float low[kMostDimensions], high[kMostDimensions];
  uint32_t first;
};

struct Counts {
  double packets = 0, steps = 0, tests = 0, leaves = 0, batches = 0, most_leaves = 0;
};

Key key_of(float d, uint32_t index) {
  uint32_t bits;
  memcpy(&bits, &d, 4);
  return Key(bits) << 32 | index;
}

// J. Skilling, AIP Conference Proceedings 707 (2004)
Key hilbert(uint32_t* x, int D, int bits) {
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
  Key key = 0;
  for (int s = bits - 1; s >= 0; s--)
    for (int a = 0; a < D; a++) key = key << 1 | ((x[a] ^ turn) >> s & 1);
  return key;
}

std::vector<Key> places(const float* x, int64_t N, const Shape& shape) {
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
  float scale = narrow > 0 ? narrow : wide > 0 ? wide : 1, half = 1u << (shape.bits - 1);
  std::vector<Key> keys(N);
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
  std::vector<uint32_t> ids;
  std::vector<float> points;
  std::vector<Box> leaves, nodes, branches;

  explicit Segment(const Shape& s) : shape(s) {}

  template <class Each>
  Box around(Each each) {
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

  std::vector<Box> group(const std::vector<Box>& of) {
    std::vector<Box> boxes;
    for (size_t c = 0; c < of.size(); c += shape.fan)
      boxes.push_back(around([&](auto add) {
        for (size_t e = c; e < std::min(of.size(), c + shape.fan); e++) add(of[e].low, of[e].high, of[e].first);
      }));
    return boxes;
  }

  void build(const float* x) {
    for (uint32_t i : ids) points.insert(points.end(), x + size_t(i) * shape.D, x + size_t(i + 1) * shape.D);
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
};

struct Packet {
  const Segment& in;
  const Shape& shape;
  std::vector<Lane> lanes;
  Box box;
  uint32_t limit = 0;
  Key worst = kFar;
  double steps = 0, tests = 0, leaves = 0, batches = 0;

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

  void merge() {
    size_t K = shape.k > 16 ? 8 : 1 << int(std::ceil(std::log2(std::max(4, shape.k))));
    batches += double((longest() + K - 1) / K) * ((shape.k + K - 1) / K);
    worst = 0;
    for (Lane& lane : lanes) {
      lane.best.insert(lane.best.end(), lane.list.begin(), lane.list.end());
      lane.list.clear();
      std::sort(lane.best.begin(), lane.best.end());
      if (lane.best.size() > size_t(shape.k)) lane.best.resize(shape.k);
      lane.worst = lane.best.size() == size_t(shape.k) ? lane.best.back() : kFar;
      worst = std::max(worst, lane.worst);
    }
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
    if (longest() > size_t(shape.cap - shape.leaf)) merge();
  }

  void test(size_t leaf) {
    tests++;
    for (const Lane& lane : lanes)
      if (least(in.leaves[leaf], lane.q, lane.q, lane.limit) < lane.worst) return look_into(leaf);
  }

  // Children of one box, nearest first.
  template <class Visit>
  void nearest_first(const std::vector<Box>& boxes, size_t from, Visit visit) {
    std::vector<Key> keys;
    for (size_t c = from; c < std::min(boxes.size(), from + shape.fan); c++) keys.push_back(least(boxes[c]));
    for (steps++;; steps++) {
      size_t at = std::min_element(keys.begin(), keys.end()) - keys.begin();
      if (!(keys[at] < worst)) return;
      keys[at] = kFar;
      visit(from + at);
    }
  }

  void walk(size_t seat) {
    size_t middle = seat / shape.leaf, node = middle / shape.fan * shape.fan, end = in.leaves.size();
    size_t first = std::max<int64_t>(node, std::min<int64_t>(int64_t(middle) - shape.seeds / 2, node + shape.fan - shape.seeds));
    size_t last = std::min({first + shape.seeds, node + shape.fan, end});
    for (size_t leaf = first; leaf < last; leaf++) test(leaf);
    for (size_t top = 0; top < in.branches.size(); top += shape.fan)
      nearest_first(in.branches, top, [&](size_t branch) {
        nearest_first(in.nodes, branch * shape.fan, [&](size_t n) {
          std::vector<size_t> pending;
          for (size_t leaf = n * shape.fan; leaf < std::min(end, (n + 1) * shape.fan); leaf++)
            if ((leaf < first || leaf >= last) && least(in.leaves[leaf]) < worst) pending.push_back(leaf);
          for (size_t leaf : pending) test(leaf);
        });
      });
    merge();
  }
};

}  // namespace

// Per packet: packets, steps over boxes, leaves tested, leaves looked into, batches merged, most leaves of any packet.
extern "C" void walk_steps(const float* x, int64_t N, int D, int k, int causal, int leaf, int fan, int seeds, int cap,
                           int bits, float middle, float reach, int early, int every, double* out) {
  Shape shape{D, k, leaf, fan, cap, seeds, bits, middle, reach};
  std::vector<Key> keys = places(x, N, shape);
  std::vector<uint32_t> order(N);
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t i, uint32_t j) { return keys[i] < keys[j]; });
  Counts total;
  for (int64_t size = N, half;; size = half) {  // prefixes
    half = (size + 1) / 2;
    bool shortest = !causal || half <= early;
    Segment segment(shape);
    std::vector<uint32_t> rows, seats;
    for (uint32_t i : order)
      if (i < size) {
        if (shortest || i >= half) rows.push_back(i), seats.push_back(segment.ids.size());
        segment.ids.push_back(i);
      }
    segment.build(x);
    for (size_t r = 0; r < rows.size(); r += size_t(kLanes) * every) {
      size_t n = std::min<size_t>(kLanes, rows.size() - r);
      Packet packet{segment, shape, {}, {}};
      for (size_t l = 0; l < n; l++) {
        packet.lanes.push_back({x + size_t(rows[r + l]) * D, causal ? rows[r + l] : ~0u});
        packet.limit = std::max(packet.limit, packet.lanes.back().limit);
      }
      packet.box = segment.around([&](auto add) {
        for (const Lane& lane : packet.lanes) add(lane.q, lane.q, 0);
      });
      packet.walk((seats[r] + seats[r + n - 1]) / 2);
      total.packets++;
      total.steps += packet.steps;
      total.tests += packet.tests;
      total.leaves += packet.leaves;
      total.batches += packet.batches;
      total.most_leaves = std::max(total.most_leaves, packet.leaves);
    }
    if (shortest) break;
  }
  double p = total.packets;
  double counted[] = {p, total.steps / p, total.tests / p, total.leaves / p, total.batches / p, total.most_leaves};
  memcpy(out, counted, sizeof counted);
}
