// The columns of one row while it is being built.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace tessera {

// A set of columns that remembers its members, so that filling and emptying cost O(members) and not O(columns).
class ColumnSet {
 public:
  explicit ColumnSet(int64_t cols) : words_((cols + 63) / 64) {}

  int64_t size() const { return static_cast<int64_t>(members_.size()); }

  // False if it was there already.
  bool insert(int64_t j) {
    uint64_t& word = words_[j >> 6];
    const uint64_t bit = uint64_t{1} << (j & 63);
    if (word & bit) return false;
    word |= bit;
    members_.push_back(static_cast<int32_t>(j));
    return true;
  }
  void insert_range(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) insert(j);
  }

  // Appends the members in ascending order and empties the set.
  void flush(std::vector<int32_t>& out) {
    if (members_.empty()) return;
    const auto [low, high] = std::minmax_element(members_.begin(), members_.end());
    const int64_t first = *low >> 6, last = *high >> 6;
    // Reading the bits in order sorts for free, but only while there are not many more words than members.
    if (last - first <= 8 * size()) {
      for (int64_t w = first; w <= last; ++w) {
        for (uint64_t bits = words_[w]; bits != 0; bits &= bits - 1) {
          out.push_back(static_cast<int32_t>(w * 64 + std::countr_zero(bits)));
        }
        words_[w] = 0;
      }
    } else {
      std::sort(members_.begin(), members_.end());
      out.insert(out.end(), members_.begin(), members_.end());
      for (int32_t j : members_) words_[j >> 6] = 0;
    }
    members_.clear();
  }

 private:
  std::vector<uint64_t> words_;  // one bit a column
  std::vector<int32_t> members_;
};

}  // namespace tessera
