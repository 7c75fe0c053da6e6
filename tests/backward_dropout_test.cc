// Dropout in backward(): the mask is that of forward(), pair by pair. Random combinations with other options are in
// check_test.cc.
#include <gtest/gtest.h>

#include <cmath>

#include "attention_inputs.h"
#include "call/problem.h"
#include "tessera/backward.h"

namespace tessera {
namespace {

struct Training : Call {
  Numbers dout, dq, dk, dv;
  BackwardArgs back;

  Training(const Shape& s, DType dtype, const BlockPattern& pattern)
      : Call(s, dtype, pattern),
        dout(dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim_v},
             wave(s.batch * s.seqlen_q * s.heads * s.head_dim_v, 1.1, 0.2)),
        dq(DType::f32, {s.batch, s.seqlen_q, s.heads, s.head_dim}),
        dk(DType::f32, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim}),
        dv(DType::f32, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v}) {
    args.options.dropout = {.p = 0.3, .seed = 12345678901234567u, .offset = 98765432109876u};
    back = {.q = q.view,
            .k = k.view,
            .v = v.view,
            .pattern = pattern,
            .out = out.view,
            .lse = lse.view,
            .dout = dout.view,
            .dq = dq.view,
            .dk = dk.view,
            .dv = dv.view};
  }
  void run(Isa isa, Executor& executor) {
    args.isa = back.isa = isa;
    back.options = args.options;
    forward(args, executor);
    backward(back, executor);
  }
  // sum(out * dout) of the forward call.
  double loss(Executor& executor) {
    forward(args, executor);
    double sum = 0;
    for (int64_t i = 0; i < out.view.numel(); ++i) sum += out.get(i) * dout.get(i);
    return sum;
  }
};

// With all scores equal and dout 1, dv of a key is the number of queries that keep it / (1 - p) / n.
TEST(BackwardDropout, DropsWhatTheGeneratorSays) {
  constexpr int64_t kTokens = 150;
  ThreadPool pool(3);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Isa isa : usable_isas()) {
      Training c({.batch = 2,
                  .seqlen_q = kTokens,
                  .seqlen_k = kTokens,
                  .heads = 2,
                  .kv_heads = 2,
                  .head_dim = 4,
                  .head_dim_v = 3},
                 dtype, dense_pattern(kTokens, kTokens, 48, 64));
      for (int64_t i = 0; i < c.dout.view.numel(); ++i) c.dout.set(i, 1);
      c.args.options.scale = 0;
      c.run(isa, pool);
      const Dropout& dropout = c.args.options.dropout;
      for (int64_t row = 0; row < 2 * kTokens * 2; ++row) {
        const int64_t b = row / 2 / kTokens, k = row / 2 % kTokens, h = row % 2;
        int64_t kept = 0;
        for (int64_t q = 0; q < kTokens; ++q) {
          kept += dropout_random(dropout, b * 2 + h, q, k) >= drop_threshold(dropout.p);
        }
        // Equal terms, each weight rounded once to the dtype (its relative error at most epsilon / 2), the rest fp32.
        const double expected = static_cast<double>(kept) / (1 - dropout.p) / kTokens;
        const double tolerance = expected * (epsilon_of(dtype) / 2 + kTokens * epsilon_of(DType::f32));
        ASSERT_NEAR(c.dv.get(row * 3), expected, tolerance) << name_of(isa) << " " << name_of(dtype) << " " << row;
      }
    }
  }
}

// Central differences of forward() itself, along one direction in each of q, k and v. 100 tokens, D 16.
TEST(BackwardDropout, IsTheDerivativeOfForward) {
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    Training c({.seqlen_q = 100, .seqlen_k = 100, .heads = 2, .head_dim = 16, .head_dim_v = 16}, DType::f32,
               dense_pattern(100, 100, 32, 48));
    c.args.options.causal = true;
    c.run(isa, executor);
    const std::pair<Numbers*, const Numbers*> inputs[] = {{&c.q, &c.dq}, {&c.k, &c.dk}, {&c.v, &c.dv}};
    for (const auto& [x, gradient] : inputs) {
      const std::vector<double> values = x->values(), along = wave(x->view.numel(), 2.3, 0.4);
      double expected = 0, norm = 0;
      for (size_t i = 0; i < along.size(); ++i) {
        const double product = gradient->get(static_cast<int64_t>(i)) * along[i];
        expected += product;
        norm += std::abs(product);
      }
      // Truncation is of order h^2 = 2e-4 of the sum of magnitudes, rounding of the fp32 out / h = 1e-5 of it; a mask
      // of its own would change all terms by their own size.
      constexpr double kStep = 0x1p-6;
      const auto moved = [&](double step) {
        for (size_t i = 0; i < along.size(); ++i) x->set(static_cast<int64_t>(i), values[i] + step * along[i]);
        return c.loss(executor);
      };
      const double slope = (moved(kStep) - moved(-kStep)) / (2 * kStep);
      moved(0);
      EXPECT_NEAR(slope, expected, 2e-3 * norm) << name_of(isa) << " " << gradient - &c.dq;
      EXPECT_GT(norm, 1) << "the test sees something";
    }
  }
}

// A ring step: the lower rows alone, at their place, give the same dq; both halves' dk and dv add up to the whole's.
TEST(BackwardDropout, MaskFollowsPositionsNotTiles) {
  constexpr int64_t kTokens = 128, kHalf = 64, kDim = 8;
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    Training whole({.seqlen_q = kTokens, .seqlen_k = kTokens, .head_dim = kDim, .head_dim_v = kDim}, DType::f32,
                   dense_pattern(kTokens, kTokens, 64, 64));
    whole.run(isa, executor);
    std::vector<double> dk(kTokens * kDim), dv(kTokens * kDim);
    for (int64_t half = 0; half < 2; ++half) {
      Training part({.seqlen_q = kHalf, .seqlen_k = kTokens, .head_dim = kDim, .head_dim_v = kDim}, DType::f32,
                    dense_pattern(kHalf, kTokens, 32, 16));
      for (int64_t i = 0; i < kHalf * kDim; ++i) {
        part.q.set(i, whole.q.get(half * kHalf * kDim + i));
        part.dout.set(i, whole.dout.get(half * kHalf * kDim + i));
      }
      part.args.options.q_offset = half * kHalf;
      part.run(isa, executor);
      // Sums of at most 128 terms of order 1 in fp32.
      for (int64_t i = 0; i < kHalf * kDim; ++i) {
        ASSERT_NEAR(part.dq.get(i), whole.dq.get(half * kHalf * kDim + i), 1e-5) << name_of(isa) << " " << i;
      }
      for (int64_t i = 0; i < kTokens * kDim; ++i) {
        dk[i] += part.dk.get(i);
        dv[i] += part.dv.get(i);
      }
    }
    for (int64_t i = 0; i < kTokens * kDim; ++i) {
      ASSERT_NEAR(dk[i], whole.dk.get(i), 2e-5) << name_of(isa) << " " << i;
      ASSERT_NEAR(dv[i], whole.dv.get(i), 2e-5) << name_of(isa) << " " << i;
    }
  }
}

}  // namespace
}  // namespace tessera
