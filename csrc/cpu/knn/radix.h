// Ascending order of a few thousand floats, which stay in the cache: least significant digit first, stable.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace dfn::knn {

// Unsigned integers that order like the floats (which have no NaN and no -0 here).
inline uint32_t ordered(float x) {
  uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b ^ ((b >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}
inline uint64_t ordered(double x) {
  uint64_t b;
  std::memcpy(&b, &x, sizeof b);
  return b ^ ((b >> 63) ? ~uint64_t(0) : uint64_t(1) << 63);
}

template <class T>
struct RadixSpace {
  struct Item {
    decltype(ordered(T())) key;
    uint32_t index;
  };
  std::vector<Item> items, other;
  std::vector<uint32_t> order, counts;
};

template <int digit, class T>
typename RadixSpace<T>::Item* radix_sort(uint32_t n, RadixSpace<T>& space) {
  using Item = typename RadixSpace<T>::Item;
  constexpr int bits = 8 * sizeof(Item::key), passes = (bits + digit - 1) / digit;
  constexpr uint32_t radix = 1u << digit, mask = radix - 1;
  Item* items = space.items.data();
  Item* other = space.other.data();
  space.counts.assign(passes * radix, 0);
  uint32_t* counts = space.counts.data();
  for (uint32_t i = 0; i < n; ++i)
    for (int p = 0; p < passes; ++p) ++counts[p * radix + (items[i].key >> (p * digit) & mask)];
  for (int p = 0; p < passes; ++p) {
    uint32_t* next = counts + p * radix;
    if (next[items[0].key >> (p * digit) & mask] == n) continue;  // one digit for all
    uint32_t total = 0;
    for (uint32_t d = 0; d < radix; ++d) {
      const uint32_t c = next[d];
      next[d] = total;
      total += c;
    }
    for (uint32_t i = 0; i < n; ++i) other[next[items[i].key >> (p * digit) & mask]++] = items[i];
    Item* t = items;
    items = other;
    other = t;
  }
  return items;
}

// Returns indices 0..n-1 such that value(order[i]) ascends; equal values keep their order.
template <class T, class Value>
const uint32_t* radix_order(uint32_t n, RadixSpace<T>& space, const Value& value) {
  using Item = typename RadixSpace<T>::Item;
  space.items.resize(n);
  space.order.resize(n);
  Item* items = space.items.data();
  for (uint32_t i = 0; i < n; ++i) items[i] = {ordered(value(i)), i};
  if (n <= 48) {
    for (uint32_t i = 1; i < n; ++i) {
      const Item x = items[i];
      uint32_t j = i;
      for (; j > 0 && items[j - 1].key > x.key; --j) items[j] = items[j - 1];
      items[j] = x;
    }
  } else {
    space.other.resize(n);
    items = n < 2000 ? radix_sort<8>(n, space) : radix_sort<11>(n, space);
  }
  for (uint32_t i = 0; i < n; ++i) space.order[i] = items[i].index;
  return space.order.data();
}

}  // namespace dfn::knn
