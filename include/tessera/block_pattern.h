// BlockPattern: which blocks of the score matrix are computed. An immutable value, validated once when it is made,
// cheap to copy (copies share storage), safe to read from many threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace tessera {

// Sizes of a pattern, and where it stands. rows() x cols() blocks of block_q x block_k tokens; the last row and column
// may be ragged, and so may the first row of a pattern that holds some rows of a longer one.
//
// Causality and position belong to the pattern: a call that takes a causal pattern is causal to the token without being
// told again, and a call that says otherwise is an Error.
struct PatternShape {
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int block_q = 128;    // multiple of 16 in 16..256
  int block_k = 128;    // multiple of 16 in 16..256
  int64_t heads = 1;    // 1 (all heads share) or H
  int64_t batches = 1;  // 1 (all batches share) or B
  bool causal = false;  // query i admits keys up to position diagonal() + i
  // Position of query 0 on the scale where key 0 is at 0. Not given: seqlen_k - seqlen_q (bottom-right alignment), and
  // a pattern without causality was made for no position. Named patterns that depend on positions say theirs.
  std::optional<int64_t> q_offset;
  int q_skip = 0;  // 0..block_q - 1: queries of the first block row that come before query 0

  int64_t rows() const { return seqlen_q == 0 ? 0 : (q_skip + seqlen_q + block_q - 1) / block_q; }
  int64_t cols() const { return (seqlen_k + block_k - 1) / block_k; }
  int64_t total_rows() const { return batches * heads * rows(); }
  int64_t total_cols() const { return batches * heads * cols(); }
  // Queries [query_begin(i), query_end(i)) are those of block row i.
  int64_t query_begin(int64_t row) const { return row == 0 ? 0 : row * block_q - q_skip; }
  int64_t query_end(int64_t row) const { return std::min((row + 1) * block_q - q_skip, seqlen_q); }
  int64_t row_of(int64_t query) const { return (query + q_skip) / block_q; }
  int64_t row_in_block(int64_t query) const { return (query + q_skip) % block_q; }  // which row of a bitmap
  bool placed() const { return causal || q_offset.has_value(); }                    // made for one position
  int64_t diagonal() const { return q_offset ? *q_offset : seqlen_k - seqlen_q; }   // position of query 0
  int bitmap_words() const { return (block_k + 63) / 64; }  // 64-bit words a token row of a bitmap
  // The same sizes at the same place, whether that was said or is the default.
  friend bool operator==(const PatternShape& a, const PatternShape& b) {
    return a.seqlen_q == b.seqlen_q && a.seqlen_k == b.seqlen_k && a.block_q == b.block_q && a.block_k == b.block_k &&
           a.heads == b.heads && a.batches == b.batches && a.causal == b.causal && a.diagonal() == b.diagonal() &&
           a.q_skip == b.q_skip;
  }
};

// Error naming the field for sizes that no pattern has. After it every product of three sizes of the shape fits in
// int64.
void check_shape(const PatternShape& shape);

// A pattern as plain pointers, for kernels. "Row" r of batch b, head h, block row i is (b * heads + h) * rows + i;
// "column" likewise. An "entry" is a position in `indices`: one kept block pair.
struct BlockPatternView {
  PatternShape shape;
  const int64_t* indptr = nullptr;        // [total_rows + 1] entries of row r: indptr[r] .. indptr[r + 1]
  const int32_t* indices = nullptr;       // [entries] block column, ascending and unique inside a row
  const int32_t* bitmap_index = nullptr;  // [entries] which bitmap, -1: full; nullptr when every block is full
  const uint64_t* bitmaps = nullptr;      // [bitmaps, block_q, bitmap_words]; bit k % 64 of word k / 64 admits key k

  int64_t row_id(int64_t b, int64_t h, int64_t i) const {
    return ((shape.batches == 1 ? 0 : b) * shape.heads + (shape.heads == 1 ? 0 : h)) * shape.rows() + i;
  }
  int64_t col_id(int64_t b, int64_t h, int64_t j) const {
    return ((shape.batches == 1 ? 0 : b) * shape.heads + (shape.heads == 1 ? 0 : h)) * shape.cols() + j;
  }
  int64_t key_begin(int64_t entry) const { return int64_t{indices[entry]} * shape.block_k; }  // of its block
  // Bitmap of an entry, [block_q, bitmap_words], or nullptr when the block is full.
  const uint64_t* bitmap(int64_t entry) const {
    if (bitmap_index == nullptr || bitmap_index[entry] < 0) return nullptr;
    return bitmaps + static_cast<int64_t>(bitmap_index[entry]) * shape.block_q * shape.bitmap_words();
  }
  // The row of that bitmap that belongs to a query of the entry's block row, [bitmap_words], or nullptr likewise.
  const uint64_t* bitmap_row(int64_t entry, int64_t query) const {
    const uint64_t* bits = bitmap(entry);
    return bits == nullptr ? nullptr : bits + shape.row_in_block(query) * shape.bitmap_words();
  }
};

// The same entries grouped by column (for gradients of keys and values).
struct TransposedView {
  const int64_t* indptr = nullptr;   // [total_cols + 1]
  const int32_t* rows = nullptr;     // [entries] block row, ascending inside a column
  const int64_t* entries = nullptr;  // [entries] position of the pair in BlockPatternView::indices
};

class BlockPattern {
 public:
  BlockPattern();  // no tokens, no blocks

  // CSR: indptr [total_rows + 1] starting at 0, indices [indptr.back()] ascending and unique in each row.
  // bitmap_index is empty or [entries] (-1: full); bitmaps [n, block_q, bitmap_words]. Bits beyond the ends of the
  // sequences are ignored (cleared). What is stored is canonical: a bitmap that admits every pair within the ends
  // becomes "full", one that admits none drops its entry (so entries may move: read them from view()), equal bitmaps
  // are stored once. Throws Error naming "indptr", "indices", "block_q", "bitmap_index", "bitmaps", ...
  static BlockPattern from_csr(const PatternShape& shape, std::vector<int64_t> indptr, std::vector<int32_t> indices,
                               std::vector<int32_t> bitmap_index = {}, std::vector<uint64_t> bitmaps = {});

  const PatternShape& shape() const;
  int64_t num_blocks() const;   // kept block pairs over all pattern heads and batches
  int64_t num_bitmaps() const;  // distinct bitmaps
  size_t bytes() const;         // memory held, transposed form included once it exists
  uint64_t hash() const;        // of everything that defines the pattern; equal on every machine; computed once

  BlockPatternView view() const;
  TransposedView transposed() const;  // built on first use, thread-safe

  friend bool operator==(const BlockPattern& a, const BlockPattern& b);

 private:
  struct Storage;
  explicit BlockPattern(std::shared_ptr<const Storage> storage);
  std::shared_ptr<const Storage> storage_;
};

}  // namespace tessera
