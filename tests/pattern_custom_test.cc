// Patterns from masks, lists, CSR/BSR, token masks and FlexAttention block masks: against the same thing read pair by
// pair, over random shapes with ragged ends, block_q != block_k, heads and batches, all integer types, and strides
// that are contiguous, transposed, padded, negative and zero; and everything that must be refused.
#include "tessera/pattern_custom.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <string>

#include "pattern_cases.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {
namespace {

using testing::dense_tokens;
using testing::Random;

constexpr DType kIntegers[] = {DType::boolean, DType::u8, DType::i32, DType::i64};

// A tensor of integers in memory with strides of any kind.
class Holder {
 public:
  // padding: elements between neighbours of the last dimension are 1 + padding apart. reverse: it runs backwards.
  Holder(DType dtype, std::vector<int64_t> sizes, int64_t padding = 0, bool reverse = false, bool swap_last = false) {
    view.dtype = dtype;
    view.rank = static_cast<int>(sizes.size());
    int64_t stride = 1 + padding;
    std::vector<int> order(sizes.size());
    std::iota(order.begin(), order.end(), 0);
    if (swap_last && sizes.size() > 1) std::swap(order[sizes.size() - 1], order[sizes.size() - 2]);
    for (size_t n = sizes.size(); n-- > 0;) {
      view.sizes[order[n]] = sizes[order[n]];
      view.strides[order[n]] = stride;
      stride *= std::max<int64_t>(1, sizes[order[n]]);
    }
    bytes_.assign(static_cast<size_t>(stride) * size_of(dtype) + 8, 0x5a);  // what lies between must not matter
    int64_t first = 0;
    if (reverse) {
      const int last = view.rank - 1;
      first = (view.sizes[last] - 1) * view.strides[last];
      view.strides[last] = -view.strides[last];
    }
    view.data = bytes_.data() + std::max<int64_t>(0, first) * static_cast<int64_t>(size_of(dtype));
  }
  Holder(const Holder&) = delete;

  void set(std::initializer_list<int64_t> at, int64_t value) {
    int64_t offset = 0;
    int d = 0;
    for (int64_t x : at) offset += x * view.strides[d++];
    void* data = const_cast<void*>(view.data);
    switch (view.dtype) {
      case DType::i64: static_cast<int64_t*>(data)[offset] = value; break;
      case DType::i32: static_cast<int32_t*>(data)[offset] = static_cast<int32_t>(value); break;
      default: static_cast<uint8_t*>(data)[offset] = static_cast<uint8_t>(value); break;
    }
  }

  TensorView view;

 private:
  std::vector<uint8_t> bytes_;
};

template <class F>
void expect_error(const std::string& argument, F&& f) {
  try {
    f();
    ADD_FAILURE() << "no Error for " << argument;
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
  }
}

// Non-zero comes as any value that the type has: the low byte alone may be 0.
int64_t non_zero(Random& random, DType dtype) {
  if (dtype == DType::boolean) return 1;
  if (dtype == DType::u8) return random.chance(0.5) ? 128 : random.in(1, 255);
  return random.chance(0.5) ? 256 : -random.in(1, 1000);
}

TEST(FromMask, KeepsNonZeroBlocks) {
  Random random(21);
  for (int n = 0; n < 120; ++n) {
    const PatternShape s = testing::random_shape(random, random.in(1, 3), random.in(1, 2));
    const DType dtype = kIntegers[n % 4];
    Holder mask(dtype, {s.batches, s.heads, s.rows(), s.cols()}, random.in(0, 2), random.chance(0.3),
                random.chance(0.3));
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices;
    for (int64_t b = 0; b < s.batches; ++b) {
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t i = 0; i < s.rows(); ++i) {
          for (int64_t j = 0; j < s.cols(); ++j) {
            const bool keep = random.chance(0.4);
            mask.set({b, h, i, j}, keep ? non_zero(random, dtype) : 0);
            if (keep) indices.push_back(static_cast<int32_t>(j));
          }
          indptr.push_back(static_cast<int64_t>(indices.size()));
        }
      }
    }
    EXPECT_TRUE(pattern_from_mask(mask.view, s.seqlen_q, s.seqlen_k, s.block_q, s.block_k) ==
                BlockPattern::from_csr(s, indptr, indices));
  }
}

// DeepSpeed's SparsityConfig.make_layout: int64 [heads, rows, cols]. Here its "fixed" layout of 2 local blocks.
TEST(FromMask, TakesADeepSpeedLayout) {
  Holder layout(DType::i64, {2, 4, 4});
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 4; ++j) layout.set({h, i, j}, i / 2 == j / 2);
    }
  }
  const BlockPattern p = pattern_from_mask(layout.view, 64, 64, 16, 16);
  EXPECT_EQ(p.shape().heads, 2);
  EXPECT_EQ(testing::columns_of(p, 1, 3), (std::set<int64_t>{2, 3}));
  EXPECT_EQ(p.num_blocks(), 16);
}

TEST(FromMask, StrideZeroRepeats) {
  Holder row(DType::boolean, {4});
  for (int64_t j = 0; j < 4; ++j) row.set({j}, j % 2);
  TensorView mask = row.view;
  mask.rank = 2;
  mask.sizes = {3, 4};
  mask.strides = {0, 1};
  const BlockPattern p = pattern_from_mask(mask, 48, 64, 16, 16);
  for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(testing::columns_of(p, 0, i), (std::set<int64_t>{1, 3}));
}

TEST(FromMask, RefusesWhatDoesNotFit) {
  const Holder mask(DType::boolean, {3, 4});
  const auto make = [](const TensorView& m, int64_t q = 48, int64_t k = 64) { pattern_from_mask(m, q, k, 16, 16); };
  expect_error("mask", [&] { make(mask.view, 49); });
  expect_error("mask", [&] { make(mask.view, 48, 48); });
  expect_error("mask", [&] { make(TensorView{}); });
  expect_error("mask", [&] { make(Holder(DType::f32, {3, 4}).view); });
  expect_error("mask", [&] { make(Holder(DType::u8, {4}).view); });
  TensorView bad = mask.view;
  bad.data = nullptr;
  expect_error("mask", [&] { make(bad); });
  bad = mask.view;
  bad.sizes[1] = -4;
  expect_error("mask", [&] { make(bad); });
  bad = mask.view;
  bad.rank = 5;
  expect_error("mask", [&] { make(bad); });
  expect_error("heads", [&] { make(Holder(DType::u8, {0, 3, 4}).view); });
  expect_error("seqlen_q", [&] { make(mask.view, -48); });
  expect_error("block_q", [&] { pattern_from_mask(mask.view, 48, 64, 20, 16); });
}

TEST(FromTokenMask, AdmitsTheSamePairs) {
  Random random(22);
  for (int n = 0; n < 100; ++n) {
    const PatternShape s = testing::random_shape(random, random.in(1, 2), random.in(1, 2));
    const DType dtype = kIntegers[n % 4];
    Holder mask(dtype, {s.batches, s.heads, s.seqlen_q, s.seqlen_k}, n % 3 == 0 ? 1 : 0, random.chance(0.2),
                random.chance(0.2));
    // Blocks that are empty, full and mixed, independent of the pattern's own blocks.
    std::vector<uint8_t> expected;
    const uint64_t salt = random.word();
    for (int64_t b = 0; b < s.batches; ++b) {
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t q = 0; q < s.seqlen_q; ++q) {
          for (int64_t k = 0; k < s.seqlen_k; ++k) {
            const uint64_t kind = ((q / 48) * 7 + (k / 80) * 13 + h * 3 + b + salt) % 3;
            const bool admit = kind == 0 || (kind == 1 && random.chance(0.3));
            mask.set({b, h, q, k}, admit ? non_zero(random, dtype) : 0);
            expected.push_back(admit);
          }
        }
      }
    }
    const BlockPattern p = pattern_from_token_mask(mask.view, s.block_q, s.block_k);
    ASSERT_TRUE(p.shape() == s);
    EXPECT_EQ(dense_tokens(p), expected);
  }
}

// The bitmaps of a causal mask: full below, one shared diagonal bitmap, one more for the ragged end.
TEST(FromTokenMask, SharesBitmaps) {
  Holder mask(DType::boolean, {200, 200});
  for (int64_t q = 0; q < 200; ++q) {
    for (int64_t k = 0; k < 200; ++k) mask.set({q, k}, k <= q);
  }
  const BlockPattern p = pattern_from_token_mask(mask.view, 64, 64);
  EXPECT_EQ(p.num_blocks(), 10);
  EXPECT_EQ(p.num_bitmaps(), 2);
  TensorView three = mask.view;
  three.rank = 1;
  expect_error("mask", [&] { pattern_from_token_mask(three, 64, 64); });
  expect_error("block_k", [&] { pattern_from_token_mask(mask.view, 64, 65); });
}

TEST(FromLists, SortsOnRequest) {
  PatternShape s;
  s.seqlen_q = 40;
  s.seqlen_k = 64;
  s.block_q = s.block_k = 16;
  const BlockPattern expected = BlockPattern::from_csr(s, {0, 2, 2, 5}, {0, 3, 0, 1, 2});
  using Lists = std::vector<std::vector<int32_t>>;
  EXPECT_TRUE(pattern_from_lists(s, Lists{{0, 3}, {}, {0, 1, 2}}) == expected);
  EXPECT_TRUE(pattern_from_lists(s, Lists{{3, 0}, {}, {2, 0, 1}}, ColumnOrder::any) == expected);
  expect_error("lists", [&] { pattern_from_lists(s, Lists{{3, 0}, {}, {}}); });
  expect_error("lists", [&] { pattern_from_lists(s, Lists{{0, 0}, {}, {}}); });
  expect_error("lists", [&] { pattern_from_lists(s, Lists{{1, 0, 1}, {}, {}}, ColumnOrder::any); });
  expect_error("lists", [&] { pattern_from_lists(s, Lists{{4}, {}, {}}, ColumnOrder::any); });
  expect_error("lists", [&] { pattern_from_lists(s, Lists{{-1}, {}, {}}); });
  expect_error("lists", [&] { pattern_from_lists(s, Lists{{0}, {}}); });
  s.block_q = 7;
  expect_error("block_q", [&] { pattern_from_lists(s, Lists{{0}, {}}); });
}

// CSR and BSR of every head, in order and shuffled, int32 and int64, against the pattern they came from.
TEST(FromCsrMatrices, RoundTrip) {
  Random random(23);
  for (int n = 0; n < 80; ++n) {
    const PatternShape s = testing::random_shape(random, random.in(1, 2), random.in(1, 2));
    const bool bsr = n % 2 == 1, shuffle = random.chance(0.5);
    const BlockPattern p = testing::random_pattern(random, s, 0.4, bsr);
    const BlockPatternView v = p.view();
    std::vector<std::unique_ptr<Holder>> holders;
    std::vector<CsrMatrix> matrices;
    for (int64_t g = 0; g < s.batches * s.heads; ++g) {
      const int64_t first = v.indptr[g * s.rows()], entries = v.indptr[(g + 1) * s.rows()] - first;
      const auto hold = [&](DType dtype, std::vector<int64_t> sizes) -> Holder& {
        return *holders.emplace_back(std::make_unique<Holder>(dtype, std::move(sizes), random.in(0, 1)));
      };
      Holder& indptr = hold(kIntegers[2 + n % 2], {s.rows() + 1});
      Holder& indices = hold(kIntegers[2 + random.in(0, 1)], {entries});
      Holder& blocks = hold(kIntegers[random.in(0, 3)], {entries, s.block_q, s.block_k});
      for (int64_t i = 0; i <= s.rows(); ++i) indptr.set({i}, v.indptr[g * s.rows() + i] - first);
      for (int64_t i = 0; i < s.rows(); ++i) {
        const int64_t begin = v.indptr[g * s.rows() + i] - first, end = v.indptr[g * s.rows() + i + 1] - first;
        for (int64_t e = begin; e < end; ++e) {
          const int64_t to = shuffle ? begin + end - 1 - e : e;
          indices.set({to}, v.indices[first + e]);
          const uint64_t* bits = v.bitmap(first + e);
          for (int64_t q = 0; q < s.block_q; ++q) {
            for (int64_t k = 0; k < s.block_k; ++k) {
              const bool admit = bits == nullptr || (bits[q * s.bitmap_words() + k / 64] >> (k % 64) & 1) != 0;
              blocks.set({to, q, k}, admit);
            }
          }
        }
      }
      matrices.push_back({indptr.view, indices.view, bsr ? blocks.view : TensorView{}});
    }
    const bool sorted = [&] {
      for (int64_t r = 0; r < s.total_rows(); ++r) {
        if (shuffle && v.indptr[r + 1] - v.indptr[r] > 1) return false;
      }
      return true;
    }();
    EXPECT_TRUE(pattern_from_csr(s, matrices, ColumnOrder::any) == p);
    if (sorted) {
      EXPECT_TRUE(pattern_from_csr(s, matrices) == p);
    } else {
      expect_error("indices", [&] { pattern_from_csr(s, matrices); });
    }
  }
}

TEST(FromCsrMatrices, RefusesHostileArrays) {
  PatternShape s;
  s.seqlen_q = 40;
  s.seqlen_k = 64;
  s.block_q = s.block_k = 16;
  const auto make = [&](std::vector<int64_t> indptr, std::vector<int64_t> indices, int64_t block_entries = -1) {
    Holder blocks(DType::u8, {std::max<int64_t>(0, block_entries), 16, 16});
    const CsrMatrix m{
        make_view(static_cast<const void*>(indptr.data()), DType::i64, {static_cast<int64_t>(indptr.size())}),
        make_view(static_cast<const void*>(indices.data()), DType::i64, {static_cast<int64_t>(indices.size())}),
        block_entries < 0 ? TensorView{} : blocks.view};
    return pattern_from_csr(s, std::span(&m, 1), ColumnOrder::any);
  };
  EXPECT_EQ(make({0, 2, 2, 3}, {3, 0, 1}).num_blocks(), 3);
  EXPECT_EQ(make({0, 2, 2, 3}, {3, 0, 1}, 3).num_blocks(), 3);
  expect_error("blocks", [&] { make({0, 2, 2, 3}, {3, 0, 1}, 2); });
  expect_error("indptr", [&] { make({0, 2, 3}, {3, 0, 1}); });
  expect_error("indptr", [&] { make({1, 2, 2, 3}, {3, 0, 1}); });
  expect_error("indptr", [&] { make({0, 2, 1, 3}, {3, 0, 1}); });
  expect_error("indptr", [&] { make({0, 4, 4, 4}, {3, 0, 1}); });
  expect_error("indptr", [&] { make({0, std::numeric_limits<int64_t>::max(), 2, 3}, {3, 0, 1}); });
  expect_error("indices", [&] { make({0, 2, 2, 2}, {3, 0, 1}); });
  expect_error("indices", [&] { make({0, 2, 2, 3}, {3, 3, 1}); });
  expect_error("indices", [&] { make({0, 2, 2, 3}, {3, 4, 1}); });
  expect_error("indices", [&] { make({0, 2, 2, 3}, {3, -1, 1}); });
  expect_error("indices", [&] { make({0, 2, 2, 3}, {3, (int64_t{1} << 32) + 1, 1}); });  // 1 if cut to 32 bits
  expect_error("matrices", [&] { pattern_from_csr(s, {}); });
  expect_error("indptr", [&] {
    const CsrMatrix none;
    pattern_from_csr(s, std::span(&none, 1));
  });
}

// A causal sliding window as create_block_mask lists it: partial blocks in kv_*, whole ones in full_kv_*, both in any
// order, what lies past the counts is rubbish.
TEST(FromFlex, AsksMaskModInPartialBlocksOnly) {
  const int64_t seqlen = 150;
  const int block = 32;
  const auto admit = [](int64_t, int64_t h, int64_t q, int64_t k) { return k <= q && q - k <= 40 + 30 * h; };
  Holder mask(DType::boolean, {2, seqlen, seqlen});
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t q = 0; q < seqlen; ++q) {
      for (int64_t k = 0; k < seqlen; ++k) mask.set({h, q, k}, admit(0, h, q, k));
    }
  }
  const BlockPattern expected = pattern_from_token_mask(mask.view, block, block);
  const BlockPatternView v = expected.view();
  const int64_t rows = v.shape.rows();

  Holder num(DType::i32, {1, 2, rows}), indices(DType::i32, {1, 2, rows, rows});
  Holder full_num(DType::i32, {1, 2, rows}), full_indices(DType::i32, {1, 2, rows, rows});
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t partial = 0, full = 0;
      for (int64_t e = v.indptr[h * rows + i + 1]; e-- > v.indptr[h * rows + i];) {
        if (v.bitmap(e) != nullptr) {
          indices.set({0, h, i, partial++}, v.indices[e]);
        } else {
          full_indices.set({0, h, i, full++}, v.indices[e]);
        }
      }
      num.set({0, h, i}, partial);
      full_num.set({0, h, i}, full);
    }
  }
  FlexBlockMask flex{num.view, indices.view, full_num.view, full_indices.view, nullptr};
  const auto make = [&] { return pattern_from_flex(flex, seqlen, seqlen, block, block); };
  const BlockPattern whole = make();  // without mask_mod every listed block is whole
  EXPECT_EQ(whole.num_blocks(), expected.num_blocks());
  EXPECT_EQ(whole.num_bitmaps(), 0);
  flex.mask_mod = [&](int64_t b, int64_t h, int64_t q, int64_t k) {
    const int64_t r = h * rows + q / block;
    const int32_t* at = std::find(v.indices + v.indptr[r], v.indices + v.indptr[r + 1], k / block);
    EXPECT_TRUE(v.bitmap(at - v.indices) != nullptr);
    EXPECT_TRUE(q < seqlen && k < seqlen);
    return admit(b, h, q, k);
  };
  EXPECT_TRUE(make() == expected);

  // Answers beforehand, in the order in which blocks are listed; then of shorter sequences, which leave out what lies
  // past their ends.
  Holder answers(DType::boolean, {40, block, block});
  int64_t listed = 0;
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t e = v.indptr[h * rows + i + 1]; e-- > v.indptr[h * rows + i];) {
        if (v.bitmap(e) == nullptr) continue;
        for (int64_t n = 0; n < block * block; ++n) {
          answers.set({listed, n / block, n % block},
                      admit(0, h, i * block + n / block, int64_t{v.indices[e]} * block + n % block));
        }
        ++listed;
      }
    }
  }
  ASSERT_LE(listed, 40);
  const auto mask_mod = std::exchange(flex.mask_mod, nullptr);
  flex.answers = answers.view;
  EXPECT_TRUE(make() == expected);
  mask.view.sizes[1] = mask.view.sizes[2] = 100;
  EXPECT_TRUE(pattern_from_flex(flex, 100, 100, block, block) == pattern_from_token_mask(mask.view, block, block));
  flex.answers.sizes[0] = listed - 1;
  expect_error("answers", make);
  flex.answers = {};
  flex.mask_mod = mask_mod;
  flex.full_kv_num_blocks.sizes[2] = rows - 1;
  expect_error("full_kv_num_blocks", make);
  flex.full_kv_num_blocks.sizes[2] = rows;

  num.set({0, 1, 2}, rows + 1);
  expect_error("kv_num_blocks", make);
  num.set({0, 1, 2}, -1);
  expect_error("kv_num_blocks", make);
  num.set({0, 1, 2}, 1);
  indices.set({0, 1, 2, 0}, rows);
  expect_error("kv_indices", make);
  indices.set({0, 1, 2, 0}, 1);
  full_num.set({0, 1, 2}, 1);
  full_indices.set({0, 1, 2, 0}, 1);  // listed as partial too
  expect_error("kv_indices", make);
  flex.full_kv_indices = {};
  expect_error("full_kv_indices", make);
  flex.full_kv_num_blocks = {};
  flex.kv_indices.sizes[3] = 2;
  expect_error("kv_indices", make);
}

}  // namespace
}  // namespace tessera
