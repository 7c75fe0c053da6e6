// Token bitmaps of partial blocks, each distinct one stored once.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "tessera/block_pattern.h"

namespace tessera {

class BitmapTable {
 public:
  static constexpr int32_t kFull = -1;   // every pair within the ends is admitted
  static constexpr int32_t kEmpty = -2;  // none is

  explicit BitmapTable(const PatternShape& shape);

  // bits: [block_q, bitmap_words] of the pair (row, col). What lies beyond the ends of the sequences is cleared first.
  // Returns kFull, kEmpty or the bitmap's index.
  int32_t intern(const uint64_t* bits, int64_t row, int64_t col);

  int64_t words_per_bitmap() const { return words_; }
  std::vector<uint64_t> take() { return std::move(bitmaps_); }  // [bitmaps, block_q, bitmap_words]

 private:
  PatternShape shape_;
  int64_t words_ = 0;  // of one bitmap
  std::vector<uint64_t> bitmaps_;
  std::vector<uint64_t> scratch_;  // one bitmap
  std::unordered_multimap<uint64_t, int32_t> by_hash_;
};

}  // namespace tessera
