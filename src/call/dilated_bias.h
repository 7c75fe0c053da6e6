// The gradient of attn_bias in dilated attention. Several (w, r), and several parts of one, may add to one element: a
// part has a tensor of its own, which is then added to the whole.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "call/dilated_plan.h"

namespace tessera {

// Strides of a contiguous tensor; 0 where a size is 1.
inline std::array<int64_t, 4> contiguous_bias_strides(const int64_t* size) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    strides[i] = size[i] == 1 ? 0 : stride;
    stride *= size[i];
  }
  return strides;
}

// The part's own: contiguous [batches * segments, heads, rows, rows], 1 for what it sums over as the whole does.
class DilatedBias {
 public:
  DilatedBias(const DilatedPart& part, const DilatedGroup& group, const BackwardProblem& whole)
      : part_(part), group_(group) {
    const int64_t* size = whole.dattn_bias_size;
    const bool each_batch = size[0] > 1, each_head = size[1] > 1, each_query = size[2] > 1, each_key = size[3] > 1;
    const bool each_segment = part.segments > 1 && (each_query || each_key);
    size_ = {each_batch || each_segment ? part.batches * part.segments : 1, each_head ? part.heads : 1,
             each_query ? part.rows : 1, each_key ? part.rows : 1};
  }

  int64_t numel() const { return size_[0] * size_[1] * size_[2] * size_[3]; }
  int64_t rows() const { return size_[1] * size_[2]; }

  // Makes it what the part's problem writes.
  void set(BackwardProblem& p, void* data, DType dtype) const {
    p.dattn_bias = static_cast<char*>(data);
    p.dattn_bias_dtype = dtype;
    std::copy_n(size_.begin(), 4, p.dattn_bias_size);
    std::copy_n(contiguous_bias_strides(size_.data()).begin(), 4, p.dattn_bias_stride);
  }

  // Calls add(from, to, n, step) for what lies in row `row` of all batches: its elements from .. from + n - 1 go to the
  // whole's to, to + step, ..., by `stride` [b, h, q, k] (0 where the whole has size 1). Rows go to different places.
  template <class Add>
  void for_each_run(int64_t row, const int64_t* stride, Add add) const {
    const int64_t h = row / size_[2], r = row % size_[2];
    for (int64_t i = 0; i < size_[0]; ++i) {
      const int64_t b = part_.batch + i / part_.segments, segment = part_.segment + i % part_.segments;
      const int64_t first = segment * group_.segment + part_.offset;
      const int64_t to = b * stride[0] + (part_.head + h * part_.head_step) * stride[1] +
                         (first + r * group_.rate) * stride[2] + first * stride[3];
      add((i * size_[1] * size_[2] + row) * size_[3], to, size_[3], group_.rate * stride[3]);
    }
  }

 private:
  const DilatedPart& part_;
  const DilatedGroup& group_;
  std::array<int64_t, 4> size_{};
};

inline int64_t bias_numel(const BackwardProblem& whole) {
  const int64_t* n = whole.dattn_bias_size;
  return n[0] * n[1] * n[2] * n[3];
}

// Calls visit(i, at) for every element of the whole: its number, and where it lies.
template <class Visit>
void for_each_bias(const BackwardProblem& whole, Visit visit) {
  const int64_t *n = whole.dattn_bias_size, *stride = whole.dattn_bias_stride;
  for (int64_t row = 0; row < n[0] * n[1] * n[2]; ++row) {
    const int64_t b = row / n[2] / n[1], h = row / n[2] % n[1], q = row % n[2];
    const int64_t at = b * stride[0] + h * stride[1] + q * stride[2];
    for (int64_t k = 0; k < n[3]; ++k) visit(row * n[3] + k, at + k * stride[3]);
  }
}

}  // namespace tessera
