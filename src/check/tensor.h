// Tensors of a case: memory whose bytes outside the elements are guarded.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "tessera/tensor_view.h"

namespace tessera::check {

constexpr std::byte kCanary{0xFF};  // NaN in every floating type

// Memory with a view inside. What belongs to no element holds NaN bits, before, between and after the elements.
// No memory, and an undefined view: a tensor that is not given.
struct Tensor {
  std::vector<std::byte> memory;
  MutableTensorView view;

  int64_t base() const { return static_cast<std::byte*>(view.data) - memory.data(); }  // byte of the first element
};

// Calls visit(byte offset from t.data) for each element, in row-major order.
template <class Visit>
void for_each_element(const TensorView& t, Visit visit) {
  std::array<int64_t, 4> n{1, 1, 1, 1}, stride{};
  for (int i = 0; i < t.rank; ++i) {
    n[i] = t.sizes[i];
    stride[i] = t.strides[i];
  }
  const int64_t element = static_cast<int64_t>(size_of(t.dtype));
  for (int64_t a = 0; a < n[0]; ++a) {
    for (int64_t b = 0; b < n[1]; ++b) {
      for (int64_t c = 0; c < n[2]; ++c) {
        for (int64_t d = 0; d < n[3]; ++d) {
          visit((a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]) * element);
        }
      }
    }
  }
}

// Sets each element to make().
template <class Make>
void fill(Tensor& t, Make make) {
  if (!t.view.defined()) return;
  for_each_element(t.view, [&](int64_t offset) {
    store_from_double(static_cast<char*>(t.view.data) + offset, t.view.dtype, 0, make());
  });
}

inline void reset(Tensor& t) { std::fill(t.memory.begin(), t.memory.end(), kCanary); }

// Bytes that belong to no element are as `reset` left them.
inline bool intact(const Tensor& t) {
  if (t.memory.empty()) return true;
  std::vector<std::byte> rest = t.memory;
  const int64_t element = static_cast<int64_t>(size_of(t.view.dtype));
  for_each_element(t.view, [&](int64_t offset) { std::fill_n(rest.begin() + t.base() + offset, element, kCanary); });
  return std::all_of(rest.begin(), rest.end(), [](std::byte b) { return b == kCanary; });
}

template <class View>
View squeeze_batch(View t) {  // [1, ...] as [...]; undefined stays so
  if (!t.defined()) return t;
  for (int i = 0; i + 1 < t.rank; ++i) {
    t.sizes[i] = t.sizes[i + 1];
    t.strides[i] = t.strides[i + 1];
  }
  --t.rank;
  return t;
}

}  // namespace tessera::check
