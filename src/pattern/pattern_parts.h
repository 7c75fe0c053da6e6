// A pattern while it is being put together, row by row.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "pattern/bitmap_table.h"
#include "pattern/geometry.h"
#include "tessera/block_pattern.h"

namespace tessera {

// Rows come in order (batch, head, block row). Bitmaps are stored once each while they come, so that the parts never
// hold more than the finished pattern.
class PatternParts {
 public:
  explicit PatternParts(const PatternShape& shape) : shape_((check_shape(shape), shape)), table_(shape) {}

  const PatternShape& shape() const { return shape_; }

  // Keeps a block column (in range) of the current row. bits: [block_q, bitmap_words], nullptr for a full block.
  void add(int32_t col, const uint64_t* bits) {
    int32_t bitmap = BitmapTable::kFull;
    if (bits != nullptr) {
      bitmap = table_.intern(bits, static_cast<int64_t>(indptr_.size() - 1) % shape_.rows(), col);
      if (bitmap == BitmapTable::kEmpty) return;
    }
    indices_.push_back(col);
    // The list of bitmaps starts with the first partial block: most patterns have none.
    if (bitmap >= 0 && bitmap_index_.empty()) bitmap_index_.assign(indices_.size() - 1, BitmapTable::kFull);
    if (bitmap >= 0 || !bitmap_index_.empty()) bitmap_index_.push_back(bitmap);
  }
  void end_row() { indptr_.push_back(static_cast<int64_t>(indices_.size())); }

  // Checks what every pattern is checked for (order, ranges, number of rows).
  BlockPattern build() {
    return BlockPattern::from_csr(shape_, std::move(indptr_), std::move(indices_), std::move(bitmap_index_),
                                  table_.take());
  }

 private:
  PatternShape shape_;
  BitmapTable table_;
  std::vector<int64_t> indptr_{0};
  std::vector<int32_t> indices_;
  std::vector<int32_t> bitmap_index_;  // empty, or one for each of indices_
};

}  // namespace tessera
