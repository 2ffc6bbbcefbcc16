#include "cpu/knn/gradient.h"

#include "cpu/common/simd.h"

namespace dfn::DFN_ISA {
namespace {

// D > 0: so many dimensions. A row's own sum stays in `own` until its last neighbour is seen.
template <int D, class T>
bool add(const knn::Gradient<T>& g, int64_t begin, int64_t end, T* __restrict own) {
  const int64_t dims = D > 0 ? D : g.D;
  bool valid = true;
  for (int64_t i = begin; i < end; ++i) {
    const T* q = (g.queries ? g.queries : g.points) + i * dims;
    const int64_t* index = g.indices + i * g.k;
    const T* grad = g.grad + i * g.grad_row;
    for (int64_t a = 0; a < dims; ++a) own[a] = 0;
    for (int64_t s = 0; s < g.k; ++s) {
      const int64_t j = index[s];
      if (j < 0 || j >= g.N) {
        valid = valid && j == -1;
        continue;
      }
      const T one = grad[s * g.grad_column];
      const T* p = g.points + j * dims;
      T* to = g.to_points ? g.to_points + j * dims : nullptr;
      for (int64_t a = 0; a < dims; ++a) {
        const T away = p[a] - q[a];
        const T push = one * (g.absolute ? T(away > 0) - T(away < 0) : 2 * away);
        own[a] -= push;
        if (to) to[a] += push;
      }
    }
    T* to = g.to_queries ? g.to_queries + i * dims : g.queries ? nullptr : g.to_points + i * dims;
    if (g.to_queries)
      for (int64_t a = 0; a < dims; ++a) to[a] = own[a];
    else if (to)
      for (int64_t a = 0; a < dims; ++a) to[a] += own[a];
  }
  return valid;
}

template <class T>
bool add(const knn::Gradient<T>& g, int64_t begin, int64_t end) {
  const Scratch<T> own(g.D);
  return g.D == 1   ? add<1>(g, begin, end, own.data)
         : g.D == 2 ? add<2>(g, begin, end, own.data)
         : g.D == 3 ? add<3>(g, begin, end, own.data)
                    : add<0>(g, begin, end, own.data);
}

}  // namespace

bool knn_gradient(const knn::Gradient<float>& g, int64_t begin, int64_t end) { return add(g, begin, end); }
bool knn_gradient(const knn::Gradient<double>& g, int64_t begin, int64_t end) { return add(g, begin, end); }

}  // namespace dfn::DFN_ISA
