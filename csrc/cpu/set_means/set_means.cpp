// dfn_cpu::set_means and its backward: the mean of a number per row over its set, or the running mean up to the row.
// One row after the other in float64, so no other set, and no later row, can change a bit. Meaning: dfn_kernels/packed.py.
#include <algorithm>

#include "common/tensors.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

// body(b, first, end) for every set of every batch entry, on all threads.
template <class Body>
void for_sets(const Tensor& x, const Tensor& ptr, const Body& body) {
  const int64_t B = x.size(0), N = x.size(1), S = ptr.size(0) - 1;
  const int64_t* at = static_cast<const int64_t*>(ptr.data_ptr());
  parallel_for(0, B * S, std::max<int64_t>(1, 16384 * S / std::max<int64_t>(1, N)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / S, at[i % S], at[i % S + 1]);
  });
}

void check(const Tensor& x, const Tensor& ptr) {
  STD_TORCH_CHECK(x.dim() == 2, "values: expected 2 dimensions");
  const int64_t N = x.size(1);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "values: expected float32 or float64");
  check_dense(x, "values", x.scalar_type(), {x.size(0), N});
  check_offsets(ptr, "ptr", N);
}

template <class T>
void means(const Tensor& values, const Tensor& ptr, bool causal, Tensor& out) {
  const int64_t N = values.size(1);
  for_sets(values, ptr, [&](int64_t b, int64_t first, int64_t end) {
    const T* x = static_cast<const T*>(values.data_ptr()) + b * N;
    T* y = static_cast<T*>(out.data_ptr()) + b * N;
    double running = 0;
    for (int64_t i = first; i < end; ++i) {
      running += x[i];
      if (causal) y[i] = T(running / (i - first + 1));
    }
    if (!causal) std::fill(y + first, y + end, T(running / (end - first)));
  });
}

template <class T>
void grads(const Tensor& grad, const Tensor& ptr, bool causal, Tensor& out) {
  const int64_t N = grad.size(1);
  for_sets(grad, ptr, [&](int64_t b, int64_t first, int64_t end) {
    const T* g = static_cast<const T*>(grad.data_ptr()) + b * N;
    T* y = static_cast<T*>(out.data_ptr()) + b * N;
    double running = 0;
    for (int64_t i = end - 1; i >= first; --i) {
      running += causal ? double(g[i]) / (i - first + 1) : double(g[i]);
      if (causal) y[i] = T(running);
    }
    if (!causal) std::fill(y + first, y + end, T(running / (end - first)));
  });
}

Tensor set_means(const Tensor& values, const Tensor& ptr, bool causal) {
  check(values, ptr);
  Tensor out = allocate(values, {values.size(0), values.size(1)});
  values.scalar_type() == ScalarType::Float ? means<float>(values, ptr, causal, out)
                                            : means<double>(values, ptr, causal, out);
  return out;
}

Tensor set_means_backward(const Tensor& grad, const Tensor& ptr, bool causal) {
  check(grad, ptr);
  Tensor out = allocate(grad, {grad.size(0), grad.size(1)});
  grad.scalar_type() == ScalarType::Float ? grads<float>(grad, ptr, causal, out)
                                          : grads<double>(grad, ptr, causal, out);
  return out;
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("set_means(Tensor values, Tensor ptr, bool causal) -> Tensor");
  m.def("set_means_backward(Tensor grad, Tensor ptr, bool causal) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("set_means", TORCH_BOX(&dfn::set_means));
  m.impl("set_means_backward", TORCH_BOX(&dfn::set_means_backward));
}
