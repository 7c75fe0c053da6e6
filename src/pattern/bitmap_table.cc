#include "pattern/bitmap_table.h"

#include <algorithm>
#include <limits>

#include "pattern/geometry.h"
#include "tessera/error.h"

namespace tessera {

BitmapTable::BitmapTable(const PatternShape& shape)
    : shape_(shape), words_(int64_t{shape.block_q} * shape.bitmap_words()), scratch_(words_) {}

int32_t BitmapTable::intern(const uint64_t* bits, int64_t row, int64_t col) {
  const RowsInBlock queries = queries_in(shape_, row);
  const int keys = keys_in(shape_, col);
  const int row_words = shape_.bitmap_words();
  std::fill(scratch_.begin(), scratch_.end(), 0);
  bool any = false, all = true;
  uint64_t hash = 0;
  for (int q = queries.first; q < queries.last; ++q) {
    for (int w = 0; w * 64 < keys; ++w) {
      const int valid = std::min(64, keys - w * 64);
      const uint64_t ends = valid == 64 ? ~uint64_t{0} : (uint64_t{1} << valid) - 1;
      const uint64_t word = bits[q * row_words + w] & ends;
      scratch_[q * row_words + w] = word;
      any |= word != 0;
      all &= word == ends;
      // Zero words do not count: the position of the others tells bitmaps apart.
      if (word != 0) hash = hash_word(hash, word + static_cast<uint64_t>(q * row_words + w) * 0x9e3779b97f4a7c15u);
    }
  }
  if (!any) return kEmpty;
  if (all) return kFull;
  hash = hash_finish(hash);
  auto [first, last] = by_hash_.equal_range(hash);
  for (; first != last; ++first) {
    if (std::equal(scratch_.begin(), scratch_.end(), bitmaps_.begin() + first->second * words_)) return first->second;
  }
  const int64_t index = static_cast<int64_t>(bitmaps_.size()) / words_;
  if (index > std::numeric_limits<int32_t>::max()) fail("bitmaps", "more than 2^31 - 1 distinct ones", "at most that");
  bitmaps_.insert(bitmaps_.end(), scratch_.begin(), scratch_.end());
  by_hash_.emplace(hash, static_cast<int32_t>(index));
  return static_cast<int32_t>(index);
}

}  // namespace tessera
