// Raw memory of the host index: no zeroing (the first touch is left to the thread that fills it).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace dfn::knn {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : size_(n) {
    data_ = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64));
    if (!data_) throw std::bad_alloc();
  }
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace dfn::knn
