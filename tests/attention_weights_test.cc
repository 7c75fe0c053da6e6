// attention_weights(): the weights times V are the reference's output, each row sums to 1, what is masked is 0. 70 x 90
// tokens in blocks of 32 x 48: ragged ends on both sides; every option, as in the kernels.
#include <gtest/gtest.h>

#include <limits>

#include "attention_inputs.h"
#include "call/rows.h"
#include "check/cases.h"

namespace tessera {
namespace {

check::CaseConfig config_of(uint64_t seed) {
  check::CaseConfig c;
  c.seed = seed;
  c.batch = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.seqlen_q = 70;
  c.seqlen_k = 90;
  c.head_dim = 12;
  c.head_dim_v = 7;
  c.block_q = 32;
  c.block_k = 48;
  c.pattern_per_head = true;
  return c;
}

// Multiplies the weights with V and compares with the reference, whose error bound serves here too.
void expect_reproduces_output(const check::CaseConfig& config, int threads) {
  check::Case test(config);
  ThreadPool pool(threads);
  const BlockWeights w = attention_weights(test.args(), pool);
  const Problem& p = test.problems()[0];
  const int64_t dv = p.head_dim_v, n = p.batch * p.seqlen_q * p.heads * dv;
  std::vector<double> expected(n), out(n), sums(p.batch * p.heads * p.seqlen_q), value(dv);
  std::vector<float> bound(n);
  ForwardArgs args = test.args();
  args.out = make_view(expected.data(), DType::f64, {p.batch, p.seqlen_q, p.heads, dv});
  args.lse = {};
  reference_forward(args, pool, bound.data());
  EXPECT_EQ(w.shape, (std::array<int64_t, 4>{p.batch, p.heads, p.seqlen_q, p.seqlen_k}));
  ASSERT_EQ(w.values.size(), w.indices.size() * w.block_q * w.block_k);
  for (size_t n_block = 0; n_block < w.indices.size(); ++n_block) {
    const auto [b, h, i, j] = w.indices[n_block];
    if (n_block > 0) {
      const auto& last = w.indices[n_block - 1];
      EXPECT_LT(std::tie(last.batch, last.head, last.row, last.col), std::tie(b, h, i, j));
    }
    for (int64_t r = 0; r < w.block_q; ++r) {
      for (int64_t c = 0; c < w.block_k; ++c) {
        const int64_t q = i * w.block_q + r, k = j * w.block_k + c;
        const float weight = w.values[(n_block * w.block_q + r) * w.block_k + c];
        ASSERT_GE(weight, 0);
        if (q >= p.seqlen_q || k >= p.seqlen_k || !p.mask(b).admits(q, k)) {
          ASSERT_EQ(weight, 0) << q << " " << k;
        }
        if (weight == 0) continue;
        sums[(b * p.heads + h) * p.seqlen_q + q] += weight;
        load_row(p.v.at(b, k, h / p.group(), size_of(p.dtype)), p.dtype, dv, value.data());
        for (int64_t d = 0; d < dv; ++d) out[((b * p.seqlen_q + q) * p.heads + h) * dv + d] += weight * value[d];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) ASSERT_NEAR(out[i], expected[i], bound[i]) << describe(config);
  for (const double sum : sums) {
    if (config.sinks) {
      ASSERT_LT(sum, 1);
    } else if (sum != 0) {
      ASSERT_NEAR(sum, 1, 1e-5);
    }
  }
}

TEST(Weights, ReproduceTheOutput) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    check::CaseConfig c = config_of(seed);
    c.source = seed % 2 ? check::PatternSource::random_bitmaps : check::PatternSource::random_csr;
    expect_reproduces_output(c, 1);
    c.causal = true;
    c.window_left = 40;
    c.key_lengths = true;
    expect_reproduces_output(c, 2);
  }
}

TEST(Weights, WithEveryOption) {
  check::CaseConfig c = config_of(9);
  c.scale = -0.4;
  c.softcap = 3;
  c.alibi = c.block_bias = c.attn_bias = c.bias_minus_infinity = c.sinks = true;
  expect_reproduces_output(c, 3);
  c.dtype = DType::bf16;
  expect_reproduces_output(c, 1);
  c = config_of(10);
  c.values = check::Values::large;
  expect_reproduces_output(c, 1);
}

TEST(Weights, BeforeDropoutAndWithoutOutputs) {
  InlineExecutor executor;
  Call c({.seqlen_q = 20, .seqlen_k = 20}, DType::f64, dense_pattern(20, 20));
  c.args.out = c.args.lse = {};
  const BlockWeights plain = attention_weights(c.args, executor);
  c.args.options.dropout.p = 0.9;
  EXPECT_EQ(attention_weights(c.args, executor).values, plain.values);
}

TEST(Weights, NanStaysInItsRow) {
  InlineExecutor executor;
  Call c({.seqlen_q = 20, .seqlen_k = 20}, DType::f32, dense_pattern(20, 20));
  c.args.options.causal = true;
  c.k.set(10, std::nan(""));
  const BlockWeights w = attention_weights(c.args, executor);
  for (size_t n = 0; n < w.indices.size(); ++n) {
    for (int64_t i = 0; i < 16 * 16; ++i) {
      const int64_t q = w.indices[n].row * 16 + i / 16, k = w.indices[n].col * 16 + i % 16;
      EXPECT_EQ(std::isnan(w.values[n * 256 + i]), q >= 10 && q < 20 && k <= q) << q << " " << k;
    }
  }
}

TEST(Weights, SizeIsLimited) {
  InlineExecutor executor;
  Call c({.seqlen_q = 64, .seqlen_k = 64}, DType::f32, dense_pattern(64, 64));
  EXPECT_EQ(error_argument([&] { attention_weights(c.args, executor, 64 * 64 * 4); }), "max_bytes");
  EXPECT_EQ(error_argument([&] { attention_weights(c.args, executor, 64 * 64 * 4 + 1000); }), "");
}

}  // namespace
}  // namespace tessera
