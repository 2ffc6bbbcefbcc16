#include "cpu/knn/cuts.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dfn::knn {
namespace {

constexpr double kCellWidth = 1.3;  // in radii of the ball of k neighbours; measured: 1.0 to 1.5 hardly differ
constexpr double kUnitBall[] = {1, 2, 3.14159265, 4.18879};

// Some of the finite rows, evenly spread over the ids, as columns [D][rows].
template <class T>
std::vector<std::vector<T>> sample_of(const Rows<T>& rows, int64_t most) {
  std::vector<std::vector<T>> sample(rows.dims);
  const int64_t step = std::max<int64_t>(1, rows.n / most);
  for (auto& column : sample) column.reserve(rows.n / step + 1);
  for (int64_t i = 0; i < rows.n; i += step) {
    const T* row = rows.data + i * rows.dims;
    if (!finite_row(row, rows.dims)) continue;
    for (int d = 0; d < rows.dims; ++d) sample[d].push_back(row[d]);
  }
  return sample;
}

// Of the middle 80 %: outliers must not widen cells.
template <class T>
double length_of(std::vector<T>& column) {
  const int64_t m = static_cast<int64_t>(column.size()), low = m / 10, high = m - 1 - m / 10;
  std::nth_element(column.begin(), column.begin() + low, column.end());
  const double begin = column[low];
  std::nth_element(column.begin() + low, column.begin() + high, column.end());
  return double(column[high]) - begin;
}

}  // namespace

template <class T>
std::vector<T> quantiles(std::vector<T>& sample, int64_t parts) {
  std::sort(sample.begin(), sample.end());
  std::vector<T> cuts;
  const int64_t m = static_cast<int64_t>(sample.size());
  for (int64_t i = 1; i < parts; ++i) {
    const T v = sample[i * m / parts];
    if (v > sample[0] && (cuts.empty() || v > cuts.back())) cuts.push_back(v);
  }
  return cuts;
}

template <class T>
Cuts<T> find_cuts(const Rows<T>& rows, int k) {
  Cuts<T> cuts;
  const int D = rows.dims;
  // Enough for about 50 points a cell of the sample; more would cost small searches more time than it saves them.
  const int64_t most = std::clamp<int64_t>(rows.n / 8, 1024, 16384);
  std::vector<std::vector<T>> sample = sample_of(rows, most);
  if (sample[0].empty()) return cuts;
  const double asked = double((rows.n - 1) / std::max<int64_t>(1, rows.n / most) + 1);
  const double n = std::max(1.0, rows.n * (sample[0].size() / asked));  // finite points, about
  struct Axis {
    double length;
    int dim;
  };
  std::vector<Axis> axes;
  for (int d = 0; d < D; ++d) axes.push_back({length_of(sample[d]), d});
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.length > b.length; });
  axes.resize(std::min(D, 3));
  cuts.sort_axis = axes[0].dim;
  cuts.slab_axis = cuts.strip_axis = cuts.sort_axis;
  double width = 0;
  int used = static_cast<int>(axes.size());
  for (; used > 1; --used) {
    double volume = 1;
    for (int a = 0; a < used; ++a) volume *= axes[a].length / axes[0].length;
    width = axes[0].length * std::pow(k * volume / (kUnitBall[used] * n), 1.0 / used);
    if (axes[used - 1].length > 2 * width) break;
  }
  auto parts = [&](int a, double most) {
    return int64_t(std::max(1.0, std::min(most, axes[a].length / (width * kCellWidth))));
  };
  if (used == 3) {
    cuts.slab_axis = axes[2].dim;
    cuts.strip_axis = axes[1].dim;
    cuts.has_slabs = cuts.has_strips = true;
    cuts.slabs = quantiles(sample[cuts.slab_axis], parts(2, n / 1024));
    cuts.strips_per_slab = static_cast<int>(parts(1, n / (32.0 * (cuts.slabs.size() + 1))));
  } else if (used == 2) {
    cuts.slab_axis = axes[1].dim;
    cuts.has_slabs = true;
    cuts.slabs = quantiles(sample[cuts.slab_axis], parts(1, n / 64));
  } else {  // one strip; cut along the sort axis only so that the pieces can be sorted in parallel
    cuts.slabs = quantiles(sample[cuts.sort_axis], int64_t(n / 4096) + 1);
  }
  return cuts;
}

template <class T>
double share_of_zero_distances(const Rows<T>& rows) {
  using Limits = std::numeric_limits<T>;
  // Different floats whose squared difference underflows lie this close to zero: one unit in the last place of anything
  // larger has a square that does not.
  const T tiny = std::ldexp(std::sqrt(Limits::denorm_min()), Limits::digits);
  const std::vector<std::vector<T>> sample = sample_of(rows, 4096);
  bool any = false;
  for (const auto& column : sample)
    for (T x : column) any |= x != 0 && std::abs(x) < tiny;
  if (!any) return 0;
  const size_t m = sample[0].size(), step = std::max<size_t>(1, m / 64);
  int64_t zeros = 0, pairs = 0;
  std::vector<T> sum(m);
  for (size_t i = 0; i < m; i += step) {
    std::fill(sum.begin(), sum.end(), T(0));
    for (const auto& column : sample)
      for (size_t j = 0; j < m; ++j) sum[j] += (column[j] - column[i]) * (column[j] - column[i]);
    zeros += std::count(sum.begin(), sum.end(), T(0)) - 1;
    pairs += static_cast<int64_t>(m) - 1;
  }
  return pairs ? double(zeros) / pairs : 0;
}

#define DFN_INSTANTIATE(T)                                         \
  template std::vector<T> quantiles(std::vector<T>&, int64_t);     \
  template Cuts<T> find_cuts(const Rows<T>&, int);                 \
  template double share_of_zero_distances(const Rows<T>&);
DFN_INSTANTIATE(float)
DFN_INSTANTIATE(double)

}  // namespace dfn::knn
