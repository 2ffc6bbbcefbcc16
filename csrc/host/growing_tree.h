// A k-d tree that grows point by point and stays exact: the index behind StreamingKNN.
//
// Leaves hold up to 32 points, or any number of copies of one position. A leaf that overflows is split, a subtree that
// has become lopsided is rebuilt (sorted input would otherwise make a list of it), so an append costs O(log n) amortised.
// The order of neighbours is (squared distance, index); distances are sums in the order of dimensions, each operation
// rounded by itself. Rounding is monotone, so a box computed the same way is never nearer than any of its points: a box
// is skipped only if (its distance, its lowest index) comes after the k-th neighbour found so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace dfn {

template <class T>
class GrowingTree {
 public:
  explicit GrowingTree(int dims) : dims_(dims) {}

  int64_t size() const { return static_cast<int64_t>(points_.size()) / dims_; }
  const std::vector<T>& points() const { return points_; }

  void append(const T* point) {
    const uint32_t id = static_cast<uint32_t>(size());
    points_.insert(points_.end(), point, point + dims_);
    if (finite(point)) insert(id);
  }

  // Many at once: the tree is built anew if they are as many as were there.
  void extend(const T* points, int64_t n) {
    const int64_t before = size();
    if (n < before) {
      for (int64_t i = 0; i < n; ++i) append(points + i * dims_);
      return;
    }
    points_.insert(points_.end(), points, points + n * dims_);
    nodes_.clear(), boxes_.clear(), free_.clear();
    std::vector<uint32_t> ids;
    for (int64_t i = 0; i < size(); ++i)
      if (finite(at(i))) ids.push_back(static_cast<uint32_t>(i));
    root_ = ids.empty() ? kNone : build(ids.data(), ids.data() + ids.size());
  }

  // The k nearest points of q: ids[k], dists[k], padded with -1 and inf.
  void query(const T* q, int k, int64_t* ids, T* dists) const {
    std::fill(ids, ids + k, int64_t(-1));
    std::fill(dists, dists + k, std::numeric_limits<T>::infinity());
    if (root_ == kNone || !finite(q)) return;
    int found = 0;
    // Does (d, id) come after the k-th so far? Infinite distances count as missing.
    auto beyond = [&](T d, uint32_t id) {
      return !(d < dists[k - 1]) && (found < k || d > dists[k - 1] || int64_t(id) > ids[k - 1]);
    };
    auto offer = [&](uint32_t id, T d) {
      if (beyond(d, id)) return;
      int place = found < k ? found++ : k - 1;
      for (; place > 0 && (dists[place - 1] > d || (dists[place - 1] == d && ids[place - 1] > int64_t(id))); --place) {
        dists[place] = dists[place - 1];
        ids[place] = ids[place - 1];
      }
      dists[place] = d;
      ids[place] = id;
    };
    struct Visit {
      int32_t node;
      T distance;
    };
    std::vector<Visit> stack{{root_, box_distance(root_, q)}};
    while (!stack.empty()) {
      const Visit visit = stack.back();
      stack.pop_back();
      const Node& node = nodes_[visit.node];
      if (beyond(visit.distance, node.lowest)) continue;
      if (node.left == kNone) {
        const int64_t count = node.same ? std::min<int64_t>(k, node.ids.size()) : node.ids.size();
        for (int64_t i = 0; i < count; ++i) offer(node.ids[i], distance(q, &node.coords[node.same ? 0 : i * dims_]));
        continue;
      }
      Visit near{node.left, box_distance(node.left, q)}, far{node.right, box_distance(node.right, q)};
      if (far.distance < near.distance || (far.distance == near.distance && q[node.axis] >= node.split)) std::swap(near, far);
      stack.push_back(far);
      stack.push_back(near);
    }
  }

 private:
  static constexpr int32_t kNone = -1;
  static constexpr int64_t kLeaf = 32;

  struct Node {
    int32_t left = kNone, right = kNone;  // kNone: a leaf
    int axis = 0;
    T split = 0;               // left holds x[axis] < split
    uint32_t lowest = 0;       // smallest id
    int64_t weight = 0;        // points, copies in a leaf of one position not counted
    int64_t rebuild_at = 0;    // not before it weighs this much
    bool same = false;         // a leaf of one position: coords has one row
    std::vector<uint32_t> ids;  // of a leaf, ascending
    std::vector<T> coords;      // [ids][D]
  };

  const T* at(int64_t id) const { return points_.data() + id * dims_; }
  T* lo(int32_t node) { return boxes_.data() + int64_t(node) * 2 * dims_; }
  const T* lo(int32_t node) const { return boxes_.data() + int64_t(node) * 2 * dims_; }

  bool finite(const T* x) const {
    return std::all_of(x, x + dims_, [](T v) { return std::isfinite(v); });
  }
  bool equal(const T* a, const T* b) const { return std::equal(a, a + dims_, b); }

  T distance(const T* q, const T* p) const {
    T sum = 0;
    for (int d = 0; d < dims_; ++d) {
      const T x = p[d] - q[d];
      sum += x * x;
    }
    return sum;
  }

  T box_distance(int32_t node, const T* q) const {
    const T *low = lo(node), *high = low + dims_;
    T sum = 0;
    for (int d = 0; d < dims_; ++d) {
      const T x = std::max(std::max(low[d] - q[d], q[d] - high[d]), T(0));
      sum += x * x;
    }
    return sum;
  }

  int32_t new_node() {
    if (!free_.empty()) {
      const int32_t node = free_.back();
      free_.pop_back();
      nodes_[node] = Node();
      return node;
    }
    nodes_.emplace_back();
    boxes_.resize(nodes_.size() * 2 * dims_);
    return static_cast<int32_t>(nodes_.size()) - 1;
  }

  void release(int32_t node) {
    if (nodes_[node].left != kNone) {
      release(nodes_[node].left);
      release(nodes_[node].right);
    }
    free_.push_back(node);
  }

  void collect(int32_t node, std::vector<uint32_t>& ids) const {
    const Node& n = nodes_[node];
    if (n.left == kNone) {
      ids.insert(ids.end(), n.ids.begin(), n.ids.end());
    } else {
      collect(n.left, ids);
      collect(n.right, ids);
    }
  }

  // A balanced subtree of these points (their order is changed).
  int32_t build(uint32_t* begin, uint32_t* end) {
    const int32_t node = new_node();
    T *low = lo(node), *high = low + dims_;
    std::copy(at(*begin), at(*begin) + dims_, low);
    std::copy(low, low + dims_, high);
    uint32_t lowest = *begin;
    for (uint32_t* i = begin; i < end; ++i) {
      grow(node, at(*i));
      lowest = std::min(lowest, *i);
    }
    nodes_[node].lowest = lowest;
    const int64_t n = end - begin;
    int axis = 0;
    for (int d = 1; d < dims_; ++d)
      if (high[d] - low[d] > high[axis] - low[axis]) axis = d;
    const bool same = equal(low, high);
    if (same || n <= kLeaf) {
      Node& leaf = nodes_[node];
      std::sort(begin, end);
      leaf.ids.assign(begin, end);
      leaf.same = same;
      leaf.weight = same ? 1 : n;
      for (int64_t i = 0; i < (same ? 1 : n); ++i) leaf.coords.insert(leaf.coords.end(), at(begin[i]), at(begin[i]) + dims_);
      return node;
    }
    if (!(low[axis] < high[axis]))  // extents that overflow compare as equal: take any axis that can be cut
      for (int d = 0; d < dims_; ++d)
        if (low[d] < high[d]) axis = d;
    auto value = [&](uint32_t id) { return at(id)[axis]; };
    uint32_t* middle = begin + n / 2;
    std::nth_element(begin, middle, end, [&](uint32_t a, uint32_t b) { return value(a) < value(b); });
    T split = value(*middle);
    if (split == low[axis]) {  // more than half at the low end: cut above them
      split = high[axis];
      for (uint32_t* i = begin; i < end; ++i)
        if (value(*i) > low[axis]) split = std::min(split, value(*i));
    }
    middle = std::partition(begin, end, [&](uint32_t id) { return value(id) < split; });
    nodes_[node].axis = axis;
    nodes_[node].split = split;
    const int32_t left = build(begin, middle), right = build(middle, end);
    Node& inner = nodes_[node];
    inner.left = left, inner.right = right;
    inner.weight = nodes_[left].weight + nodes_[right].weight;
    inner.rebuild_at = inner.weight + inner.weight / 2;
    return node;
  }

  void grow(int32_t node, const T* p) {
    T *low = lo(node), *high = low + dims_;
    for (int d = 0; d < dims_; ++d) {
      low[d] = std::min(low[d], p[d]);
      high[d] = std::max(high[d], p[d]);
    }
  }

  void insert(uint32_t id) {
    const T* p = at(id);
    if (root_ == kNone) {
      root_ = build(&id, &id + 1);
      return;
    }
    path_.clear();
    int32_t node = root_;
    for (;;) {
      path_.push_back(node);
      grow(node, p);
      if (nodes_[node].left == kNone) break;
      node = p[nodes_[node].axis] < nodes_[node].split ? nodes_[node].left : nodes_[node].right;
    }
    Node& leaf = nodes_[node];
    leaf.ids.push_back(id);
    if (leaf.same && equal(leaf.coords.data(), p)) return;
    for (int32_t n : path_) ++nodes_[n].weight;
    if (!leaf.same && static_cast<int64_t>(leaf.ids.size()) <= kLeaf) {
      leaf.coords.insert(leaf.coords.end(), p, p + dims_);
      return;
    }
    // The leaf is split; or, if an ancestor is lopsided, the highest such one is built anew.
    size_t from = path_.size() - 1;
    for (size_t i = 0; i + 1 < path_.size(); ++i) {
      const Node& n = nodes_[path_[i]];
      if (n.weight >= n.rebuild_at && 4 * std::max(nodes_[n.left].weight, nodes_[n.right].weight) > 3 * n.weight) {
        from = i;
        break;
      }
    }
    std::vector<uint32_t> ids;
    collect(path_[from], ids);
    const int64_t before = nodes_[path_[from]].weight;
    release(path_[from]);
    const int32_t fresh = build(ids.data(), ids.data() + ids.size());
    for (size_t i = 0; i < from; ++i) nodes_[path_[i]].weight += nodes_[fresh].weight - before;
    if (from == 0) {
      root_ = fresh;
    } else {
      Node& parent = nodes_[path_[from - 1]];
      (parent.left == path_[from] ? parent.left : parent.right) = fresh;
    }
  }

  int dims_;
  std::vector<T> points_;  // [n][D], every point ever appended
  std::vector<Node> nodes_;
  std::vector<T> boxes_;   // [nodes][2][D]: lowest and highest corner
  std::vector<int32_t> free_;
  std::vector<int32_t> path_;
  int32_t root_ = kNone;
};

}  // namespace dfn
