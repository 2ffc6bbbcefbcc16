// Large arrays: no zeroing, and huge pages where the system gives them. With pages of 4 KiB the first touch of a large
// output costs more time than what is computed for it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensors.h"

namespace dfn {

inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)data, (void)bytes;
#endif
}

// Of a dense tensor that has just been allocated.
inline void prefer_huge_pages(const Tensor& t) {
  prefer_huge_pages(t.data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
}

template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t n) : data_(static_cast<T*>(std::malloc(n * sizeof(T) + 1))) {
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data_, n * sizeof(T));
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
