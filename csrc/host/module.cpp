// dfn_kernels._host: what is stateful and lives on the host. One file per object; this one only lists them.
#include <pybind11/pybind11.h>

namespace dfn {
void bind_streaming_knn(pybind11::module_& m);
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Stateful host objects of dfn_kernels.";
  dfn::bind_streaming_knn(m);
}
