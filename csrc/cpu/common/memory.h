// Large arrays: no zeroing, and huge pages where the system gives them. With pages of 4 KiB the first touch of a large
// output costs more time than what is computed for it.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/tensors.h"
#include "cpu/knn/memory.h"

namespace dfn {

// Of a dense tensor that has just been allocated.
inline void prefer_huge_pages(const Tensor& t) {
  knn::prefer_large_pages(t.data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
}

template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t n) : data_(static_cast<T*>(std::malloc(n * sizeof(T) + 1))) {
    if (data_ == nullptr) throw OutOfMemory(static_cast<double>(n) * sizeof(T));
    knn::prefer_large_pages(data_, n * sizeof(T));
  }
  Array(Array&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Array& operator=(Array&& other) noexcept {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  ~Array() { std::free(data_); }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

}  // namespace dfn
