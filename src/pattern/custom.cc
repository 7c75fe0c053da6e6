#include "tessera/pattern_custom.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>

#include "pattern/geometry.h"
#include "pattern/pattern_parts.h"
#include "tessera/error.h"

namespace tessera {

namespace {

std::string sizes_of(const TensorView& t) {
  return fmt::format("[{}]", fmt::join(t.sizes.begin(), t.sizes.begin() + t.rank, ", "));
}

void check_integer(std::string_view name, const TensorView& t) {
  if (!t.defined()) fail(name, "no tensor", "bool, uint8, int32 or int64");
  if (t.rank > TensorView::kMaxRank) fail(name, fmt::format("{} dimensions", t.rank), "at most 4");
  if (is_floating(t.dtype)) fail(name, name_of(t.dtype), "bool, uint8, int32 or int64");
  bool empty = false;
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] < 0) fail(name, "sizes " + sizes_of(t), "sizes of at least 0");
    empty |= t.sizes[d] == 0;
  }
  if (t.data == nullptr && !empty) fail(name, "a null pointer", "data");
}

void check_sizes(std::string_view name, const TensorView& t, std::initializer_list<int64_t> sizes) {
  check_integer(name, t);
  if (t.rank != static_cast<int>(sizes.size()) || !std::equal(sizes.begin(), sizes.end(), t.sizes.begin())) {
    fail(name, sizes_of(t), fmt::format("[{}]", fmt::join(sizes, ", ")));
  }
}

// Calls f with a pointer of the element type: the one place that tells integer types apart.
template <class F>
void visit_integer(const TensorView& t, F&& f) {
  switch (t.dtype) {
    case DType::i64: return f(static_cast<const int64_t*>(t.data));
    case DType::i32: return f(static_cast<const int32_t*>(t.data));
    default: return f(static_cast<const uint8_t*>(t.data));  // bool: a byte, whatever non-zero value it holds
  }
}

int64_t load(const TensorView& t, int64_t offset) {
  int64_t value = 0;
  visit_integer(t, [&](const auto* p) { value = p[offset]; });
  return value;
}

// [rows, cols], [heads, rows, cols] or [batches, heads, rows, cols] as the last.
TensorView as_rank4(std::string_view name, TensorView t, std::string_view allowed) {
  check_integer(name, t);
  if (t.rank < 2) fail(name, sizes_of(t), allowed);
  while (t.rank < 4) {
    std::copy_backward(t.sizes.begin(), t.sizes.begin() + t.rank, t.sizes.begin() + t.rank + 1);
    std::copy_backward(t.strides.begin(), t.strides.begin() + t.rank, t.strides.begin() + t.rank + 1);
    t.sizes[0] = 1;
    t.strides[0] = 0;
    ++t.rank;
  }
  return t;
}

// Bits of n <= 64 elements, non-zero ones set.
template <class T>
uint64_t pack(const T* p, int64_t stride, int n) {
  if (stride == 0) return *p == 0 ? 0 : ~uint64_t{0} >> (64 - n);  // of an expanded mask
  uint64_t word = 0;
  int k = 0;
  if constexpr (sizeof(T) == 1) {
    // Eight bytes at a time: byte != 0 to its top bit, then one multiplication gathers the eight bits.
    for (; stride == 1 && k + 8 <= n; k += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, p + k, 8);
      constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fu;
      const uint64_t ones = ((((bytes & kLow) + kLow) | bytes) & ~kLow) >> 7;
      word |= (ones * 0x0102040810204080u >> 56) << k;
    }
  }
  for (; k < n; ++k) word |= uint64_t{p[k * stride] != 0} << k;
  return word;
}

// A kept column of a row and where the caller listed it.
struct Listed {
  int64_t col = 0;
  int64_t source = 0;
};

void check_row(std::string_view name, std::vector<Listed>& row, int64_t cols, ColumnOrder order, int64_t row_index) {
  for (const Listed& x : row) {
    if (x.col < 0 || x.col >= cols) {
      fail(name, fmt::format("column {} (row {})", x.col, row_index), fmt::format("block columns 0..{}", cols - 1));
    }
  }
  if (order == ColumnOrder::any) std::sort(row.begin(), row.end(), [](auto& a, auto& b) { return a.col < b.col; });
  for (size_t n = 1; n < row.size(); ++n) {
    if (row[n].col <= row[n - 1].col) {
      fail(name, fmt::format("{} after {} (row {})", row[n].col, row[n - 1].col, row_index),
           order == ColumnOrder::any ? "each column once a row" : "ascending columns, each once a row");
    }
  }
}

PatternShape shape_of(int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k, int64_t heads, int64_t batches) {
  PatternShape shape;
  shape.seqlen_q = seqlen_q;
  shape.seqlen_k = seqlen_k;
  shape.block_q = block_q;
  shape.block_k = block_k;
  shape.heads = heads;
  shape.batches = batches;
  check_shape(shape);
  return shape;
}

}  // namespace

BlockPattern pattern_from_mask(const TensorView& given, int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k) {
  const TensorView mask = as_rank4("mask", given, "[rows, cols], [heads, rows, cols] or [batches, heads, rows, cols]");
  const PatternShape shape = shape_of(seqlen_q, seqlen_k, block_q, block_k, mask.sizes[1], mask.sizes[0]);
  if (mask.sizes[2] != shape.rows() || mask.sizes[3] != shape.cols()) {
    fail("mask", sizes_of(given), fmt::format("{} block rows and {} block columns", shape.rows(), shape.cols()));
  }
  PatternParts parts(shape);
  visit_integer(mask, [&](const auto* data) {
    for (int64_t b = 0; b < shape.batches; ++b) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        for (int64_t i = 0; i < shape.rows(); ++i) {
          const auto* row = data + b * mask.strides[0] + h * mask.strides[1] + i * mask.strides[2];
          for (int64_t j = 0; j < shape.cols(); ++j) {
            if (row[j * mask.strides[3]] != 0) parts.add(static_cast<int32_t>(j), nullptr);
          }
          parts.end_row();
        }
      }
    }
  });
  return parts.build();
}

BlockPattern pattern_from_token_mask(const TensorView& given, int block_q, int block_k) {
  const TensorView mask = as_rank4("mask", given, "[Sq, Sk], [heads, Sq, Sk] or [batches, heads, Sq, Sk]");
  const PatternShape shape = shape_of(mask.sizes[2], mask.sizes[3], block_q, block_k, mask.sizes[1], mask.sizes[0]);
  PatternParts parts(shape);
  const int words = shape.bitmap_words();
  std::vector<uint64_t> bits(static_cast<size_t>(block_q) * words);  // one block: all that is ever copied
  visit_integer(mask, [&](const auto* data) {
    for (int64_t b = 0; b < shape.batches; ++b) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        for (int64_t i = 0; i < shape.rows(); ++i) {
          for (int64_t j = 0; j < shape.cols(); ++j) {
            const int queries = queries_in(shape, i).last, keys = keys_in(shape, j);
            uint64_t any = 0;
            for (int q = 0; q < queries; ++q) {
              if (q > 0 && mask.strides[2] == 0) {  // as the first
                std::copy_n(bits.begin(), words, bits.begin() + q * words);
                continue;
              }
              const auto* row = data + b * mask.strides[0] + h * mask.strides[1] + (i * block_q + q) * mask.strides[2] +
                                j * block_k * mask.strides[3];
              for (int k = 0; k < keys; k += 64) {
                const uint64_t word = pack(row + k * mask.strides[3], mask.strides[3], std::min(64, keys - k));
                bits[q * words + k / 64] = word;
                any |= word;
              }
            }
            if (any != 0) parts.add(static_cast<int32_t>(j), bits.data());
          }
          parts.end_row();
        }
      }
    }
  });
  return parts.build();
}

BlockPattern pattern_from_lists(const PatternShape& shape, std::span<const std::vector<int32_t>> lists,
                                ColumnOrder order) {
  PatternParts parts(shape);
  if (static_cast<int64_t>(lists.size()) != shape.total_rows()) {
    fail("lists", fmt::format("{} lists", lists.size()),
         fmt::format("{} (batches * heads * block rows)", shape.total_rows()));
  }
  std::vector<Listed> row;
  for (size_t r = 0; r < lists.size(); ++r) {
    row.clear();
    for (int32_t col : lists[r]) row.push_back({col, 0});
    check_row("lists", row, shape.cols(), order, static_cast<int64_t>(r));
    for (const Listed& x : row) parts.add(static_cast<int32_t>(x.col), nullptr);
    parts.end_row();
  }
  return parts.build();
}

BlockPattern pattern_from_csr(const PatternShape& shape, std::span<const CsrMatrix> matrices, ColumnOrder order) {
  PatternParts parts(shape);
  if (static_cast<int64_t>(matrices.size()) != shape.batches * shape.heads) {
    fail("matrices", fmt::format("{} matrices", matrices.size()),
         fmt::format("{} (batches * heads)", shape.batches * shape.heads));
  }
  const int words = shape.bitmap_words();
  std::vector<uint64_t> bits(static_cast<size_t>(shape.block_q) * words);
  std::vector<Listed> row;
  for (const CsrMatrix& m : matrices) {
    check_sizes("indptr", m.indptr, {shape.rows() + 1});
    check_integer("indices", m.indices);
    if (m.indices.rank != 1) fail("indices", sizes_of(m.indices), "one dimension");
    const int64_t entries = m.indices.sizes[0];
    if (m.blocks.defined()) check_sizes("blocks", m.blocks, {entries, shape.block_q, shape.block_k});

    int64_t begin = load(m.indptr, 0);
    if (begin != 0) fail("indptr", fmt::format("{} at position 0", begin), "0 there");
    for (int64_t i = 0; i < shape.rows(); ++i) {
      const int64_t end = load(m.indptr, (i + 1) * m.indptr.strides[0]);
      if (end < begin || end > entries) {
        fail("indptr", fmt::format("{} after {} (row {})", end, begin, i),
             fmt::format("never falling and at most {}, the number of indices", entries));
      }
      row.clear();
      for (int64_t e = begin; e < end; ++e) row.push_back({load(m.indices, e * m.indices.strides[0]), e});
      check_row("indices", row, shape.cols(), order, i);
      for (const Listed& x : row) {
        if (m.blocks.defined()) {
          visit_integer(m.blocks, [&](const auto* data) {
            for (int q = 0; q < shape.block_q; ++q) {
              for (int k = 0; k < shape.block_k; k += 64) {
                const auto* p =
                    data + x.source * m.blocks.strides[0] + q * m.blocks.strides[1] + k * m.blocks.strides[2];
                bits[q * words + k / 64] = pack(p, m.blocks.strides[2], std::min(64, shape.block_k - k));
              }
            }
          });
        }
        parts.add(static_cast<int32_t>(x.col), m.blocks.defined() ? bits.data() : nullptr);
      }
      parts.end_row();
      begin = end;
    }
    if (begin != entries) {
      fail("indices", fmt::format("{} elements", entries), fmt::format("{}, the last of indptr", begin));
    }
  }
  return parts.build();
}

BlockPattern pattern_from_flex(const FlexBlockMask& mask, int64_t seqlen_q, int64_t seqlen_k, int block_q,
                               int block_k) {
  check_integer("kv_num_blocks", mask.kv_num_blocks);
  if (mask.kv_num_blocks.rank != 3) fail("kv_num_blocks", sizes_of(mask.kv_num_blocks), "[batches, heads, rows]");
  const PatternShape shape =
      shape_of(seqlen_q, seqlen_k, block_q, block_k, mask.kv_num_blocks.sizes[1], mask.kv_num_blocks.sizes[0]);
  check_integer("kv_indices", mask.kv_indices);
  const int64_t rows = std::max(shape.rows(), mask.kv_num_blocks.sizes[2]);
  const int64_t width = std::max(shape.cols(), mask.kv_indices.rank == 4 ? mask.kv_indices.sizes[3] : 0);
  const auto check_lists = [&](std::string_view count_name, const TensorView& count, std::string_view index_name,
                               const TensorView& index) {
    check_sizes(count_name, count, {shape.batches, shape.heads, rows});
    check_sizes(index_name, index, {shape.batches, shape.heads, rows, width});
  };
  const bool with_full = mask.full_kv_num_blocks.defined() || mask.full_kv_indices.defined();
  check_lists("kv_num_blocks", mask.kv_num_blocks, "kv_indices", mask.kv_indices);
  if (with_full) {
    check_lists("full_kv_num_blocks", mask.full_kv_num_blocks, "full_kv_indices", mask.full_kv_indices);
  }
  const TensorView& answers = mask.answers;
  if (answers.defined()) check_sizes("answers", answers, {answers.sizes[0], block_q, block_k});

  constexpr int64_t kFull = -1;  // Listed::source; of others which of kv_* they are
  std::vector<Listed> row;
  const auto list = [&row](std::string_view name, const TensorView& count, const TensorView& index, int64_t b,
                           int64_t h, int64_t i, int64_t first) {
    const int64_t n = load(count, b * count.strides[0] + h * count.strides[1] + i * count.strides[2]);
    if (n < 0 || n > index.sizes[3]) {
      fail(name, fmt::format("{} (row {})", n, i), fmt::format("0..{}, the width of the indices", index.sizes[3]));
    }
    for (int64_t t = 0; t < n; ++t) {
      const int64_t at = b * index.strides[0] + h * index.strides[1] + i * index.strides[2] + t * index.strides[3];
      row.push_back({load(index, at), first == kFull ? kFull : first + t});
    }
  };

  PatternParts parts(shape);
  const int words = shape.bitmap_words();
  std::vector<uint64_t> bits(static_cast<size_t>(block_q) * words);
  int64_t listed = 0;  // blocks of kv_* in the rows before
  const auto admits = [&](int64_t b, int64_t h, int64_t i, const Listed& x, int q, int k) {
    if (!answers.defined()) return mask.mask_mod(b, h, i * block_q + q, x.col * block_k + k);
    return load(answers, x.source * answers.strides[0] + q * answers.strides[1] + k * answers.strides[2]) != 0;
  };
  for (int64_t b = 0; b < shape.batches; ++b) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        row.clear();
        list("kv_num_blocks", mask.kv_num_blocks, mask.kv_indices, b, h, i, listed);
        const int64_t end = listed + static_cast<int64_t>(row.size());
        if (answers.defined() && end > answers.sizes[0]) {
          fail("answers", sizes_of(answers), fmt::format("[{}, {}, {}] or more", end, block_q, block_k));
        }
        if (with_full) list("full_kv_num_blocks", mask.full_kv_num_blocks, mask.full_kv_indices, b, h, i, kFull);
        listed = end;
        check_row("kv_indices", row, width, ColumnOrder::any, i);
        if (i >= shape.rows()) continue;
        for (const Listed& x : row) {
          if (x.col >= shape.cols()) continue;
          if (x.source == kFull || (!mask.mask_mod && !answers.defined())) {
            parts.add(static_cast<int32_t>(x.col), nullptr);
            continue;
          }
          std::fill(bits.begin(), bits.end(), 0);
          for (int q = 0; q < queries_in(shape, i).last; ++q) {
            for (int k = 0; k < keys_in(shape, x.col); ++k) {
              bits[q * words + k / 64] |= uint64_t{admits(b, h, i, x, q, k)} << (k % 64);
            }
          }
          parts.add(static_cast<int32_t>(x.col), bits.data());
        }
        parts.end_row();
      }
    }
  }
  return parts.build();
}

}  // namespace tessera
