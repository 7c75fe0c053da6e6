// Combinators against boolean algebra on dense token matrices: random shapes with ragged ends and block_q != block_k,
// patterns with full, partial and missing blocks, heads and batches that agree or broadcast.
#include "tessera/pattern_combine.h"

#include <gtest/gtest.h>

#include <string>

#include "pattern_cases.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {
namespace {

using testing::dense_tokens;
using testing::Random;
using testing::random_pattern;

template <class F>
void expect_error(const std::string& argument, F&& f) {
  try {
    f();
    ADD_FAILURE() << "no Error for " << argument;
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
  }
}

// Token matrix of a pattern repeated to the given heads and batches.
std::vector<uint8_t> broadcast_tokens(const BlockPattern& p, int64_t heads, int64_t batches) {
  const PatternShape& s = p.shape();
  const std::vector<uint8_t> own = dense_tokens(p);
  const int64_t size = s.seqlen_q * s.seqlen_k;
  std::vector<uint8_t> out;
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t g = (s.batches == 1 ? 0 : b) * s.heads + (s.heads == 1 ? 0 : h);
      out.insert(out.end(), own.begin() + g * size, own.begin() + (g + 1) * size);
    }
  }
  return out;
}

TEST(Combine, UniteAndIntersectAreOrAndAnd) {
  Random random(31);
  for (int n = 0; n < 100; ++n) {
    PatternShape a = testing::random_shape(random, random.chance(0.5) ? 1 : 3, random.chance(0.5) ? 1 : 2);
    PatternShape b = a;
    if (a.heads == 1) b.heads = random.in(1, 3);
    if (a.batches == 1) b.batches = random.in(1, 2);
    if (random.chance(0.3)) b.heads = 1;
    const BlockPattern x = random_pattern(random, a, 0.5), y = random_pattern(random, b, 0.5, random.chance(0.7));
    const BlockPattern either = unite(x, y), both = intersect(x, y);
    const int64_t heads = std::max(a.heads, b.heads), batches = std::max(a.batches, b.batches);
    ASSERT_EQ(either.shape().heads, heads);
    ASSERT_EQ(either.shape().batches, batches);
    const std::vector<uint8_t> tx = broadcast_tokens(x, heads, batches), ty = broadcast_tokens(y, heads, batches);
    const std::vector<uint8_t> te = dense_tokens(either), tb = dense_tokens(both);
    for (size_t t = 0; t < te.size(); ++t) {
      ASSERT_EQ(te[t], tx[t] | ty[t]);
      ASSERT_EQ(tb[t], tx[t] & ty[t]);
    }
    EXPECT_TRUE(either == unite(y, x));
    EXPECT_TRUE(both == intersect(y, x));
    EXPECT_TRUE(unite(x, x) == x);
    EXPECT_TRUE(intersect(x, x) == x);
    EXPECT_TRUE(intersect(either, x) == unite(both, x) || heads != a.heads || batches != a.batches);
  }
}

// Two halves of a bitmap unite to a full block and intersect to none.
TEST(Combine, BitmapsBecomeFullOrVanish) {
  PatternShape s;
  s.seqlen_q = s.seqlen_k = 16;
  s.block_q = s.block_k = 16;
  const auto make = [&](uint64_t word) {
    return BlockPattern::from_csr(s, {0, 1}, {0}, {0}, std::vector<uint64_t>(16, word));
  };
  const BlockPattern low = make(0x00ff), high = make(0xff00);
  EXPECT_TRUE(unite(low, high) == BlockPattern::from_csr(s, {0, 1}, {0}));
  EXPECT_EQ(intersect(low, high).num_blocks(), 0);
}

TEST(Combine, RefusesDifferentShapes) {
  Random random(32);
  PatternShape s;
  s.seqlen_q = s.seqlen_k = 100;
  s.block_q = s.block_k = 32;
  s.heads = 2;
  const BlockPattern p = random_pattern(random, s, 0.5);
  const auto against = [&](auto&& change) {
    PatternShape t = s;
    change(t);
    const BlockPattern q = random_pattern(random, t, 0.5);
    return [p, q] { intersect(p, q); };
  };
  expect_error("seqlen_q", against([](PatternShape& t) { t.seqlen_q = 99; }));
  expect_error("seqlen_k", against([](PatternShape& t) { t.seqlen_k = 101; }));
  expect_error("block_q", against([](PatternShape& t) { t.block_q = 16; }));
  expect_error("block_k", against([](PatternShape& t) { t.block_k = 64; }));
  expect_error("heads", against([](PatternShape& t) { t.heads = 3; }));
}

TEST(Combine, SliceKeepsTheTokensInRange) {
  Random random(33);
  for (int n = 0; n < 100; ++n) {
    const PatternShape s = testing::random_shape(random, 2, 2);
    const BlockPattern p = random_pattern(random, s, 0.5);
    int64_t r[2] = {random.in(0, s.rows()), random.in(0, s.rows())};
    int64_t c[2] = {random.in(0, s.cols()), random.in(0, s.cols())};
    if (r[0] > r[1]) std::swap(r[0], r[1]);
    if (c[0] > c[1]) std::swap(c[0], c[1]);
    const BlockPattern cut = slice(p, r[0], r[1], c[0], c[1]);
    const PatternShape& t = cut.shape();
    const int64_t q0 = r[0] * s.block_q, k0 = c[0] * s.block_k;
    ASSERT_EQ(t.seqlen_q, r[0] == r[1] ? 0 : std::min(r[1] * s.block_q, s.seqlen_q) - q0);
    ASSERT_EQ(t.seqlen_k, c[0] == c[1] ? 0 : std::min(c[1] * s.block_k, s.seqlen_k) - k0);
    ASSERT_EQ(t.rows(), r[1] - r[0]);
    const std::vector<uint8_t> whole = dense_tokens(p), part = dense_tokens(cut);
    size_t at = 0;
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t q = 0; q < t.seqlen_q; ++q) {
        for (int64_t k = 0; k < t.seqlen_k; ++k) {
          ASSERT_EQ(part[at++], whole[(g * s.seqlen_q + q0 + q) * s.seqlen_k + k0 + k]);
        }
      }
    }
    EXPECT_TRUE(slice(p, 0, s.rows(), 0, s.cols()) == p);
    expect_error("row_begin", [&] { slice(p, -1, 0, 0, 0); });
    expect_error("row_end", [&] { slice(p, 0, s.rows() + 1, 0, 0); });
    expect_error("row_end", [&] { slice(p, 1, 0, 0, 0); });
    expect_error("col_begin", [&] { slice(p, 0, 0, s.cols() + 1, s.cols() + 1); });
    expect_error("col_end", [&] { slice(p, 0, 0, 0, -1); });
  }
}

TEST(Combine, StacksLieOneAfterTheOther) {
  Random random(34);
  for (int n = 0; n < 50; ++n) {
    PatternShape a = testing::random_shape(random, 2, 2), b = a;
    b.heads = 3;
    const BlockPattern patterns[] = {random_pattern(random, a, 0.5), random_pattern(random, b, 0.5, false)};
    const BlockPattern heads = stack_heads(patterns);
    ASSERT_EQ(heads.shape().heads, 5);
    const int64_t size = a.seqlen_q * a.seqlen_k;
    const std::vector<uint8_t> x = dense_tokens(patterns[0]), y = dense_tokens(patterns[1]);
    std::vector<uint8_t> expected;
    for (int64_t batch = 0; batch < 2; ++batch) {
      expected.insert(expected.end(), x.begin() + batch * 2 * size, x.begin() + (batch + 1) * 2 * size);
      expected.insert(expected.end(), y.begin() + batch * 3 * size, y.begin() + (batch + 1) * 3 * size);
    }
    EXPECT_EQ(dense_tokens(heads), expected);

    b = a;
    b.batches = 1;
    const BlockPattern more[] = {patterns[0], random_pattern(random, b, 0.5)};
    expected = x;
    const std::vector<uint8_t> z = dense_tokens(more[1]);
    expected.insert(expected.end(), z.begin(), z.end());
    EXPECT_EQ(dense_tokens(stack_batches(more)), expected);
    EXPECT_TRUE(stack_batches(std::span(more).first(1)) == more[0]);
    expect_error("batches", [&] { stack_heads(more); });
    expect_error("heads", [&] { stack_batches(patterns); });
  }
  expect_error("patterns", [] { stack_heads({}); });
  PatternShape s;
  s.seqlen_q = s.seqlen_k = 64;
  PatternShape t = s;
  t.block_k = 64;
  const BlockPattern different[] = {random_pattern(random, s, 0.5), random_pattern(random, t, 0.5)};
  expect_error("patterns", [&] { stack_heads(different); });
}

TEST(Combine, TransposeSwapsTokens) {
  Random random(35);
  for (int n = 0; n < 100; ++n) {
    const PatternShape s = testing::random_shape(random, 2, 2);
    const BlockPattern p = random_pattern(random, s, 0.4, random.chance(0.8)), t = transpose(p);
    ASSERT_EQ(t.shape().seqlen_q, s.seqlen_k);
    ASSERT_EQ(t.shape().block_q, s.block_k);
    const std::vector<uint8_t> a = dense_tokens(p), b = dense_tokens(t);
    for (int64_t g = 0; g < 4; ++g) {
      for (int64_t q = 0; q < s.seqlen_q; ++q) {
        for (int64_t k = 0; k < s.seqlen_k; ++k) {
          ASSERT_EQ(a[(g * s.seqlen_q + q) * s.seqlen_k + k], b[(g * s.seqlen_k + k) * s.seqlen_q + q]);
        }
      }
    }
    EXPECT_TRUE(transpose(t) == p);
  }
}

// A shape that stands somewhere: causal or not, with a position of its own or without, beginning inside a block or not.
PatternShape placed_shape(Random& random, int64_t heads = 1, int64_t batches = 1) {
  PatternShape s = testing::random_shape(random, heads, batches);
  s.causal = random.chance(0.6);
  if (random.chance(0.6)) s.q_offset = random.in(-50, 450);
  if (random.chance(0.6)) s.q_skip = static_cast<int>(random.in(0, s.block_q - 1));
  return s;
}

// subtract is "and not"; complement is "not" among the admissible pairs.
TEST(Combine, SubtractAndComplementAreTokenExact) {
  Random random(37);
  for (int n = 0; n < 150; ++n) {
    PatternShape s = placed_shape(random, 2, 1);
    const BlockPattern x = random_pattern(random, s, 0.6);
    if (!s.placed() && random.chance(0.5))
      s.q_offset = random.in(-50, 450);  // stands anywhere, beside one that does not
    if (x.shape().causal && random.chance(0.5)) s.causal = false;
    s.heads = random.in(1, 2);
    const BlockPattern y = random_pattern(random, s, 0.6);
    const std::vector<uint8_t> tx = broadcast_tokens(x, 2, 1), ty = broadcast_tokens(y, 2, 1);
    const std::vector<uint8_t> rest = dense_tokens(subtract(x, y)), not_x = dense_tokens(complement(x));
    const PatternShape& shape = x.shape();
    for (int64_t h = 0, t = 0; h < 2; ++h) {
      for (int64_t q = 0; q < shape.seqlen_q; ++q) {
        for (int64_t k = 0; k < shape.seqlen_k; ++k, ++t) {
          ASSERT_EQ(rest[t], tx[t] & !ty[t]);
          const bool admissible = !shape.causal || k <= q + shape.diagonal();
          ASSERT_EQ(not_x[t], admissible && !tx[t]) << "query " << q << " key " << k;
        }
      }
    }
    EXPECT_TRUE(complement(complement(x)) == intersect(x, complement(random_pattern(random, shape, 0.0))));
  }
}

TEST(Combine, CausalityIsNeitherLostNorInvented) {
  Random random(38);
  for (int n = 0; n < 100; ++n) {
    PatternShape s = placed_shape(random, 1, 2);
    s.causal = false;
    const BlockPattern open = random_pattern(random, s, 0.5), causal = make_causal(open);
    ASSERT_TRUE(causal.shape().causal);
    const std::vector<uint8_t> all = dense_tokens(open), past = dense_tokens(causal);
    size_t t = 0;
    for (int64_t b = 0; b < s.batches; ++b) {
      for (int64_t q = 0; q < s.seqlen_q; ++q) {
        for (int64_t k = 0; k < s.seqlen_k; ++k, ++t) ASSERT_EQ(past[t], all[t] && k <= q + s.diagonal());
      }
    }
    const BlockPattern spelled = without_causality(causal);
    EXPECT_FALSE(spelled.shape().causal);
    EXPECT_EQ(dense_tokens(spelled), past);
    EXPECT_EQ(dense_tokens(intersect(causal, open)), past);
    EXPECT_TRUE(intersect(open, causal).shape().causal);
    expect_error("causal", [&] { unite(open, causal); });
    expect_error("causal", [&] { subtract(open, causal); });
    expect_error("q_offset", [&] { make_causal(causal, s.diagonal() + 1); });
    PatternShape elsewhere = causal.shape();
    elsewhere.q_offset = s.diagonal() + 1;
    expect_error("q_offset", [&] { intersect(causal, random_pattern(random, elsewhere, 0.5)); });
    if (s.q_skip != 0) {
      expect_error("pattern", [&] { transpose(causal); });
      continue;
    }
    const std::vector<uint8_t> turned = dense_tokens(transpose(causal));
    for (int64_t b = 0; b < s.batches; ++b) {
      for (int64_t q = 0; q < s.seqlen_q; ++q) {
        for (int64_t k = 0; k < s.seqlen_k; ++k) {
          ASSERT_EQ(turned[(b * s.seqlen_k + k) * s.seqlen_q + q], past[(b * s.seqlen_q + q) * s.seqlen_k + k]);
        }
      }
    }
  }
}

// Slices and rows of what stands somewhere, twice over: each token keeps its pairs.
TEST(Combine, PartsOfPlacedPatternsKeepTheirPairs) {
  Random random(39);
  for (int n = 0; n < 150; ++n) {
    const PatternShape s = placed_shape(random);
    const BlockPattern p = random_pattern(random, s, 0.6);
    const std::vector<uint8_t> whole = dense_tokens(p);
    const auto expect_part = [&](const BlockPattern& part, int64_t q0, int64_t k0) {
      const PatternShape& t = part.shape();
      const std::vector<uint8_t> tokens = dense_tokens(part);
      for (int64_t q = 0; q < t.seqlen_q; ++q) {
        for (int64_t k = 0; k < t.seqlen_k; ++k) {
          ASSERT_EQ(tokens[q * t.seqlen_k + k], whole[(q0 + q) * s.seqlen_k + k0 + k]) << q0 + q << ", " << k0 + k;
        }
      }
    };
    const int64_t begin = random.in(0, s.seqlen_q), end = random.in(begin, s.seqlen_q);
    const BlockPattern rows = for_queries(p, begin, end);
    expect_part(rows, begin, 0);
    EXPECT_EQ(rows.shape().diagonal(), s.diagonal() + begin);
    const int64_t inner = random.in(0, end - begin);
    expect_part(for_queries(rows, inner, end - begin), begin + inner, 0);
    EXPECT_TRUE(for_queries(p, begin + inner, end) == for_queries(rows, inner, end - begin));
    const int64_t r = random.in(0, s.rows()), c = random.in(0, s.cols());
    expect_part(slice(p, r, s.rows(), c, s.cols()), r == s.rows() ? s.seqlen_q : s.query_begin(r), c * s.block_k);
    expect_part(slice(p, 0, r, 0, c), 0, 0);
    expect_error("begin", [&] { for_queries(p, -1, 0); });
    expect_error("end", [&] { for_queries(p, 0, s.seqlen_q + 1); });
  }
}

}  // namespace
}  // namespace tessera
