// Raw memory of the host index: no zeroing (the first touch is left to the thread that fills it).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/out_of_memory.h"

namespace dfn::knn {

// Asks for large pages before the first touch: a big output is written row by row in the order of the grid, so with
// small pages page faults and TLB misses cost as much as the search.
inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : size_(n) {
    // No byte more than asked for: AddressSanitizer then sees the end.
    void* data = nullptr;
    if (posix_memalign(&data, 64, n * sizeof(T)) != 0) throw OutOfMemory(static_cast<double>(n) * sizeof(T));
    data_ = static_cast<T*>(data);
    prefer_large_pages(data_, n * sizeof(T));
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
