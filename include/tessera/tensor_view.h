// A tensor that somebody else owns: pointer, dtype, sizes and strides.
#pragma once

#include <array>
#include <cassert>
#include <cstdint>
#include <initializer_list>

#include "tessera/dtype.h"

namespace tessera {

namespace detail {

template <class Pointer>
struct BasicView {
  static constexpr int kMaxRank = 4;

  Pointer data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, kMaxRank> sizes{};    // elements
  std::array<int64_t, kMaxRank> strides{};  // elements; 0 repeats, negative is allowed

  bool defined() const { return rank > 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= sizes[i];
    return n;
  }
};

}  // namespace detail

// Read-only view. An undefined view (rank 0) means "not given".
struct TensorView : detail::BasicView<const void*> {};

// Writable view; converts to TensorView.
struct MutableTensorView : detail::BasicView<void*> {
  operator TensorView() const { return {{data, dtype, rank, sizes, strides}}; }
};

// Row-major contiguous view of the given sizes (at most 4).
inline MutableTensorView make_view(void* data, DType dtype, std::initializer_list<int64_t> sizes) {
  assert(sizes.size() <= MutableTensorView::kMaxRank);
  MutableTensorView v;
  v.data = data;
  v.dtype = dtype;
  for (int64_t s : sizes) v.sizes[v.rank++] = s;
  int64_t stride = 1;
  for (int i = v.rank - 1; i >= 0; --i) {
    v.strides[i] = stride;
    stride *= v.sizes[i];
  }
  return v;
}
inline TensorView make_view(const void* data, DType dtype, std::initializer_list<int64_t> sizes) {
  return make_view(const_cast<void*>(data), dtype, sizes);
}

// Dimension order of q, k, v, out is always [B, S, H, D]; a layout says how such a tensor lies in memory.
enum class Layout : uint8_t { bshd, bhsd };

// [B, S, H, D] view of contiguous memory in either layout.
inline MutableTensorView attention_view(void* data, DType dtype, Layout layout, int64_t batch, int64_t seqlen,
                                        int64_t heads, int64_t head_dim) {
  MutableTensorView v = make_view(data, dtype, {batch, seqlen, heads, head_dim});
  if (layout == Layout::bhsd) v.strides = {heads * seqlen * head_dim, head_dim, seqlen * head_dim, 1};
  return v;
}
inline TensorView attention_view(const void* data, DType dtype, Layout layout, int64_t batch, int64_t seqlen,
                                 int64_t heads, int64_t head_dim) {
  return attention_view(const_cast<void*>(data), dtype, layout, batch, seqlen, heads, head_dim);
}

}  // namespace tessera
