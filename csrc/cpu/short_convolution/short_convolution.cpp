// dfn_cpu::short_convolution and its backward. The weight's gradient is summed in chunks of entities and the chunks one
// after the other in double, so that it depends on the shape alone, not on how many threads there are.
#include "cpu/short_convolution/short_convolution.h"

#include <algorithm>
#include <tuple>

#include "common/tensors.h"
#include "cpu/common/memory.h"

namespace dfn {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kChunk = 64;  // entities: as long a sum in float32 as loses nothing to speak of

ConvolutionProblem describe(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& place) {
  ConvolutionProblem g = {};
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions, got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1, "weight: expected [W, d]");
  g.B = x.size(0), g.N = x.size(1), g.d = x.size(2), g.W = weight.size(0);
  g.dtype = dtype_of(x);
  g.accumulate = dtype_of(weight);
  STD_TORCH_CHECK(g.accumulate == (g.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
                  "weight: expected float64 with float64 x, else float32");
  check_dense(weight, "weight", weight.scalar_type(), {g.W, g.d});
  g.weight = weight.data_ptr();
  if (place) {
    check_dense(*place, "place", ScalarType::Long, {g.N});
    g.place = static_cast<const int64_t*>(place->data_ptr());
  }
  g.x = rows_of(x, "x");
  return g;
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& place) {
  ConvolutionProblem g = describe(x, weight, place);
  Tensor out = allocate(x, {g.B, g.N, g.d});
  prefer_huge_pages(out);
  g.out = rows_of(out, "out");
  parallel_for(0, g.B * g.N, grain_size(g.W * g.d), [&](int64_t begin, int64_t end) {
    DFN_CALL_ISA(convolution_forward, g, begin, end);
  });
  return out;
}

template <class A>
void add_up(const A* sums, int64_t chunks, int64_t count, A* total) {
  parallel_for(0, count, grain_size(chunks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double running = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) running += sums[chunk * count + i];
      total[i] = A(running);
    }
  });
}

// -> grad_x, grad_weight
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& place) {
  ConvolutionProblem g = describe(x, weight, place);
  check_shape(grad, "grad", {g.B, g.N, g.d});
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: expected the dtype of x");
  const int64_t entities = g.B * g.N, count = g.W * g.d, chunks = (entities + kChunk - 1) / kChunk;
  Tensor grad_x = allocate(x, {g.B, g.N, g.d});
  prefer_huge_pages(grad_x);
  Tensor grad_weight = allocate(weight, {g.W, g.d}), sums = allocate(weight, {chunks, g.W, g.d});
  g.grad = rows_of(grad, "grad");
  g.grad_x = rows_of(grad_x, "grad_x");
  const bool wide = g.accumulate == Dtype::f64;
  char* const first = static_cast<char*>(sums.data_ptr());
  parallel_for(0, chunks, grain_size(2 * kChunk * count), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t from = chunk * kChunk, to = std::min(from + kChunk, entities);
      DFN_CALL_ISA(convolution_backward, g, from, to, first + chunk * count * (wide ? 8 : 4));
    }
  });
  if (wide)
    add_up(reinterpret_cast<const double*>(first), chunks, count, static_cast<double*>(grad_weight.data_ptr()));
  else
    add_up(reinterpret_cast<const float*>(first), chunks, count, static_cast<float*>(grad_weight.data_ptr()));
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace dfn

STABLE_TORCH_LIBRARY_FRAGMENT(dfn_cpu, m) {
  m.def("short_convolution(Tensor x, Tensor weight, Tensor? place) -> Tensor");
  m.def("short_convolution_backward(Tensor grad, Tensor x, Tensor weight, Tensor? place) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dfn_cpu, CPU, m) {
  m.impl("short_convolution", TORCH_BOX(&dfn::forward));
  m.impl("short_convolution_backward", TORCH_BOX(&dfn::backward));
}
