// Rows of tensors as numbers, and back.
#pragma once

#include <cstdint>

#include "tessera/dtype.h"

namespace tessera {

// n elements of a row as T, `stride` apart.
template <class T>
void load_row(const char* row, DType dtype, int64_t n, T* to, int64_t stride = 1) {
  const auto copy = [&](const auto* from, auto convert) {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<T>(convert(from[i]));
  };
  switch (dtype) {
    case DType::f64: copy(reinterpret_cast<const double*>(row), [](double x) { return x; }); break;
    case DType::f32: copy(reinterpret_cast<const float*>(row), [](float x) { return x; }); break;
    case DType::bf16: copy(reinterpret_cast<const bfloat16*>(row), [](bfloat16 x) { return to_float(x); }); break;
    case DType::f16: copy(reinterpret_cast<const float16*>(row), [](float16 x) { return to_float(x); }); break;
    default: break;
  }
}

template <class T>
void store_row(const T* from, int64_t n, char* row, DType dtype) {
  const auto copy = [&](auto* to, auto convert) {
    for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
  };
  switch (dtype) {
    case DType::f64: copy(reinterpret_cast<double*>(row), [](T x) { return static_cast<double>(x); }); break;
    case DType::f32: copy(reinterpret_cast<float*>(row), [](T x) { return static_cast<float>(x); }); break;
    case DType::bf16:
      copy(reinterpret_cast<bfloat16*>(row), [](T x) { return to_bfloat16(static_cast<float>(x)); });
      break;
    case DType::f16:
      copy(reinterpret_cast<float16*>(row), [](T x) { return to_float16(static_cast<float>(x)); });
      break;
    default: break;
  }
}

}  // namespace tessera
