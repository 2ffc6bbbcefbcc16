// Threads come from outside, so that the same engine runs on torch's pool, on std::thread and on one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfn::knn {

// IEEE arithmetic with denormals while it lives, whatever torch.set_flush_denormal has set for the thread.
class ExactFloats {
 public:
#if defined(__SSE2__)
  ExactFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~ExactFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// run(count, body) calls body(0) ... body(count - 1), at most `threads` of them at a time, and waits for all.
struct Pool {
  int threads = 1;
  std::function<void(int, const std::function<void(int)>&)> run;
};

// Hands out pieces of [0, n) to the workers as they become free: body(worker, begin, end).
template <class Body>
void for_pieces(const Pool& pool, int64_t n, int64_t piece, const Body& body) {
  if (n <= 0) return;
  if (pool.threads <= 1 || n <= piece) {
    const ExactFloats exact;
    for (int64_t at = 0; at < n; at += piece) body(0, at, at + piece < n ? at + piece : n);
    return;
  }
  std::atomic<int64_t> next{0};
  pool.run(pool.threads, [&](int worker) {
    const ExactFloats exact;
    for (;;) {
      const int64_t at = next.fetch_add(piece, std::memory_order_relaxed);
      if (at >= n) return;
      body(worker, at, at + piece < n ? at + piece : n);
    }
  });
}

// One equal share of [0, n) for each worker, in order: body(worker, begin, end).
template <class Body>
void for_shares(const Pool& pool, int64_t n, const Body& body) {
  if (pool.threads <= 1) {
    const ExactFloats exact;
    return body(0, int64_t(0), n);
  }
  pool.run(pool.threads, [&](int worker) {
    const ExactFloats exact;
    body(worker, n * worker / pool.threads, n * (worker + 1) / pool.threads);
  });
}

}  // namespace dfn::knn
