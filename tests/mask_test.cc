// The mask geometry against the definition of each mask, pair by pair. 9 queries by 11 keys, diagonals and windows
// from beyond one end to beyond the other: every corner case of an interval is among them.
#include "call/mask.h"

#include <gtest/gtest.h>

#include "attention_inputs.h"

namespace tessera {
namespace {

constexpr int64_t kQueries = 9, kKeys = 11;

template <class Visit>
void for_each_geometry(Visit visit) {
  for (const int64_t diagonal : {-20, -3, 0, 2, 5, 30}) {
    for (const int64_t left : {int64_t{0}, int64_t{3}, MaskGeometry::kUnlimited}) {
      for (const int64_t right : {int64_t{0}, int64_t{2}, MaskGeometry::kUnlimited}) {
        for (const int64_t limit : {int64_t{0}, int64_t{1}, int64_t{7}, kKeys}) {
          visit(MaskGeometry{.diagonal = diagonal, .left = left, .right = right, .key_limit = limit});
        }
      }
    }
  }
}

bool admitted_by_definition(const MaskGeometry& m, int64_t q, int64_t k) {
  const int64_t position_q = q + m.diagonal, position_k = k;
  return k < m.key_limit && position_k >= position_q - m.left && position_k <= position_q + m.right;
}

TEST(Mask, PairsAndIntervals) {
  for_each_geometry([](const MaskGeometry& m) {
    for (int64_t q = 0; q < kQueries; ++q) {
      const Interval keys = m.keys_of(q, kKeys);
      for (int64_t k = 0; k < kKeys; ++k) {
        const bool expected = admitted_by_definition(m, q, k);
        ASSERT_EQ(m.admits(q, k), expected);
        ASSERT_EQ(k >= keys.begin && k < keys.end, expected);
        const Interval queries = m.queries_of(k, 0, kQueries);
        ASSERT_EQ(q >= queries.begin && q < queries.end, expected);
      }
    }
  });
}

TEST(Mask, TilesAreWhatTheirPairsAre) {
  for_each_geometry([](const MaskGeometry& m) {
    for (int64_t q0 = 0; q0 < kQueries; q0 += 3) {
      for (int64_t k0 = 0; k0 < kKeys; k0 += 4) {
        const int64_t q1 = std::min(kQueries, q0 + 3), k1 = std::min(kKeys, k0 + 4);
        int64_t admitted = 0;
        for (int64_t q = q0; q < q1; ++q) {
          for (int64_t k = k0; k < k1; ++k) admitted += admitted_by_definition(m, q, k);
        }
        const TileKind kind = m.classify(q0, q1, k0, k1);
        // "partial" is always safe; "empty" and "full" must be true, and full must not be missed.
        if (kind == TileKind::empty) {
          ASSERT_EQ(admitted, 0);
        }
        ASSERT_EQ(kind == TileKind::full, admitted == (q1 - q0) * (k1 - k0));
      }
    }
  });
}

// admitted_pairs against counting, for full and partial blocks, bitmaps of one and two words, heads and batches.
TEST(AdmittedPairs, CountsEachPairOnce) {
  for (const int block_k : {32, 80}) {
    PatternShape shape{100, 130, 48, block_k, 2, 2};
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices, bitmap_index;
    std::vector<uint64_t> bitmaps;
    uint64_t state = 1;
    for (int64_t row = 0; row < shape.total_rows(); ++row) {
      for (int64_t j = 0; j < shape.cols(); ++j) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        if (state >> 63) continue;
        indices.push_back(static_cast<int32_t>(j));
        bitmap_index.push_back(state >> 62 & 1 ? 0 : -1);
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
    for (int i = 0; i < shape.block_q * shape.bitmap_words(); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const int bits = std::min(64, block_k - 64 * (i % shape.bitmap_words()));
      bitmaps.push_back((state ^ state >> 31) & (~uint64_t{0} >> (64 - bits)));
    }
    const BlockPattern pattern = BlockPattern::from_csr(shape, indptr, indices, bitmap_index, bitmaps);
    const std::vector<int64_t> lengths{130, 77};
    for (const bool causal : {false, true}) {
      for (const bool padded : {false, true}) {
        AttentionOptions o;
        o.causal = causal;
        o.window_left = 60;
        if (padded) o.key_lengths = lengths;
        int64_t expected = 0;
        const BlockPatternView v = pattern.view();
        for (int64_t b = 0; b < 2; ++b) {
          for (int64_t h = 0; h < 2; ++h) {
            for (int64_t q = 0; q < 100; ++q) {
              const int64_t row = v.row_id(b, h, q / 48);
              for (int64_t e = v.indptr[row]; e < v.indptr[row + 1]; ++e) {
                for (int64_t i = 0; i < block_k; ++i) {
                  const int64_t k = v.indices[e] * block_k + i, distance = q + 30 - k;
                  const uint64_t* bits = v.bitmap(e);
                  if (k >= (padded ? lengths[b] : 130) || distance > 60 || (causal && distance < 0)) continue;
                  if (bits && !(bits[q % 48 * shape.bitmap_words() + i / 64] >> (i % 64) & 1)) continue;
                  ++expected;
                }
              }
            }
          }
        }
        EXPECT_EQ(admitted_pairs(pattern, o, 2, 2), expected);
      }
    }
  }
}

TEST(AdmittedPairs, SharedPatternsAndLargeOnes) {
  AttentionOptions causal;
  causal.causal = true;
  EXPECT_EQ(admitted_pairs(dense_pattern(50, 50), causal, 3, 4), 12 * 50 * 51 / 2);
  EXPECT_EQ(admitted_pairs(dense_pattern(50, 50), {}, 0, 4), 0);
  // The diagonal blocks of 2^22 tokens: more than 2^31 pairs, counted without walking them.
  const PatternShape shape{int64_t{1} << 22, int64_t{1} << 22, 256, 256};
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  for (int64_t i = 0; i < shape.rows(); ++i) {
    indices.push_back(static_cast<int32_t>(i));
    indptr.push_back(i + 1);
  }
  EXPECT_EQ(admitted_pairs(BlockPattern::from_csr(shape, indptr, indices), {}, 2, 8), (int64_t{1} << 22) * 256 * 16);
  EXPECT_EQ(error_argument([] { admitted_pairs(dense_pattern(50, 50), {}, -1, 1); }), "batch");
}

}  // namespace
}  // namespace tessera
