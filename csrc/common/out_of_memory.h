// A bad_alloc that says how much was asked for: MemoryError in the host module, RuntimeError from an operator.
#pragma once

#include <cstdint>
#include <cstdio>
#include <new>

namespace dfn {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(double bytes) { std::snprintf(text_, sizeof text_, "out of memory: %.0f bytes could not be had", bytes); }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[96];
};

}  // namespace dfn
