// BlockPattern as a value: what it refuses, what it makes of bitmaps, its transposed form, hash and equality, and its
// use from several threads. Shapes: random ones of up to 400 tokens with ragged ends (pattern_cases.h); 2 heads and 3
// batches where those matter.
#include "tessera/block_pattern.h"

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <string>
#include <thread>

#include "pattern_cases.h"
#include "tessera/error.h"

namespace tessera {
namespace {

using testing::dense_tokens;
using testing::Random;

PatternShape shape_of(int64_t seqlen_q, int64_t seqlen_k, int block = 16, int64_t heads = 1, int64_t batches = 1) {
  PatternShape s;
  s.seqlen_q = seqlen_q;
  s.seqlen_k = seqlen_k;
  s.block_q = s.block_k = block;
  s.heads = heads;
  s.batches = batches;
  return s;
}

struct Csr {
  PatternShape shape = shape_of(48, 64);  // 3 x 4 blocks
  std::vector<int64_t> indptr{0, 2, 2, 5};
  std::vector<int32_t> indices{0, 3, 0, 1, 2};
  std::vector<int32_t> bitmap_index;
  std::vector<uint64_t> bitmaps;
  BlockPattern make() const { return BlockPattern::from_csr(shape, indptr, indices, bitmap_index, bitmaps); }
};

template <class Change>
void expect_error(const std::string& argument, Change&& change) {
  Csr csr;
  change(csr);
  try {
    csr.make();
    ADD_FAILURE() << "no Error for " << argument;
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
  }
}

TEST(FromCsr, TakesWhatIsRight) {
  const BlockPattern p = Csr().make();
  EXPECT_EQ(p.num_blocks(), 5);
  EXPECT_EQ(p.num_bitmaps(), 0);
  EXPECT_EQ(p.view().bitmap_index, nullptr);
  EXPECT_EQ(p.view().bitmap(0), nullptr);
  EXPECT_GE(p.bytes(), 4 * 8 + 5 * 4u);
}

TEST(FromCsr, RefusesHostileIndptr) {
  expect_error("indptr", [](Csr& c) { c.indptr.clear(); });
  expect_error("indptr", [](Csr& c) { c.indptr.pop_back(); });
  expect_error("indptr", [](Csr& c) { c.indptr.push_back(5); });
  expect_error("indptr", [](Csr& c) { c.indptr[0] = 1; });
  expect_error("indptr", [](Csr& c) { c.indptr[0] = -1; });
  expect_error("indptr", [](Csr& c) { c.indptr[1] = -1; });
  expect_error("indptr", [](Csr& c) { c.indptr[2] = 1; });
  expect_error("indptr", [](Csr& c) { c.indptr[1] = 6; });
  expect_error("indptr", [](Csr& c) { c.indptr[3] = 6; });
  expect_error("indptr", [](Csr& c) { c.indptr[1] = std::numeric_limits<int64_t>::max(); });
  expect_error("indptr", [](Csr& c) { c.indptr[1] = std::numeric_limits<int64_t>::min(); });
}

TEST(FromCsr, RefusesHostileIndices) {
  expect_error("indices", [](Csr& c) { c.indices[1] = 4; });
  expect_error("indices", [](Csr& c) { c.indices[0] = -1; });
  expect_error("indices", [](Csr& c) { c.indices[0] = std::numeric_limits<int32_t>::min(); });
  expect_error("indices", [](Csr& c) { c.indices[1] = std::numeric_limits<int32_t>::max(); });
  expect_error("indices", [](Csr& c) { c.indices[1] = 0; });                       // twice
  expect_error("indices", [](Csr& c) { std::swap(c.indices[2], c.indices[3]); });  // unsorted
  expect_error("indices", [](Csr& c) { c.indices.push_back(3); });
  expect_error("indices", [](Csr& c) { c.shape.seqlen_k = 0; });  // no column is left
}

TEST(FromCsr, RefusesHostileShapes) {
  expect_error("block_q", [](Csr& c) { c.shape.block_q = 0; });
  expect_error("block_q", [](Csr& c) { c.shape.block_q = 20; });
  expect_error("block_k", [](Csr& c) { c.shape.block_k = -16; });
  expect_error("block_k", [](Csr& c) { c.shape.block_k = 512; });
  expect_error("seqlen_q", [](Csr& c) { c.shape.seqlen_q = -1; });
  expect_error("seqlen_q", [](Csr& c) { c.shape.seqlen_q = std::numeric_limits<int64_t>::max(); });
  expect_error("seqlen_k", [](Csr& c) { c.shape.seqlen_k = std::numeric_limits<int64_t>::min(); });
  expect_error("seqlen_k", [](Csr& c) { c.shape.seqlen_k = int64_t{1} << 40; });  // more columns than int32 can name
  expect_error("heads", [](Csr& c) { c.shape.heads = 0; });
  expect_error("heads", [](Csr& c) { c.shape.heads = std::numeric_limits<int64_t>::max(); });
  expect_error("batches", [](Csr& c) { c.shape.batches = -3; });
  expect_error("heads", [](Csr& c) {
    c.shape.heads = c.shape.batches = 1 << 20;
    c.shape.seqlen_k = int64_t{1} << 34;
  });
  expect_error("indptr", [](Csr& c) { c.shape.heads = 2; });
}

TEST(FromCsr, RefusesHostileBitmaps) {
  const auto with_bitmaps = [](auto&& change) {
    return [change](Csr& c) {
      c.bitmap_index = {-1, 0, -1, 1, -1};
      c.bitmaps.assign(2 * 16, 1);
      change(c);
    };
  };
  Csr right;
  with_bitmaps([](Csr&) {})(right);
  EXPECT_EQ(right.make().num_bitmaps(), 1);
  expect_error("bitmap_index", with_bitmaps([](Csr& c) { c.bitmap_index[0] = 2; }));
  expect_error("bitmap_index", with_bitmaps([](Csr& c) { c.bitmap_index[0] = -2; }));
  expect_error("bitmap_index", with_bitmaps([](Csr& c) { c.bitmap_index.pop_back(); }));
  expect_error("bitmap_index", with_bitmaps([](Csr& c) { c.bitmap_index.clear(); }));
  expect_error("bitmaps", with_bitmaps([](Csr& c) { c.bitmaps.pop_back(); }));
  expect_error("bitmap_index", with_bitmaps([](Csr& c) { c.bitmaps.clear(); }));
}

TEST(FromCsr, TakesEmptySequencesAndRows) {
  EXPECT_EQ(BlockPattern::from_csr(shape_of(0, 0), {0}, {}).num_blocks(), 0);
  EXPECT_EQ(BlockPattern::from_csr(shape_of(0, 100), {0}, {}).transposed().indptr[7], 0);
  EXPECT_EQ(BlockPattern::from_csr(shape_of(40, 0), {0, 0, 0, 0}, {}).num_blocks(), 0);
  const BlockPattern nothing;
  EXPECT_EQ(nothing.num_blocks(), 0);
  EXPECT_EQ(nothing.shape().rows(), 0);
  EXPECT_EQ(nothing.view().indptr[0], 0);
  EXPECT_EQ(nothing.transposed().indptr[0], 0);
}

// 24 x 24 tokens in blocks of 16: the last row and column hold 8 tokens. Bits past the ends count for nothing; full
// within the ends is full; empty within the ends is no block.
TEST(Bitmaps, AreCanonical) {
  const PatternShape shape = shape_of(24, 24);
  std::vector<uint64_t> full_within(16, 0), only_past(16, 0), once(16, 0);
  for (int q = 0; q < 8; ++q) full_within[q] = 0xff;  // the corner's 8 x 8
  for (int q = 0; q < 16; ++q) only_past[q] = q < 8 ? ~uint64_t{0xff} : ~uint64_t{0};
  once[3] = 0xffffffffffff0005u;  // past block_k too
  std::vector<uint64_t> bitmaps;
  for (const auto& b : {full_within, only_past, once, once}) bitmaps.insert(bitmaps.end(), b.begin(), b.end());
  const auto make = [&](std::vector<int32_t> bitmap_index) {
    return BlockPattern::from_csr(shape, {0, 2, 4}, {0, 1, 0, 1}, std::move(bitmap_index), bitmaps);
  };

  const BlockPattern full = make({-1, -1, -1, 0});
  EXPECT_EQ(full.num_bitmaps(), 0);
  EXPECT_TRUE(full == BlockPattern::from_csr(shape, {0, 2, 4}, {0, 1, 0, 1}));

  const BlockPattern dropped = make({-1, -1, -1, 1});
  EXPECT_EQ(dropped.num_blocks(), 3);
  EXPECT_TRUE(dropped == BlockPattern::from_csr(shape, {0, 2, 3}, {0, 1, 0}));

  // In (0, 0) the bits past block_k go; in (1, 1) nothing else goes either: one bitmap for both.
  const BlockPattern shared = make({2, -1, -1, 3});
  EXPECT_EQ(shared.num_blocks(), 4);
  EXPECT_EQ(shared.num_bitmaps(), 1);
  EXPECT_EQ(shared.view().bitmap(0)[3], 5u);
  EXPECT_EQ(shared.view().bitmap(3), shared.view().bitmap(0));
  // The same given bitmap is cut differently at the end: (0, 0) keeps what (0, 1) loses.
  const BlockPattern cut = make({1, -1, -1, -1});
  EXPECT_EQ(cut.num_bitmaps(), 1);
  EXPECT_EQ(cut.view().bitmap(0)[0], 0xff00u);
}

// Random bitmaps, among them full and empty ones and ones with bits past the ends: what is admitted never changes,
// and making a pattern from its own view gives the same pattern.
TEST(Bitmaps, RoundTrip) {
  Random random(11);
  for (int n = 0; n < 60; ++n) {
    const BlockPattern p = testing::random_pattern(random, testing::random_shape(random, 2, 3), 0.4);
    const BlockPatternView v = p.view();
    const int64_t entries = p.num_blocks(), words = v.shape.block_q * v.shape.bitmap_words();
    for (int64_t e = 0; e < entries; ++e) {
      if (const uint64_t* bits = v.bitmap(e)) {
        EXPECT_TRUE(std::any_of(bits, bits + words, [](uint64_t w) { return w != 0; }));
      }
    }
    const BlockPattern again = BlockPattern::from_csr(
        v.shape, {v.indptr, v.indptr + v.shape.total_rows() + 1}, {v.indices, v.indices + entries},
        v.bitmap_index ? std::vector<int32_t>(v.bitmap_index, v.bitmap_index + entries) : std::vector<int32_t>{},
        {v.bitmaps, v.bitmaps + p.num_bitmaps() * words});
    EXPECT_TRUE(p == again);
    EXPECT_EQ(p.hash(), again.hash());
    EXPECT_EQ(dense_tokens(p), dense_tokens(again));
  }
}

TEST(Transposed, HoldsTheSameEntriesByColumn) {
  Random random(12);
  for (int n = 0; n < 60; ++n) {
    const BlockPattern p = testing::random_pattern(random, testing::random_shape(random, 2, 3), 0.3);
    const BlockPatternView v = p.view();
    const TransposedView t = p.transposed();
    const PatternShape& s = v.shape;
    EXPECT_EQ(t.indptr[0], 0);
    EXPECT_EQ(t.indptr[s.total_cols()], p.num_blocks());
    std::set<int64_t> seen;
    for (int64_t b = 0; b < s.batches; ++b) {
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t j = 0; j < s.cols(); ++j) {
          const int64_t c = v.col_id(b, h, j);
          for (int64_t x = t.indptr[c]; x < t.indptr[c + 1]; ++x) {
            const int64_t e = t.entries[x], r = v.row_id(b, h, t.rows[x]);
            EXPECT_TRUE(seen.insert(e).second);
            EXPECT_EQ(v.indices[e], j);
            EXPECT_TRUE(v.indptr[r] <= e && e < v.indptr[r + 1]);
            EXPECT_TRUE(x == t.indptr[c] || t.rows[x - 1] < t.rows[x]);
          }
        }
      }
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), p.num_blocks());
  }
}

// Eight threads ask a fresh pattern for everything that is built lazily; under TSan a race fails here.
TEST(Transposed, IsBuiltOnceFromAnyThread) {
  Random random(13);
  for (int n = 0; n < 20; ++n) {
    const BlockPattern p = testing::random_pattern(random, testing::random_shape(random, 2), 0.5);
    const size_t before = p.bytes();
    std::atomic<int> waiting{8};
    std::vector<TransposedView> views(8);
    std::vector<uint64_t> hashes(8);
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t) {
      threads.emplace_back([&, t, copy = p] {
        --waiting;
        while (waiting.load() > 0) std::this_thread::yield();
        views[t] = copy.transposed();
        hashes[t] = copy.hash();
        EXPECT_GE(copy.bytes(), before);
      });
    }
    for (std::thread& t : threads) t.join();
    for (int t = 1; t < 8; ++t) {
      EXPECT_EQ(views[t].indptr, views[0].indptr);
      EXPECT_EQ(views[t].entries, views[0].entries);
      EXPECT_EQ(hashes[t], hashes[0]);
    }
    EXPECT_GE(p.bytes(), before + (p.shape().total_cols() + 1) * 8);
  }
}

// Equality and hash see every field. Machines compare hashes, so one value is written down; it was worked out apart
// from this code, from the definition in src/pattern/geometry.h.
TEST(Hash, SeesEverything) {
  Csr base;
  base.bitmap_index = {-1, 0, -1, 1, -1};
  base.bitmaps.assign(2 * 16, 1);
  base.bitmaps[20] = 3;
  const BlockPattern p = base.make();
  std::vector<BlockPattern> others;
  const auto other = [&](auto&& change) {
    Csr c = base;
    change(c);
    others.push_back(c.make());
  };
  other([](Csr& c) { c.shape.seqlen_q = 47; });
  other([](Csr& c) { c.shape.seqlen_k = 63; });
  other([](Csr& c) { c.shape.causal = true; });
  other([](Csr& c) { c.shape.q_offset = 0; });
  other([](Csr& c) { c.shape.seqlen_q = 47, c.shape.q_skip = 1; });
  other([](Csr& c) { c.indptr[2] = 3; });
  other([](Csr& c) { c.indices[4] = 3; });
  other([](Csr& c) { c.bitmap_index[2] = 0; });
  other([](Csr& c) { std::swap(c.bitmap_index[1], c.bitmap_index[3]); });
  other([](Csr& c) { c.bitmaps[0] = 2; });
  other([](Csr& c) {
    c.bitmap_index.clear();
    c.bitmaps.clear();
  });
  std::set<uint64_t> hashes{p.hash()};
  for (const BlockPattern& o : others) {
    EXPECT_FALSE(p == o);
    EXPECT_TRUE(hashes.insert(o.hash()).second);
  }
  EXPECT_TRUE(p == base.make());
  EXPECT_EQ(p.hash(), base.make().hash());
  EXPECT_EQ(BlockPattern::from_csr(shape_of(32, 32), {0, 1, 3}, {0, 0, 1}).hash(), 0x6515ae0859e26c9du);
}

}  // namespace
}  // namespace tessera
