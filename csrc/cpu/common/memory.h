// Large arrays: no zeroing (the first touch is left to the thread that fills them), and huge pages where the system gives
// them. With pages of 4 KiB the first touch of a large output costs more time than what is computed for it, and TLB misses
// as much again where rows are written in the order of a grid. Knows nothing of torch: the host index uses it, too.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/out_of_memory.h"

namespace dfn {

// Of memory that has just been allocated, before its first touch.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Of a dense tensor.
inline void prefer_huge_pages(const auto& tensor) {
  prefer_huge_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
}

template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t n) : size_(n) {
    // No byte more than asked for: AddressSanitizer then sees the end.
    void* data = nullptr;
    if (posix_memalign(&data, 64, n * sizeof(T)) != 0) throw OutOfMemory(static_cast<double>(n) * sizeof(T));
    data_ = static_cast<T*>(data);
    prefer_huge_pages(data_, n * sizeof(T));
  }
  Array(Array&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Array& operator=(Array&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  ~Array() { std::free(data_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace dfn
