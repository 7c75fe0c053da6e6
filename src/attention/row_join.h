// Joins rows of partial results over disjoint sets of keys by their log-sum-exp: out = sum of e^(lse_i - lse) out_i
// with lse = log(sum of e^lse_i) (the final step of FlashDecoding; Dao et al. 2023).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "call/rows.h"
#include "call/softmax_state.h"

namespace tessera {

// T is float, or double where fp64 takes part.
template <class T>
class RowJoin {
 public:
  explicit RowJoin(int64_t dim) : dim_(dim), sum_(static_cast<size_t>(dim)), row_(static_cast<size_t>(dim)) {}

  // A partial row, which must stay until finish(). One without keys has no part in it, whatever it holds.
  void add(const char* out, DType dtype, T lse) {
    const State state = State::ended(lse);
    if (state.empty()) return;
    joined_.cover(lse);
    parts_.push_back({out, dtype, state});
  }

  // Writes the joined row, summed in the order of the parts, to `to`, which may be one of them; returns lse. Without
  // parts: 0 and -inf. Then it starts anew.
  T finish(char* to, DType dtype) {
    for (Part& part : parts_) part.weight = joined_.merge(part.state);
    const bool there = parts_.size() == 1 && parts_[0].out == to && parts_[0].dtype == dtype;
    if (!there) {
      if (parts_.empty()) std::fill(sum_.begin(), sum_.end(), T{0});
      for (size_t i = 0; i < parts_.size(); ++i) {
        const Part& part = parts_[i];
        const T weight = part.weight / joined_.used;
        load_row(part.out, part.dtype, dim_, i == 0 ? sum_.data() : row_.data());
        for (int64_t c = 0; c < dim_; ++c) sum_[c] = i == 0 ? weight * sum_[c] : sum_[c] + weight * row_[c];
      }
      store_row(sum_.data(), dim_, to, dtype);
    }
    const T lse = joined_.finish().lse;
    joined_ = {};
    parts_.clear();
    return lse;
  }

 private:
  using State = SoftmaxState<T, PowersOfE>;
  struct Part {
    const char* out;
    DType dtype;
    State state;
    T weight = 0;
  };
  int64_t dim_;
  State joined_;
  std::vector<Part> parts_;
  std::vector<T> sum_, row_;  // [Dv]
};

}  // namespace tessera
