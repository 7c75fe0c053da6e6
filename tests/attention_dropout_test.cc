// Dropout: the generator is Philox 4x32-10, the mask is a function of position, the rate is p.
#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <set>

#include "attention_inputs.h"
#include "call/philox.h"
#include "call/problem.h"

namespace tessera {
namespace {

// Known answers of Random123 1.14.0, tests/kat_vectors, "philox4x32 10".
TEST(Philox, KnownAnswers) {
  using Counter = Philox::Counter;
  EXPECT_EQ(Philox::words({0, 0, 0, 0}, {0, 0}), (Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  EXPECT_EQ(Philox::words({ones, ones, ones, ones}, {ones, ones}),
            (Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox::words({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Dropout, EveryFieldCounts) {
  const Dropout d{.p = 0.5, .seed = 1, .offset = 2};
  const uint32_t x = dropout_random(d, 3, 4, 5);
  EXPECT_EQ(x, dropout_random(d, 3, 4, 5));
  EXPECT_NE(x, dropout_random(d, 4, 4, 5));
  EXPECT_NE(x, dropout_random(d, 3, 5, 5));
  EXPECT_NE(x, dropout_random(d, 3, 4, 6));  // another word of the same counter
  EXPECT_NE(x, dropout_random(d, 3, 4, 9));  // another counter
  EXPECT_NE(x, dropout_random(d, 3, -4, 5));
  for (const int shift : {0, 32}) {
    EXPECT_NE(x, dropout_random({.p = 0.5, .seed = d.seed + (uint64_t{1} << shift), .offset = 2}, 3, 4, 5));
    EXPECT_NE(x, dropout_random({.p = 0.5, .seed = 1, .offset = d.offset + (uint64_t{1} << shift)}, 3, 4, 5));
  }
}

// Joined by XOR the halves of these cancelled.
TEST(Dropout, SeedsAndOffsetsDoNotCancel) {
  const Dropout pairs[] = {{.seed = 0, .offset = 0},
                           {.seed = uint64_t{1} << 63, .offset = uint64_t{1} << 63},
                           {.seed = uint64_t{1} << 32, .offset = uint64_t{1} << 32},
                           {.seed = uint64_t{3} << 32, .offset = uint64_t{3} << 32}};
  std::set<uint32_t> seen;
  for (const Dropout& d : pairs) seen.insert(dropout_random(d, 3, 4, 5));
  EXPECT_EQ(seen.size(), std::size(pairs));
}

TEST(Dropout, RateIsP) {
  for (const double p : {0.01, 0.3, 0.9}) {
    constexpr int64_t kPairs = 200 * 500;
    int64_t dropped = 0;
    for (int64_t i = 0; i < kPairs; ++i) {
      dropped += dropout_random({.p = p, .seed = 77}, 0, i / 500, i % 500) < drop_threshold(p);
    }
    // Six standard deviations of a binomial.
    EXPECT_NEAR(static_cast<double>(dropped), kPairs * p, 6 * std::sqrt(kPairs * p * (1 - p))) << p;
  }
}

// With all scores equal and all values 1, a row's output is the number of kept keys / (1 - p) / n.
TEST(Dropout, KernelsDropWhatTheGeneratorSays) {
  constexpr int64_t kTokens = 150;
  constexpr double kP = 0.3;
  ThreadPool pool(3);
  for (const Isa isa : usable_isas()) {
    Call c({.batch = 2, .seqlen_q = kTokens, .seqlen_k = kTokens, .heads = 2, .head_dim = 4, .head_dim_v = 3},
           DType::f32, dense_pattern(kTokens, kTokens, 48, 64));
    for (int64_t i = 0; i < c.v.view.numel(); ++i) c.v.set(i, 1);
    c.args.options.scale = 0;
    c.args.options.dropout = {.p = kP, .seed = 12345678901234567u, .offset = 98765432109876u};
    c.args.isa = isa;
    forward(c.args, pool);
    for (int64_t row = 0; row < 2 * kTokens * 2; ++row) {
      const int64_t b = row / 2 / kTokens, q = row / 2 % kTokens, h = row % 2;
      int64_t kept = 0;
      for (int64_t k = 0; k < kTokens; ++k) {
        kept += dropout_random(c.args.options.dropout, b * 2 + h, q, k) >= drop_threshold(kP);
      }
      ASSERT_NEAR(c.out.get(row * 3), static_cast<double>(kept) / (1 - kP) / kTokens, 1e-5) << name_of(isa) << row;
      ASSERT_NEAR(c.lse.get((b * 2 + h) * kTokens + q), std::log(kTokens), 1e-5);  // lse is before dropout
    }
  }
}

// A ring step: the lower rows alone, at their place, see the same mask, bit for bit.
TEST(Dropout, MaskFollowsPositionsNotTiles) {
  constexpr int64_t kTokens = 128, kHalf = 64;
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    Call whole({.seqlen_q = kTokens, .seqlen_k = kTokens, .head_dim = 8, .head_dim_v = 8}, DType::f32,
               dense_pattern(kTokens, kTokens, 64, 64));
    Call lower({.seqlen_q = kHalf, .seqlen_k = kTokens, .head_dim = 8, .head_dim_v = 8}, DType::f32,
               dense_pattern(kHalf, kTokens, 32, 16));
    whole.args.options.dropout = lower.args.options.dropout = {.p = 0.5, .seed = 3};
    whole.args.isa = lower.args.isa = isa;
    lower.args.q.data = whole.q.memory.data() + kHalf * 8 * sizeof(float);
    lower.args.options.q_offset = kHalf;
    forward(whole.args, executor);
    forward(lower.args, executor);
    for (int64_t i = 0; i < kHalf * 8; ++i) {
      ASSERT_NEAR(lower.out.get(i), whole.out.get(kHalf * 8 + i), 1e-5) << name_of(isa) << " " << i;
    }
  }
}

}  // namespace
}  // namespace tessera
