#include "tessera/pattern_combine.h"

#include <fmt/format.h>

#include <algorithm>

#include "pattern/geometry.h"
#include "pattern/pattern_parts.h"
#include "pattern/rows.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {

namespace {

int64_t words_of(const PatternShape& s) { return int64_t{s.block_q} * s.bitmap_words(); }

enum class Operation { unite, intersect, subtract };

// x without y, over a whole bitmap; nullptr: all ones. Bits past the ends are cleared by whoever stores them.
void subtract_bits(const uint64_t* x, const uint64_t* y, int64_t words, uint64_t* out) {
  for (int64_t w = 0; w < words; ++w) out[w] = (x != nullptr ? x[w] : ~uint64_t{0}) & ~y[w];
}

BlockPattern combine(const BlockPattern& pattern_a, const BlockPattern& pattern_b, Operation operation) {
  const BlockPatternView a = pattern_a.view(), b = pattern_b.view();
  PatternShape shape = common_shape(a.shape, b.shape);
  const bool unite = operation == Operation::unite, subtract = operation == Operation::subtract;
  if (unite && a.shape.causal != b.shape.causal) {
    fail("causal", "a causal pattern and one that is not", "both causal, or none (make_causal says that one is)");
  }
  if (subtract) {
    if (b.shape.causal && !a.shape.causal) {
      fail("causal", "a causal pattern to be taken from one that is not", "both causal, or only the first");
    }
    shape.causal = a.shape.causal;
  }
  const int64_t words = words_of(shape);
  PatternParts parts(shape);
  std::vector<uint64_t> joined(words);
  for (int64_t batch = 0; batch < shape.batches; ++batch) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      for (int64_t i = 0; i < shape.rows(); ++i) {
        const int64_t ra = a.row_id(batch, head, i), rb = b.row_id(batch, head, i);
        int64_t ea = a.indptr[ra], eb = b.indptr[rb];
        const int64_t enda = a.indptr[ra + 1], endb = b.indptr[rb + 1];
        while (ea < enda || eb < endb) {
          const bool take_a = ea < enda && (eb == endb || a.indices[ea] <= b.indices[eb]);
          const bool take_b = eb < endb && (ea == enda || b.indices[eb] <= a.indices[ea]);
          if (subtract && take_a) {
            const uint64_t *x = a.bitmap(ea), *y = take_b ? b.bitmap(eb) : nullptr;
            if (!take_b) {
              parts.add(a.indices[ea], x);
            } else if (y != nullptr) {
              subtract_bits(x, y, words, joined.data());
              parts.add(a.indices[ea], joined.data());
            }
          } else if (take_a && take_b) {
            const uint64_t *x = a.bitmap(ea), *y = b.bitmap(eb);
            if (x != nullptr && y != nullptr) {
              for (int64_t w = 0; w < words; ++w) joined[w] = unite ? x[w] | y[w] : x[w] & y[w];
              parts.add(a.indices[ea], joined.data());
            } else {
              const uint64_t* partial = x != nullptr ? x : y;
              parts.add(a.indices[ea], unite ? nullptr : partial);
            }
          } else if (unite) {
            parts.add(take_a ? a.indices[ea] : b.indices[eb], take_a ? a.bitmap(ea) : b.bitmap(eb));
          }
          ea += take_a;
          eb += take_b;
        }
        parts.end_row();
      }
    }
  }
  return parts.build();
}

void check_range(std::string_view begin_name, int64_t begin, std::string_view end_name, int64_t end, int64_t size) {
  if (begin < 0 || begin > size) fail(begin_name, fmt::to_string(begin), fmt::format("0..{}", size));
  if (end < begin || end > size) fail(end_name, fmt::to_string(end), fmt::format("{}..{}", begin, size));
}

// A bitmap of [from_rows, from_cols] bits as [from_cols, from_rows].
void transpose_bits(const uint64_t* from, int from_rows, int from_cols, uint64_t* to) {
  const int from_words = (from_cols + 63) / 64, to_words = (from_rows + 63) / 64;
  std::fill(to, to + static_cast<int64_t>(from_cols) * to_words, 0);
  for (int r = 0; r < from_rows; ++r) {
    for (int c = 0; c < from_cols; ++c) {
      const uint64_t bit = from[r * from_words + c / 64] >> (c % 64) & 1;
      to[c * to_words + r / 64] |= bit << (r % 64);
    }
  }
}

// Appends all heads of one batch.
void append_batch(const BlockPattern& pattern, int64_t batch, PatternParts& parts) {
  const BlockPatternView view = pattern.view();
  const int64_t first = view.row_id(batch, 0, 0), rows = view.shape.heads * view.shape.rows();
  for (int64_t r = first; r < first + rows; ++r) {
    for (int64_t e = view.indptr[r]; e < view.indptr[r + 1]; ++e) parts.add(view.indices[e], view.bitmap(e));
    parts.end_row();
  }
}

// The shape of all patterns one after the other along heads or batches; the other one must be the same.
PatternShape stacked_shape(std::span<const BlockPattern> patterns, int64_t PatternShape::*along,
                           int64_t PatternShape::*same, std::string_view same_name) {
  if (patterns.empty()) fail("patterns", "none", "at least one");
  PatternShape shape = patterns[0].shape();
  for (const BlockPattern& p : patterns.subspan(1)) {
    const PatternShape& s = p.shape();
    if (s.*same != shape.*same) {
      fail(same_name, fmt::format("{} and {}", shape.*same, s.*same), "the same in all patterns");
    }
    PatternShape lengths = s;  // what is stacked may differ
    lengths.*along = shape.*along;
    if (lengths != shape) {
      fail("patterns",
           fmt::format("seqlen_q {}, seqlen_k {}, block_q {}, block_k {} beside {}, {}, {}, {}", s.seqlen_q, s.seqlen_k,
                       s.block_q, s.block_k, shape.seqlen_q, shape.seqlen_k, shape.block_q, shape.block_k),
           "the same lengths and block sizes in all patterns");
    }
  }
  shape.*along = 0;
  for (const BlockPattern& p : patterns) shape.*along += p.shape().*along;
  check_shape(shape);
  return shape;
}

// The pattern of `shape`: block rows from row_begin on, block columns from col_begin on, of another one. Blocks that
// begin past the keys of `shape` are not taken.
BlockPattern take_block(const BlockPatternView& view, const PatternShape& shape, int64_t row_begin, int64_t col_begin,
                        int64_t first_batch = 0) {
  PatternParts parts(shape);
  for (int64_t batch = first_batch; batch < first_batch + shape.batches; ++batch) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      for (int64_t i = 0; i < shape.rows(); ++i) {
        const int64_t r = view.row_id(batch, head, row_begin + i);
        const int32_t* end = view.indices + view.indptr[r + 1];
        for (const int32_t* j = std::lower_bound(view.indices + view.indptr[r], end, col_begin);
             j != end && *j < col_begin + shape.cols(); ++j) {
          parts.add(static_cast<int32_t>(*j - col_begin), view.bitmap(j - view.indices));
        }
        parts.end_row();
      }
    }
  }
  return parts.build();
}

}  // namespace

BlockPattern unite(const BlockPattern& a, const BlockPattern& b) { return combine(a, b, Operation::unite); }

BlockPattern intersect(const BlockPattern& a, const BlockPattern& b) { return combine(a, b, Operation::intersect); }

BlockPattern subtract(const BlockPattern& a, const BlockPattern& b) { return combine(a, b, Operation::subtract); }

BlockPattern complement(const BlockPattern& pattern) {
  const BlockPatternView view = pattern.view();
  const PatternShape& shape = view.shape;
  PatternParts parts(shape);
  const int64_t words = words_of(shape);
  std::vector<uint64_t> rest(words);
  for (int64_t g = 0, r = 0; g < shape.batches * shape.heads; ++g) {
    for (int64_t i = 0; i < shape.rows(); ++i, ++r) {
      int64_t e = view.indptr[r];
      for (int64_t j = 0, end = admissible_cols(shape, shape.causal, i); j < end; ++j) {
        const bool kept = e < view.indptr[r + 1] && view.indices[e] == j;
        if (!kept) {
          parts.add(static_cast<int32_t>(j), nullptr);
        } else if (const uint64_t* bits = view.bitmap(e)) {
          subtract_bits(nullptr, bits, words, rest.data());
          parts.add(static_cast<int32_t>(j), rest.data());
        }
        e += kept;
      }
      parts.end_row();
    }
  }
  return parts.build();
}

BlockPattern make_causal(const BlockPattern& pattern, std::optional<int64_t> q_offset) {
  PatternShape shape = pattern.shape();
  // Without causality, at the end of the keys: whoever says another position means it.
  const bool movable = !shape.causal && shape.diagonal() == shape.seqlen_k - shape.seqlen_q;
  if (q_offset && !movable && *q_offset != shape.diagonal()) {
    fail("q_offset", fmt::to_string(*q_offset), fmt::format("{}, where the pattern stands", shape.diagonal()));
  }
  shape.causal = true;
  if (q_offset) shape.q_offset = q_offset;
  return take_block(pattern.view(), shape, 0, 0);
}

BlockPattern blocks_only(const BlockPattern& pattern) {
  PatternShape shape = pattern.shape();
  shape.causal = false;
  shape.q_offset.reset();
  return take_block(pattern.view(), shape, 0, 0);
}

namespace {

PatternShape shape_of_rows(const PatternShape& whole, int64_t begin, int64_t end) {
  PatternShape shape = whole;
  shape.seqlen_q = end - begin;
  shape.q_offset = whole.diagonal() + begin;
  shape.q_skip = static_cast<int>(whole.row_in_block(begin));
  return shape;
}

}  // namespace

BlockPattern for_queries(const BlockPattern& pattern, int64_t begin, int64_t end) {
  const PatternShape& whole = pattern.shape();
  check_range("begin", begin, "end", end, whole.seqlen_q);
  PatternShape shape = shape_of_rows(whole, begin, end);
  if (whole.causal) shape.seqlen_k = std::clamp<int64_t>(whole.diagonal() + end, 0, whole.seqlen_k);
  return take_block(pattern.view(), shape, whole.row_of(begin), 0);
}

BlockPattern rows_with_keys(const BlockPattern& pattern, int64_t batch, int64_t begin, int64_t end, int64_t seqlen_k) {
  const PatternShape& whole = pattern.shape();
  PatternShape shape = shape_of_rows(whole, begin, end);
  shape.seqlen_k = std::min(seqlen_k, whole.seqlen_k);
  shape.batches = 1;
  return take_block(pattern.view(), shape, whole.row_of(begin), 0, batch);
}

BlockPattern slice(const BlockPattern& pattern, int64_t row_begin, int64_t row_end, int64_t col_begin,
                   int64_t col_end) {
  const BlockPatternView view = pattern.view();
  check_range("row_begin", row_begin, "row_end", row_end, view.shape.rows());
  check_range("col_begin", col_begin, "col_end", col_end, view.shape.cols());
  PatternShape shape = view.shape;
  const int64_t query = std::min(shape.query_begin(row_begin), shape.seqlen_q);
  shape.seqlen_q = row_end == row_begin ? 0 : shape.query_end(row_end - 1) - query;
  if (row_begin > 0) shape.q_skip = 0;
  if (view.shape.placed()) shape.q_offset = view.shape.diagonal() + query - col_begin * shape.block_k;
  // An empty range at the end would start past the last token.
  shape.seqlen_k = std::max<int64_t>(0, std::min(col_end * shape.block_k, shape.seqlen_k) - col_begin * shape.block_k);
  return take_block(view, shape, row_begin, col_begin);
}

BlockPattern stack_heads(std::span<const BlockPattern> patterns) {
  PatternParts parts(stacked_shape(patterns, &PatternShape::heads, &PatternShape::batches, "batches"));
  for (int64_t b = 0; b < patterns[0].shape().batches; ++b) {
    for (const BlockPattern& p : patterns) append_batch(p, b, parts);
  }
  return parts.build();
}

BlockPattern stack_batches(std::span<const BlockPattern> patterns) {
  PatternParts parts(stacked_shape(patterns, &PatternShape::batches, &PatternShape::heads, "heads"));
  for (const BlockPattern& p : patterns) {
    for (int64_t b = 0; b < p.shape().batches; ++b) append_batch(p, b, parts);
  }
  return parts.build();
}

BlockPattern without_causality(const BlockPattern& pattern) {
  const BlockPatternView view = pattern.view();
  PatternShape shape = view.shape;
  shape.causal = false;
  if (!view.shape.causal) return pattern;
  PatternParts parts(shape);
  const int words = shape.bitmap_words();
  std::vector<uint64_t> bits(words_of(shape));
  for (int64_t g = 0, r = 0; g < shape.batches * shape.heads; ++g) {
    for (int64_t i = 0; i < shape.rows(); ++i, ++r) {
      const RowsInBlock rows = queries_in(shape, i);
      const int64_t position = i * shape.block_q - shape.q_skip + shape.diagonal();  // of row 0 of the block
      for (int64_t e = view.indptr[r]; e < view.indptr[r + 1]; ++e) {
        const int64_t key = int64_t{view.indices[e]} * shape.block_k;
        const uint64_t* given = view.bitmap(e);
        if (position + rows.first >= key + shape.block_k - 1) {
          parts.add(view.indices[e], given);
          continue;
        }
        std::fill(bits.begin(), bits.end(), 0);
        for (int q = rows.first; q < rows.last; ++q) {
          const int64_t keys = std::clamp<int64_t>(position + q - key + 1, 0, shape.block_k);  // that query q admits
          for (int w = 0; w * 64 < keys; ++w) {
            const int64_t n = std::min<int64_t>(64, keys - w * 64);
            const uint64_t past = n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
            bits[q * words + w] = (given != nullptr ? given[q * words + w] : ~uint64_t{0}) & past;
          }
        }
        parts.add(view.indices[e], bits.data());
      }
      parts.end_row();
    }
  }
  return parts.build();
}

BlockPattern transpose(const BlockPattern& given) {
  if (given.shape().q_skip != 0) {
    fail("pattern", fmt::format("one whose first row begins at query {} of its block", given.shape().q_skip),
         "one whose rows are whole blocks");
  }
  const BlockPattern pattern = without_causality(given);
  const BlockPatternView view = pattern.view();
  const TransposedView columns = pattern.transposed();
  PatternShape shape = view.shape;
  std::swap(shape.seqlen_q, shape.seqlen_k);
  std::swap(shape.block_q, shape.block_k);
  shape.q_offset.reset();

  const int64_t entries = pattern.num_blocks();
  std::vector<int64_t> indptr(columns.indptr, columns.indptr + shape.total_rows() + 1);
  std::vector<int32_t> indices(columns.rows, columns.rows + entries);
  std::vector<int32_t> bitmap_index;
  std::vector<uint64_t> bitmaps;
  if (view.bitmap_index != nullptr) {
    bitmap_index.resize(entries);
    for (int64_t e = 0; e < entries; ++e) bitmap_index[e] = view.bitmap_index[columns.entries[e]];
    const int64_t from = words_of(view.shape), to = words_of(shape);
    bitmaps.resize(pattern.num_bitmaps() * to);
    for (int64_t n = 0; n < pattern.num_bitmaps(); ++n) {
      transpose_bits(view.bitmaps + n * from, view.shape.block_q, view.shape.block_k, bitmaps.data() + n * to);
    }
  }
  return BlockPattern::from_csr(shape, std::move(indptr), std::move(indices), std::move(bitmap_index),
                                std::move(bitmaps));
}

}  // namespace tessera
