// StreamingKNN: NumPy in, NumPy out. The GIL is released while the trees are searched; they guard themselves.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "host/streams.h"

namespace py = pybind11;

namespace dfn {
namespace {

std::string shape_of(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

class StreamingKNN {
 public:
  StreamingKNN(int64_t streams, int64_t dim, const py::object& dtype) : streams_(streams), dim_(dim) {
    if (streams < 0) throw py::value_error("StreamingKNN: streams must not be negative, got " + std::to_string(streams));
    if (dim < 1 || dim > INT32_MAX)
      throw py::value_error("StreamingKNN: dim must be between 1 and 2^31 - 1, got " + std::to_string(dim));
    const py::dtype kind = py::dtype::from_args(dtype);
    if (kind.kind() == 'f' && kind.itemsize() == 4)
      trees_ = std::make_unique<Streams<float>>(streams, static_cast<int>(dim));
    else if (kind.kind() == 'f' && kind.itemsize() == 8)
      trees_ = std::make_unique<Streams<double>>(streams, static_cast<int>(dim));
    else
      throw py::type_error("StreamingKNN: dtype must be float32 or float64, got " + std::string(py::str(kind)));
  }
  StreamingKNN(const StreamingKNN& other) : streams_(other.streams_), dim_(other.dim_) {
    const py::gil_scoped_release nogil;
    std::visit([&](auto& trees) { trees_ = std::make_unique<std::decay_t<decltype(*trees)>>(*trees); }, other.trees_);
  }

  py::tuple append(const py::object& points, int64_t k) {
    return std::visit([&](auto& trees) { return append_as(*trees, points, k); }, trees_);
  }
  void extend(const py::object& points) {
    std::visit([&](auto& trees) { extend_as(*trees, points); }, trees_);
  }
  py::tuple query(const py::object& points, int64_t k) const {
    return std::visit([&](auto& trees) { return query_as(*trees, points, k); }, trees_);
  }

  int64_t size() const {
    const py::gil_scoped_release nogil;
    return std::visit([](auto& trees) { return trees->size(); }, trees_);
  }
  int64_t streams() const { return streams_; }
  int64_t dim() const { return dim_; }
  py::dtype dtype() const { return trees_.index() == 0 ? py::dtype::of<float>() : py::dtype::of<double>(); }

  // Every point ever appended, [S, n, D]: all there is to know.
  py::array points() const {
    return std::visit([&](auto& trees) -> py::array { return points_as(*trees); }, trees_);
  }

 private:
  template <class T>
  py::array_t<T, py::array::c_style> checked(const py::object& given, const char* call, int dims, bool also_2d) const {
    const std::string who = std::string("StreamingKNN.") + call + ": points must ";
    if (!py::isinstance<py::array>(given))
      throw py::type_error(who + "be a NumPy array, got " + std::string(py::str(py::type::of(given).attr("__name__"))));
    const auto points = py::reinterpret_borrow<py::array>(given);
    const bool shaped = (points.ndim() == dims || (also_2d && points.ndim() == 2)) && points.shape(0) == streams_ &&
                        points.shape(points.ndim() - 1) == dim_;
    if (!shaped)
      throw py::value_error(who + "have shape [S, " + (dims == 3 ? also_2d ? "(m,) " : "n, " : "") + "D] with S = " +
                            std::to_string(streams_) + ", D = " + std::to_string(dim_) + ", got " + shape_of(points));
    const bool fits = points.dtype().kind() == 'f' && points.dtype().itemsize() <= static_cast<py::ssize_t>(sizeof(T));
    if (!fits)
      throw py::type_error(who + "be " + std::string(py::str(dtype())) + " or narrower floats, got " +
                           std::string(py::str(points.dtype())));
    return py::array_t<T, py::array::c_style>::ensure(points);
  }

  static int checked_k(int64_t k, const char* call) {
    if (k < 1 || k > 1024)
      throw py::value_error(std::string("StreamingKNN.") + call + ": k must be between 1 and 1024, got " + std::to_string(k));
    return static_cast<int>(k);
  }

  template <class T>
  py::tuple append_as(Streams<T>& trees, const py::object& given, int64_t k) {
    const int n = checked_k(k, "append");
    const auto points = checked<T>(given, "append", 2, false);
    py::array_t<int64_t> ids({streams_, k});
    py::array_t<T> dists({streams_, k});
    const T* p = points.data();
    int64_t* i = ids.mutable_data();
    T* d = dists.mutable_data();
    {
      const py::gil_scoped_release nogil;
      trees.append(p, n, i, d);
    }
    return py::make_tuple(ids, dists);
  }

  template <class T>
  void extend_as(Streams<T>& trees, const py::object& given) {
    const auto points = checked<T>(given, "extend", 3, false);
    const int64_t n = points.shape(1);
    const T* p = points.data();
    const py::gil_scoped_release nogil;
    trees.extend(p, n);
  }

  template <class T>
  py::tuple query_as(const Streams<T>& trees, const py::object& given, int64_t k) const {
    const int n = checked_k(k, "query");
    const auto points = checked<T>(given, "query", 3, true);
    const int64_t m = points.ndim() == 3 ? points.shape(1) : 1;
    std::vector<py::ssize_t> shape(points.shape(), points.shape() + points.ndim());
    shape.back() = k;
    py::array_t<int64_t> ids(shape);
    py::array_t<T> dists(shape);
    const T* p = points.data();
    int64_t* i = ids.mutable_data();
    T* d = dists.mutable_data();
    {
      const py::gil_scoped_release nogil;
      trees.query(p, m, n, i, d);
    }
    return py::make_tuple(ids, dists);
  }

  template <class T>
  py::array points_as(const Streams<T>& trees) const {
    std::vector<T> all;
    {
      const py::gil_scoped_release nogil;
      all = trees.points();
    }
    py::array_t<T> out({streams_, streams_ ? static_cast<int64_t>(all.size()) / (streams_ * dim_) : 0, dim_});
    std::copy(all.begin(), all.end(), out.mutable_data());
    return out;
  }

  int64_t streams_, dim_;
  std::variant<std::unique_ptr<Streams<float>>, std::unique_ptr<Streams<double>>> trees_;
};

}  // namespace

void bind_streaming_knn(py::module_& m) {
  py::class_<StreamingKNN>(m, "StreamingKNN", R"(Exact nearest neighbours among points that keep coming, for decoding step by step.

StreamingKNN(streams, dim, dtype="float32") holds one growing set of points per stream (a batch entry, a head). Arrays
are NumPy's. Order, ties, missing neighbours and distances are those of `knn`, to the bit; a point's index is the number
of points appended to its stream before it. Points with a NaN or an infinity take an index, but are nobody's neighbours.
An append costs O(log n), amortised. Pickles and copies; calls from several threads wait for each other.)")
      .def(py::init<int64_t, int64_t, py::object>(), py::arg("streams"), py::arg("dim"), py::arg("dtype") = "float32")
      .def("append", &StreamingKNN::append, py::arg("points"), py::arg("k"),
           "points [S, D] -> (indices [S, k], sq_dists [S, k]) of the k nearest earlier points; then adds the points.")
      .def("extend", &StreamingKNN::extend, py::arg("points"), "Adds points [S, n, D] without a search.")
      .def("query", &StreamingKNN::query, py::arg("points"), py::arg("k"),
           "points [S, D] or [S, m, D] -> (indices, sq_dists), [S, (m,) k], among all points added so far.")
      .def("__len__", &StreamingKNN::size)
      .def_property_readonly("streams", &StreamingKNN::streams)
      .def_property_readonly("dim", &StreamingKNN::dim)
      .def_property_readonly("dtype", &StreamingKNN::dtype)
      .def_property_readonly("points", &StreamingKNN::points, "Every point added so far, [S, n, D].")
      .def("__copy__", [](const StreamingKNN& self) { return std::make_unique<StreamingKNN>(self); })
      .def("__deepcopy__", [](const StreamingKNN& self, const py::dict&) { return std::make_unique<StreamingKNN>(self); })
      .def("__repr__",
           [](const StreamingKNN& self) {
             return "StreamingKNN(streams=" + std::to_string(self.streams()) + ", dim=" + std::to_string(self.dim()) +
                    ", dtype='" + std::string(py::str(self.dtype())) + "') with " + std::to_string(self.size()) + " points";
           })
      .def(py::pickle(
          [](const StreamingKNN& self) { return py::make_tuple(self.streams(), self.dim(), self.dtype(), self.points()); },
          [](const py::tuple& state) {
            auto made = std::make_unique<StreamingKNN>(state[0].cast<int64_t>(), state[1].cast<int64_t>(), state[2]);
            made->extend(state[3].cast<py::array>());
            return made;
          }));
}

}  // namespace dfn
