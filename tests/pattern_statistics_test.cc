// Statistics against plain counting over random patterns (ragged, oblong, causal or not, 2 heads x 2 batches), a few
// by hand, and the drawing in characters against drawings made by hand.
#include "tessera/pattern_statistics.h"

#include <gtest/gtest.h>

#include <cmath>

#include "pattern_cases.h"
#include "tessera/error.h"
#include "tessera/pattern_combine.h"
#include "tessera/patterns.h"

namespace tessera {
namespace {

using testing::Random;

struct Counted {
  std::vector<double> values;
  double mean() const {
    double sum = 0;
    for (double x : values) sum += x;
    return values.empty() ? 0 : sum / static_cast<double>(values.size());
  }
  double std() const {
    double sum = 0;
    for (double x : values) sum += (x - mean()) * (x - mean());
    return values.empty() ? 0 : std::sqrt(sum / static_cast<double>(values.size()));
  }
  double min() const { return values.empty() ? 0 : *std::min_element(values.begin(), values.end()); }
  double max() const { return values.empty() ? 0 : *std::max_element(values.begin(), values.end()); }
};

// Means and deviations of at most a few hundred shares: their rounding stays below this.
constexpr double kTolerance = 1e-12;

void expect_spread(const Spread& got, const Counted& expected) {
  EXPECT_NEAR(got.mean, expected.mean(), kTolerance);
  EXPECT_NEAR(got.std, expected.std(), kTolerance);
  EXPECT_EQ(got.min, expected.min());
  EXPECT_EQ(got.max, expected.max());
}

TEST(Statistics, AgreeWithCounting) {
  Random random(41);
  for (int n = 0; n < 150; ++n) {
    const PatternShape s = testing::random_shape(random, 2, 2);
    const BlockPattern p = testing::random_pattern(random, s, 0.3 + 0.4 * (n % 2), n % 3 != 0);
    const bool causal = n % 2 == 0;
    const BlockPatternView v = p.view();
    const auto kept = [&](int64_t g, int64_t i, int64_t j) {
      const int64_t r = g * s.rows() + i;
      return std::find(v.indices + v.indptr[r], v.indices + v.indptr[r + 1], j) != v.indices + v.indptr[r + 1];
    };
    const auto admissible = [&](int64_t i, int64_t j) {
      const int64_t last = std::min((i + 1) * s.block_q, s.seqlen_q) - 1;
      return !causal || j * s.block_k <= last + s.seqlen_k - s.seqlen_q;
    };
    int64_t all = 0, inside = 0, diagonals = 0, rows_with_work = 0, empty = 0, longest = 0;
    Counted rows, cols;
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t i = 0; i < s.rows(); ++i) {
        int64_t row_all = 0, row_kept = 0, row_inside = 0;
        for (int64_t j = 0; j < s.cols(); ++j) {
          row_all += admissible(i, j);
          row_kept += kept(g, i, j);
          row_inside += admissible(i, j) && kept(g, i, j);
        }
        all += row_all;
        inside += row_inside;
        empty += row_kept == 0;
        longest = std::max(longest, row_kept);
        if (row_all == 0) continue;
        ++rows_with_work;
        diagonals += kept(g, i, diagonal_col(s, i));
        rows.values.push_back(static_cast<double>(row_inside) / static_cast<double>(row_all));
      }
      for (int64_t j = 0; j < s.cols(); ++j) {
        int64_t col_all = 0, col_inside = 0;
        for (int64_t i = 0; i < s.rows(); ++i) {
          col_all += admissible(i, j);
          col_inside += admissible(i, j) && kept(g, i, j);
        }
        if (col_all > 0) cols.values.push_back(static_cast<double>(col_inside) / static_cast<double>(col_all));
      }
    }
    const PatternStatistics got = statistics(p, causal);
    EXPECT_EQ(got.rows, s.rows());
    EXPECT_EQ(got.cols, s.cols());
    EXPECT_EQ(got.kept_blocks, p.num_blocks());
    EXPECT_EQ(got.admissible_blocks, all);
    EXPECT_EQ(got.empty_rows, empty);
    EXPECT_DOUBLE_EQ(got.density, all == 0 ? 0 : static_cast<double>(inside) / static_cast<double>(all));
    EXPECT_DOUBLE_EQ(got.sparsity, 1 - got.density);
    EXPECT_DOUBLE_EQ(got.diagonal_density,
                     rows_with_work == 0 ? 0 : static_cast<double>(diagonals) / static_cast<double>(rows_with_work));
    EXPECT_NEAR(got.load_imbalance,
                p.num_blocks() == 0 ? 0
                                    : static_cast<double>(longest) * static_cast<double>(4 * s.rows()) /
                                          static_cast<double>(p.num_blocks()),
                kTolerance * static_cast<double>(s.rows()));
    int64_t partial = 0;
    for (int64_t e = 0; e < p.num_blocks(); ++e) partial += v.bitmap(e) != nullptr;
    EXPECT_EQ(got.partial_blocks, partial);
    expect_spread(got.row_density, rows);
    expect_spread(got.column_density, cols);
  }
}

TEST(Statistics, OfDenseAndCausal) {
  PatternSpec spec;
  spec.seqlen_q = spec.seqlen_k = 64;
  spec.block_q = spec.block_k = 16;
  const PatternStatistics dense = statistics(make_pattern(spec));
  EXPECT_EQ(dense.density, 1);
  EXPECT_EQ(dense.load_imbalance, 1);
  spec.kind = PatternKind::causal;
  const BlockPattern causal = make_pattern(spec);
  EXPECT_EQ(statistics(causal).density, 1);
  EXPECT_EQ(statistics(causal, true).density, 1);
  EXPECT_THROW(statistics(causal, false), Error);
  EXPECT_EQ(statistics(without_causality(causal)).density, 10.0 / 16);
  EXPECT_EQ(statistics(for_queries(causal, 20, 40)).admissible_blocks, 2 + 3);
  EXPECT_EQ(statistics(causal, true).load_imbalance, 4 / 2.5);
  const PatternStatistics none = statistics(BlockPattern());
  EXPECT_EQ(none.kept_blocks + none.admissible_blocks + none.empty_rows, 0);
  EXPECT_EQ(none.load_imbalance, 0);
}

TEST(Ascii, DrawsEachPairIfItFits) {
  PatternShape s;
  s.seqlen_q = 40;
  s.seqlen_k = 64;
  s.block_q = s.block_k = 16;
  const BlockPattern p =
      BlockPattern::from_csr(s, {0, 2, 2, 5}, {0, 3, 0, 1, 2}, {-1, 0, -1, -1, 0}, std::vector<uint64_t>(16, 7));
  EXPECT_EQ(ascii(p), "#..+\n....\n##+.\n");
  EXPECT_EQ(ascii(p, 0, 4), ascii(p));
  EXPECT_EQ(ascii(BlockPattern()), "");
}

// 8 x 8 causal blocks at width 4: cells of 2 x 2; the diagonal ones hold 3 of 4 pairs. At width 3: cells of 3 x 3,
// smaller at the ends.
TEST(Ascii, ShadesCellsByTheirShare) {
  PatternSpec spec;
  spec.kind = PatternKind::causal;
  spec.seqlen_q = spec.seqlen_k = 128;
  spec.block_q = spec.block_k = 16;
  spec.heads = 2;
  const BlockPattern p = make_pattern(spec);
  EXPECT_EQ(ascii(p, 1, 4), "#...\n@#..\n@@#.\n@@@#\n");
  EXPECT_EQ(ascii(p, 0, 3), "*..\n@*.\n@@#\n");
  EXPECT_EQ(ascii(p, 0, 1), "+\n");
}

TEST(Ascii, RefusesWhatIsNotThere) {
  PatternSpec spec;
  spec.seqlen_q = spec.seqlen_k = 128;
  const BlockPattern p = make_pattern(spec);
  EXPECT_THROW(ascii(p, 1), Error);
  EXPECT_THROW(ascii(p, -1), Error);
  EXPECT_THROW(ascii(p, 0, 0), Error);
  EXPECT_THROW(ascii(p, 0, 80, 1), Error);
}

}  // namespace
}  // namespace tessera
