// Growing trees side by side, one per stream; calls from several threads wait for each other.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/knn/parallel.h"
#include "host/growing_tree.h"

namespace dfn {

template <class T>
class Streams {
 public:
  Streams(int64_t streams, int dims) : dims_(dims), trees_(streams, GrowingTree<T>(dims)) {}
  Streams(const Streams& other) : dims_(other.dims_) {
    const std::lock_guard lock(other.mutex_);
    trees_ = other.trees_;
  }

  // points [S][D] -> ids, dists [S][k] of the k nearest earlier points; then adds the points.
  void append(const T* points, int k, int64_t* ids, T* dists) {
    const std::lock_guard lock(mutex_);
    const knn::ExactFloats exact;
    for (size_t s = 0; s < trees_.size(); ++s) {
      trees_[s].query(points + s * dims_, k, ids + s * k, dists + s * k);
      trees_[s].append(points + s * dims_);
    }
  }

  void extend(const T* points, int64_t n) {  // [S][n][D]
    const std::lock_guard lock(mutex_);
    const knn::ExactFloats exact;
    for (size_t s = 0; s < trees_.size(); ++s) trees_[s].extend(points + s * n * dims_, n);
  }

  // points [S][m][D] -> ids, dists [S][m][k]
  void query(const T* points, int64_t m, int k, int64_t* ids, T* dists) const {
    const std::lock_guard lock(mutex_);
    const knn::ExactFloats exact;
    const int64_t rows = static_cast<int64_t>(trees_.size()) * m;
    for (int64_t r = 0; r < rows; ++r) trees_[r / m].query(points + r * dims_, k, ids + r * k, dists + r * k);
  }

  int64_t size() const {
    const std::lock_guard lock(mutex_);
    return trees_.empty() ? 0 : trees_[0].size();
  }

  // Every point ever appended, [S][n][D].
  std::vector<T> points() const {
    const std::lock_guard lock(mutex_);
    std::vector<T> all;
    for (const auto& tree : trees_) all.insert(all.end(), tree.points().begin(), tree.points().end());
    return all;
  }

 private:
  int dims_;
  std::vector<GrowingTree<T>> trees_;
  mutable std::mutex mutex_;
};

}  // namespace dfn
