#include "tessera/block_pattern.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <string_view>
#include <utility>

#include "pattern/bitmap_table.h"
#include "pattern/geometry.h"
#include "tessera/error.h"

namespace tessera {

struct BlockPattern::Storage {
  PatternShape shape;
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
  std::vector<int32_t> bitmap_index;  // empty when every block is full
  std::vector<uint64_t> bitmaps;

  struct Transposed {
    std::vector<int64_t> indptr;
    std::vector<int32_t> rows;
    std::vector<int64_t> entries;
  };
  mutable std::once_flag transposed_once, hash_once;
  mutable Transposed transposed;
  mutable std::atomic<size_t> transposed_bytes{0};  // bytes() may be asked while another thread builds
  mutable uint64_t hash = 0;

  void build_transposed() const;
  void build_hash() const;
};

namespace {

template <class T>
size_t bytes_of(const std::vector<T>& v) {
  return v.capacity() * sizeof(T);
}

void check_block(std::string_view argument, int block) {
  const bool fits = block >= 16 && block <= 256 && block % 16 == 0;
  if (!fits) fail(argument, fmt::to_string(block), "a multiple of 16 in 16..256");
}

void check_seqlen(std::string_view argument, int64_t seqlen, int block) {
  if (seqlen < 0 || seqlen > kMaxSeqlen) fail(argument, fmt::to_string(seqlen), "0..2^40");
  if (ceil_div(seqlen, block) > std::numeric_limits<int32_t>::max()) {
    fail(argument, fmt::format("{} ({} blocks)", seqlen, ceil_div(seqlen, block)), "at most 2^31 - 1 blocks");
  }
}

std::string row_name(const PatternShape& s, int64_t r) {
  if (s.batches == 1 && s.heads == 1) return fmt::format("row {}", r);
  const int64_t rows = s.rows();
  return fmt::format("batch {}, head {}, row {}", r / rows / s.heads, r / rows % s.heads, r % rows);
}

void check_csr(const PatternShape& shape, const std::vector<int64_t>& indptr, const std::vector<int32_t>& indices) {
  const int64_t rows = shape.total_rows();
  const int64_t cols = shape.cols(), entries = static_cast<int64_t>(indices.size());
  if (static_cast<int64_t>(indptr.size()) != rows + 1) {
    fail("indptr", fmt::format("{} elements", indptr.size()),
         fmt::format("{} (batches * heads * block rows + 1)", rows + 1));
  }
  if (indptr[0] != 0) fail("indptr", fmt::format("{} at position 0", indptr[0]), "0 there");
  for (int64_t r = 0; r < rows; ++r) {
    if (indptr[r + 1] < indptr[r] || indptr[r + 1] > entries) {
      fail("indptr", fmt::format("{} after {} ({})", indptr[r + 1], indptr[r], row_name(shape, r)),
           fmt::format("never falling and at most {}, the number of indices", entries));
    }
  }
  if (indptr[rows] != entries) {
    fail("indices", fmt::format("{} elements", entries), fmt::format("{}, the last of indptr", indptr[rows]));
  }
  for (int64_t r = 0; r < rows; ++r) {
    int64_t previous = -1;
    for (int64_t e = indptr[r]; e < indptr[r + 1]; ++e) {
      const int64_t j = indices[e];
      if (j < 0 || j >= cols) {
        fail("indices", fmt::format("{} ({})", j, row_name(shape, r)), fmt::format("block columns 0..{}", cols - 1));
      }
      if (j <= previous) {
        fail("indices", fmt::format("{} after {} ({})", j, previous, row_name(shape, r)),
             "ascending columns, each once a row");
      }
      previous = j;
    }
  }
}

}  // namespace

void check_shape(const PatternShape& s) {
  check_block("block_q", s.block_q);
  check_block("block_k", s.block_k);
  check_seqlen("seqlen_q", s.seqlen_q, s.block_q);
  check_seqlen("seqlen_k", s.seqlen_k, s.block_k);
  // Bounds on products of three, so that hostile sizes can neither overflow nor ask for terabytes of row pointers.
  constexpr int64_t kMaxHeads = int64_t{1} << 20, kMaxTotal = int64_t{1} << 36;
  if (s.q_skip < 0 || s.q_skip >= s.block_q) {
    fail("q_skip", fmt::to_string(s.q_skip), fmt::format("0..block_q - 1 = {}", s.block_q - 1));
  }
  if (s.q_offset && (*s.q_offset < -kMaxSeqlen || *s.q_offset > kMaxSeqlen)) {
    fail("q_offset", fmt::to_string(*s.q_offset), "-2^40..2^40");
  }
  if (s.heads < 1 || s.heads > kMaxHeads) fail("heads", fmt::to_string(s.heads), "1..2^20");
  if (s.batches < 1 || s.batches > kMaxHeads) fail("batches", fmt::to_string(s.batches), "1..2^20");
  const int64_t longest = std::max<int64_t>({1, s.rows(), s.cols()});
  if (s.heads * s.batches > kMaxTotal / longest) {
    fail("heads", fmt::format("{} heads x {} batches x {} block rows or columns", s.heads, s.batches, longest),
         "at most 2^36 in all");
  }
}

bool resolve_causal(const PatternShape& shape, const std::optional<bool>& causal) {
  if (shape.causal && causal && !*causal) {
    fail("causal", "false for a causal pattern",
         "nothing or true; without_causality(pattern) has the same pairs as bitmaps, a pattern made without causal "
         "more");
  }
  return causal.value_or(shape.causal);
}

PatternShape common_shape(const PatternShape& a, const PatternShape& b) {
  const auto same = [](std::string_view name, int64_t x, int64_t y) {
    if (x != y) fail(name, fmt::format("{} and {}", x, y), "the same in both patterns");
    return x;
  };
  const auto broadcast = [](std::string_view name, int64_t x, int64_t y) {
    if (x != y && x != 1 && y != 1) fail(name, fmt::format("{} and {}", x, y), "the same in both patterns, or 1");
    return std::max(x, y);
  };
  PatternShape s;
  s.seqlen_q = same("seqlen_q", a.seqlen_q, b.seqlen_q);
  s.seqlen_k = same("seqlen_k", a.seqlen_k, b.seqlen_k);
  s.block_q = static_cast<int>(same("block_q", a.block_q, b.block_q));
  s.block_k = static_cast<int>(same("block_k", a.block_k, b.block_k));
  s.q_skip = static_cast<int>(same("q_skip", a.q_skip, b.q_skip));
  if (a.placed() && b.placed()) same("q_offset", a.diagonal(), b.diagonal());  // else one of them may stand anywhere
  s.q_offset = a.q_offset ? a.q_offset : b.q_offset;
  s.causal = a.causal || b.causal;
  s.heads = broadcast("heads", a.heads, b.heads);
  s.batches = broadcast("batches", a.batches, b.batches);
  check_shape(s);
  return s;
}

BlockPattern::BlockPattern() {
  static const std::shared_ptr<const Storage> empty = [] {
    auto s = std::make_shared<Storage>();
    s->indptr = {0};
    return s;
  }();
  storage_ = empty;
}

BlockPattern::BlockPattern(std::shared_ptr<const Storage> storage) : storage_(std::move(storage)) {}

BlockPattern BlockPattern::from_csr(const PatternShape& shape, std::vector<int64_t> indptr,
                                    std::vector<int32_t> indices, std::vector<int32_t> bitmap_index,
                                    std::vector<uint64_t> bitmaps) {
  check_shape(shape);
  check_csr(shape, indptr, indices);
  auto storage = std::make_shared<Storage>();
  storage->shape = shape;

  if (bitmap_index.empty() && !bitmaps.empty() && !indices.empty()) {
    fail("bitmap_index", "none, but bitmaps", fmt::format("{} elements, one for each of indices", indices.size()));
  }
  if (!bitmap_index.empty()) {
    if (bitmap_index.size() != indices.size()) {
      fail("bitmap_index", fmt::format("{} elements", bitmap_index.size()),
           fmt::format("{}, one for each of indices", indices.size()));
    }
    BitmapTable table(shape);
    const int64_t words = table.words_per_bitmap();
    if (static_cast<int64_t>(bitmaps.size()) % words != 0) {
      fail("bitmaps", fmt::format("{} words", bitmaps.size()),
           fmt::format("a multiple of {} (block_q * bitmap_words)", words));
    }
    const int64_t count = static_cast<int64_t>(bitmaps.size()) / words;
    constexpr int32_t kUnseen = -3;
    std::vector<int32_t> interned(count, kUnseen);  // of given bitmap n in a block that ends nowhere early
    bool any_partial = false;
    int64_t kept = 0;
    for (int64_t b = 0, r = 0; b < shape.batches * shape.heads; ++b) {
      for (int64_t i = 0; i < shape.rows(); ++i, ++r) {
        const int64_t begin = indptr[r], end = indptr[r + 1];
        indptr[r] = kept;
        for (int64_t e = begin; e < end; ++e) {
          const int64_t n = bitmap_index[e];
          if (n < -1 || n >= count) {
            fail("bitmap_index", fmt::format("{} ({})", n, row_name(shape, r)),
                 fmt::format("-1 (full) or 0..{}", count - 1));
          }
          int32_t index = BitmapTable::kFull;
          if (n >= 0) {
            const bool whole = is_whole_row(shape, i) && keys_in(shape, indices[e]) == shape.block_k;
            index = whole ? interned[n] : kUnseen;
            if (index == kUnseen) index = table.intern(bitmaps.data() + n * words, i, indices[e]);
            if (whole) interned[n] = index;
          }
          if (index == BitmapTable::kEmpty) continue;
          any_partial |= index >= 0;
          indices[kept] = indices[e];
          bitmap_index[kept] = index;
          ++kept;
        }
      }
    }
    indptr.back() = kept;
    indices.resize(kept);
    bitmap_index.resize(kept);
    if (any_partial) {
      storage->bitmap_index = std::move(bitmap_index);
      storage->bitmaps = table.take();
    }
  }
  storage->indptr = std::move(indptr);
  storage->indices = std::move(indices);
  return BlockPattern(std::move(storage));
}

void BlockPattern::Storage::build_transposed() const {
  const int64_t rows = shape.rows(), cols = shape.cols();
  Transposed t;
  t.indptr.assign(shape.total_cols() + 1, 0);
  t.rows.resize(indices.size());
  t.entries.resize(indices.size());
  // Counting sort by column: rows are visited in order, so each column comes out ascending.
  for (int64_t g = 0; g < shape.batches * shape.heads; ++g) {
    int64_t* next = t.indptr.data() + g * cols + 1;
    for (int64_t e = indptr[g * rows]; e < indptr[(g + 1) * rows]; ++e) ++next[indices[e]];
  }
  for (int64_t c = 0; c < shape.total_cols(); ++c) t.indptr[c + 1] += t.indptr[c];
  std::vector<int64_t> next(cols);
  for (int64_t g = 0; g < shape.batches * shape.heads; ++g) {
    std::copy_n(t.indptr.begin() + g * cols, cols, next.begin());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t e = indptr[g * rows + i]; e < indptr[g * rows + i + 1]; ++e) {
        const int64_t at = next[indices[e]]++;
        t.rows[at] = static_cast<int32_t>(i);
        t.entries[at] = e;
      }
    }
  }
  transposed = std::move(t);
  transposed_bytes = bytes_of(transposed.indptr) + bytes_of(transposed.rows) + bytes_of(transposed.entries);
}

void BlockPattern::Storage::build_hash() const {
  uint64_t h = 0;
  for (int64_t field : {shape.seqlen_q, shape.seqlen_k, int64_t{shape.block_q}, int64_t{shape.block_k}, shape.heads,
                        shape.batches, static_cast<int64_t>(indices.size()), static_cast<int64_t>(bitmaps.size())}) {
    h = hash_word(h, static_cast<uint64_t>(field));
  }
  if (shape.causal || shape.q_skip != 0 || shape.diagonal() != shape.seqlen_k - shape.seqlen_q) {
    h = hash_word(h, uint64_t{shape.causal} | static_cast<uint64_t>(shape.q_skip) << 1);
    h = hash_word(h, static_cast<uint64_t>(shape.diagonal()));
  }
  for (int64_t x : indptr) h = hash_word(h, static_cast<uint64_t>(x));
  const auto hash_pairs = [&h](const std::vector<int32_t>& v) {
    size_t i = 0;
    for (; i + 1 < v.size(); i += 2) {
      h = hash_word(h, static_cast<uint32_t>(v[i]) | uint64_t{static_cast<uint32_t>(v[i + 1])} << 32);
    }
    if (i < v.size()) h = hash_word(h, static_cast<uint32_t>(v[i]));
  };
  hash_pairs(indices);
  hash_pairs(bitmap_index);
  for (uint64_t x : bitmaps) h = hash_word(h, x);
  hash = hash_finish(h);
}

const PatternShape& BlockPattern::shape() const { return storage_->shape; }

int64_t BlockPattern::num_blocks() const { return static_cast<int64_t>(storage_->indices.size()); }

int64_t BlockPattern::num_bitmaps() const {
  const PatternShape& s = storage_->shape;
  return static_cast<int64_t>(storage_->bitmaps.size()) / (int64_t{s.block_q} * s.bitmap_words());
}

size_t BlockPattern::bytes() const {
  const Storage& s = *storage_;
  return sizeof(Storage) + bytes_of(s.indptr) + bytes_of(s.indices) + bytes_of(s.bitmap_index) + bytes_of(s.bitmaps) +
         s.transposed_bytes.load();
}

uint64_t BlockPattern::hash() const {
  std::call_once(storage_->hash_once, [this] { storage_->build_hash(); });
  return storage_->hash;
}

BlockPatternView BlockPattern::view() const {
  const Storage& s = *storage_;
  BlockPatternView v;
  v.shape = s.shape;
  v.indptr = s.indptr.data();
  v.indices = s.indices.data();
  v.bitmap_index = s.bitmap_index.empty() ? nullptr : s.bitmap_index.data();
  v.bitmaps = s.bitmaps.data();
  return v;
}

TransposedView BlockPattern::transposed() const {
  std::call_once(storage_->transposed_once, [this] { storage_->build_transposed(); });
  const Storage::Transposed& t = storage_->transposed;
  return {t.indptr.data(), t.rows.data(), t.entries.data()};
}

bool operator==(const BlockPattern& a, const BlockPattern& b) {
  const BlockPattern::Storage &x = *a.storage_, &y = *b.storage_;
  return &x == &y || (x.shape == y.shape && x.indptr == y.indptr && x.indices == y.indices &&
                      x.bitmap_index == y.bitmap_index && x.bitmaps == y.bitmaps);
}

}  // namespace tessera
