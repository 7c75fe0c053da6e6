// PairMask: what it says of runs of keys, of rows and of columns is what the definition says of each pair. 150 x 210
// tokens in blocks of 48 x 80: bitmap rows of two words, ragged ends, runs that begin and end inside words.
#include "call/pair_mask.h"

#include <gtest/gtest.h>

#include <vector>

#include "check/random.h"

namespace tessera {
namespace {

struct Options {
  bool causal = false;
  std::optional<int64_t> window_left, window_right;
  bool lengths = false;
};

class Masks {
 public:
  explicit Masks(const Options& options) {
    check::Random random(7);
    PatternShape shape{150, 210, 48, 80};
    shape.q_skip = 5;
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices, bitmap_index;
    std::vector<uint64_t> bitmaps;
    for (int64_t i = 0; i < shape.rows(); ++i) {
      for (int32_t j = 0; j < shape.cols(); ++j) {
        if (random.chance(0.2)) continue;
        indices.push_back(j);
        bitmap_index.push_back(random.chance(0.4) ? -1 : static_cast<int32_t>(bitmaps.size()) / (48 * 2));
        for (int w = 0; bitmap_index.back() >= 0 && w < 48 * 2; ++w) bitmaps.push_back(random.next());
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
    pattern_ = BlockPattern::from_csr(shape, indptr, indices, bitmap_index, bitmaps);
    AttentionOptions o;
    o.causal = options.causal;
    o.window_left = options.window_left;
    o.window_right = options.window_right;
    if (options.lengths) o.key_lengths = lengths_;
    problem_ = resolve_mask(pattern_, o, 1, 1);
  }

  const Problem& problem() const { return problem_; }

  // The definition.
  bool admits(int64_t entry, int64_t q, int64_t k) const {
    const BlockPatternView& view = problem_.pattern;
    const PatternShape& s = view.shape;
    if (k < 0 || k >= s.seqlen_k || k / s.block_k != view.indices[entry]) return false;
    if (!problem_.mask(0).admits(q, k)) return false;
    const uint64_t* bitmap = view.bitmap(entry);
    const int64_t row = (q + s.q_skip) % s.block_q, key = k % s.block_k;
    return bitmap == nullptr || (bitmap[row * s.bitmap_words() + key / 64] >> (key % 64) & 1) != 0;
  }

 private:
  std::vector<int64_t> lengths_{173};
  BlockPattern pattern_;
  Problem problem_;
};

std::vector<Options> all_options() {
  return {{}, {.causal = true}, {.window_left = 30, .window_right = 11}, {.causal = true, .lengths = true}};
}

template <class Visit>  // visit(entry, first query, last query + 1)
void for_each_entry(const Problem& p, Visit visit) {
  const BlockPatternView& view = p.pattern;
  for (int64_t i = 0; i < view.shape.rows(); ++i) {
    for (int64_t e = view.indptr[i]; e < view.indptr[i + 1]; ++e) {
      visit(e, view.shape.query_begin(i), view.shape.query_end(i));
    }
  }
}

TEST(PairMask, RunsOfKeys) {
  for (const Options& options : all_options()) {
    const Masks masks(options);
    const PairMask mask(masks.problem(), 0);
    for_each_entry(masks.problem(), [&](int64_t e, int64_t begin, int64_t end) {
      const int64_t first = masks.problem().pattern.key_begin(e);
      for (int64_t q = begin; q < end; ++q) {
        for (const int64_t skip : {0, 1, 16, 33, 63, 64, 77}) {
          for (const int64_t n : {1, 7, 16, 64}) {
            if (skip + n > 80) continue;
            const uint64_t bits = mask.bits(e, q, first + skip, n);
            for (int64_t i = 0; i < 64; ++i) {
              ASSERT_EQ(bits >> i & 1, i < n && masks.admits(e, q, first + skip + i)) << q << " " << skip << " " << n;
            }
          }
        }
        std::vector<int64_t> keys, expected;
        mask.for_each_key(e, q, [&](int64_t k) { keys.push_back(k); });
        for (int64_t k = first; k < first + 80; ++k) {
          if (masks.admits(e, q, k)) expected.push_back(k);
        }
        ASSERT_EQ(keys, expected) << q;
        ASSERT_EQ(mask.any(e, q), !expected.empty()) << q;
      }
    });
  }
}

TEST(PairMask, ByKey) {
  for (const Options& options : all_options()) {
    const Masks masks(options);
    const PairMask mask(masks.problem(), 0);
    for_each_entry(masks.problem(), [&](int64_t e, int64_t begin, int64_t end) {
      for (const int64_t q : {begin, begin + 3}) {
        for (const int64_t skip : {0, 2, 66}) {
          const int64_t first = masks.problem().pattern.key_begin(e) + skip, n = 80 - skip, rows = end - q;
          std::vector<uint64_t> bits(n);
          mask.bits_by_key(e, q, rows, first, n, bits.data());
          for (int64_t i = 0; i < n; ++i) {
            for (int64_t r = 0; r < 64; ++r) {
              ASSERT_EQ(bits[i] >> r & 1, r < rows && masks.admits(e, q + r, first + i)) << q + r << " " << first + i;
            }
          }
        }
      }
    });
  }
}

TEST(PairMask, WholeBlocks) {
  int full = 0;
  for (const Options& options : all_options()) {
    const Masks masks(options);
    const PairMask mask(masks.problem(), 0);
    for_each_entry(masks.problem(), [&](int64_t e, int64_t begin, int64_t end) {
      const Interval keys = mask.keys(e, begin, end);
      const int64_t first = masks.problem().pattern.key_begin(e);
      bool all = !keys.empty();
      for (int64_t q = begin; q < end; ++q) {
        for (int64_t k = first; k < first + 80; ++k) {
          const bool admitted = masks.admits(e, q, k), inside = k >= keys.begin && k < keys.end;
          ASSERT_TRUE(inside || !admitted) << q << " " << k;
          all = all && (admitted || !inside);
        }
      }
      if (keys.empty()) return;
      ASSERT_EQ(mask.full(e, begin, end, keys), all);
      full += all;
    });
  }
  EXPECT_GT(full, 0);
}

}  // namespace
}  // namespace tessera
