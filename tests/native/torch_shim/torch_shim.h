// Just enough of torch's stable ABI to run csrc/cpu without torch: for ThreadSanitizer and the fuzzer, which want every
// instruction of the process for themselves. Memory is exactly as large as the tensor and starts as NaN or -1.
#pragma once

#include <algorithm>
#include <any>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

namespace torch::headeronly {

enum class ScalarType { Byte, Char, Bool, Int, Long, Half, BFloat16, Float, Double };

struct IntHeaderOnlyArrayRef : std::vector<int64_t> {
  using std::vector<int64_t>::vector;
  IntHeaderOnlyArrayRef(const std::vector<int64_t>& v) : std::vector<int64_t>(v) {}
};

}  // namespace torch::headeronly

namespace torch::stable {

using headeronly::IntHeaderOnlyArrayRef;
using headeronly::ScalarType;

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    default: return 8;
  }
}

class Tensor {
 public:
  Tensor(const IntHeaderOnlyArrayRef& sizes, ScalarType type, int fill = 0xFF) : type_(type), sizes_(sizes) {
    strides_.resize(sizes.size());
    int64_t stride = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) strides_[d] = stride, stride *= sizes_[d];
    const size_t bytes = numel() * element_size();
    if (bytes == 0) return;
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes)) throw std::bad_alloc();
    std::memset(data, fill, bytes);
    memory_ = std::shared_ptr<void>(data, std::free);
  }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_.at(d); }
  int64_t stride(int64_t d) const { return strides_.at(d); }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : sizes_) n *= s;
    return n;
  }
  size_t element_size() const { return bytes_of(type_); }
  ScalarType scalar_type() const { return type_; }
  void* data_ptr() const { return memory_.get(); }
  template <class T>
  T* data() const {
    return static_cast<T*>(memory_.get());
  }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (sizes_[d] != 1 && strides_[d] != stride) return numel() == 0;
      stride *= sizes_[d];
    }
    return true;
  }
  Tensor with_shape(std::vector<int64_t> sizes, std::vector<int64_t> strides) const {
    Tensor t = *this;
    t.sizes_ = std::move(sizes), t.strides_ = std::move(strides);
    return t;
  }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }

 private:
  std::shared_ptr<void> memory_;
  ScalarType type_;
  std::vector<int64_t> sizes_, strides_;
};

inline Tensor new_empty(const Tensor& like, const IntHeaderOnlyArrayRef& sizes, std::optional<ScalarType> type = {}) {
  return Tensor(sizes, type.value_or(like.scalar_type()));
}
inline Tensor new_zeros(const Tensor& like, const IntHeaderOnlyArrayRef& sizes) {
  return Tensor(sizes, like.scalar_type(), 0);
}
inline Tensor transpose(const Tensor& t, int64_t a, int64_t b) {
  auto sizes = t.sizes(), strides = t.strides();
  std::swap(sizes.at(a), sizes.at(b));
  std::swap(strides.at(a), strides.at(b));
  return t.with_shape(sizes, strides);
}
// Of a contiguous float32 or float64 tensor.
inline Tensor sum(const Tensor& t, const IntHeaderOnlyArrayRef& dims) {
  std::vector<bool> gone(t.dim());
  for (int64_t d : dims) gone.at(d) = true;
  IntHeaderOnlyArrayRef kept;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (!gone[d]) kept.push_back(t.size(d));
  Tensor out(kept, t.scalar_type(), 0);
  for (int64_t i = 0; i < t.numel(); ++i) {
    int64_t rest = i, to = 0, stride = 1;
    for (int64_t d = t.dim() - 1; d >= 0; --d) {
      if (!gone[d]) to += rest % t.size(d) * stride, stride *= t.size(d);
      rest /= t.size(d);
    }
    if (t.scalar_type() == ScalarType::Double)
      out.data<double>()[to] += t.data<double>()[i];
    else
      out.data<float>()[to] += t.data<float>()[i];
  }
  return out;
}

// ---- threads: as many as the program says, new ones for every loop, none inside of others ----------------------------
inline uint32_t& shim_threads() {
  static uint32_t count = 1;
  return count;
}
inline uint32_t get_num_threads() { return shim_threads(); }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  static thread_local bool inside = false;
  if (begin >= end) return;
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t count = inside ? 1 : std::min<int64_t>(most, get_num_threads());
  if (count == 1) return f(begin, end);
  std::exception_ptr error;
  std::mutex guard;
  std::vector<std::thread> team;
  for (int64_t w = 0; w < count; ++w)
    team.emplace_back([&, w] {
      inside = true;
      try {
        f(begin + (end - begin) * w / count, begin + (end - begin) * (w + 1) / count);
      } catch (...) {
        const std::lock_guard lock(guard);
        error = std::current_exception();
      }
    });
  for (auto& t : team) t.join();
  if (error) std::rethrow_exception(error);
}

// ---- the operators by name ---------------------------------------------------------------------------------------------
class Library {
 public:
  static Library& get() {
    static Library library;
    return library;
  }
  void def(const char*) {}
  template <class F>
  void impl(const char* name, F* f) {
    ops_[name] = f;
  }
  template <class F>
  F* op(const char* name) const {
    return std::any_cast<F*>(ops_.at(name));
  }

 private:
  std::map<std::string, std::any> ops_;
};

}  // namespace torch::stable

#define SHIM_JOIN_(a, b) a##b
#define SHIM_JOIN(a, b) SHIM_JOIN_(a, b)
#define SHIM_LIBRARY(id, m)                                                                                  \
  static void SHIM_JOIN(shim_register_, id)(torch::stable::Library & m);                                     \
  static const bool SHIM_JOIN(shim_done_, id) = (SHIM_JOIN(shim_register_, id)(torch::stable::Library::get()), true); \
  static void SHIM_JOIN(shim_register_, id)([[maybe_unused]] torch::stable::Library & m)
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) SHIM_LIBRARY(__COUNTER__, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) SHIM_LIBRARY(__COUNTER__, m)
#define TORCH_BOX(f) (f)

template <class... Words>
[[noreturn]] void shim_fail(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}
#define STD_TORCH_CHECK(condition, ...) \
  do {                                  \
    if (!(condition)) shim_fail(__VA_ARGS__); \
  } while (0)
