// The fp64 reference gradients against fp64 central differences of the reference forward, for every option and every
// gradient. The loss is sum(out * G) + sum(lse * L) with waves for G and L, so that what reaches lse is tested too.
//
// Sizes: 18 x 20 tokens in blocks of 16 give two rows and columns of blocks, the last ones ragged; two batches, heads
// that share a kv head, D and Dv that differ: the smallest call in which all indices can be told apart.
//
// Tolerance. Differences of fourth order with step h err by (h^4 / 30) f^(5) + 1.5 (eps / h) |f|. With h = 2^-10 the
// first term is 3e-14 f^(5), the second 3e-13 |f|. The loss is a sum of a few hundred terms near 1, its fifth
// derivative by one input a few hundred at most: 1e-10 holds both. Gradients that are stored in fp32 may lose half an
// epsilon more: those of block_bias and sinks, which are fp32 themselves (multiples of h, so that a step is exact).
//
// PyTorch's numbers: autograd of F.scaled_dot_product_attention in float64 (2.13.0), inputs as in
// attention_reference_test.cc, out.backward(sin(0.9 i + 0.3)); printed as [B, S, H, D].
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <memory>

#include "attention/reference_backward.h"
#include "attention_inputs.h"

namespace tessera {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kStep = 0x1p-10;
constexpr double kTolerance = 1e-10;

// Multiples of 2^-10.
std::vector<double> coarse_wave(int64_t n, double a, double b) {
  std::vector<double> x = wave(n, a, b);
  for (double& value : x) value = std::round(value * 0x1p10) * 0x1p-10;
  return x;
}

// A call in both directions. Not copyable: args point into the other members.
struct Training : Call {
  Numbers dout, dlse, dq, dk, dv, dblock_bias, dattn_bias, dsinks;
  Numbers alibi, block_bias, attn_bias, sinks;
  std::vector<int64_t> key_lengths;

  Training(const Shape& s, const BlockPattern& pattern)
      : Call(s, DType::f64, pattern, DType::f64, DType::f64),
        dout(DType::f64, {s.batch, s.seqlen_q, s.heads, s.head_dim_v},
             wave(s.batch * s.seqlen_q * s.heads * s.head_dim_v, 0.9, 0.3)),
        dlse(DType::f64, {s.batch, s.heads, s.seqlen_q}, wave(s.batch * s.heads * s.seqlen_q, 1.1, 0.7)),
        dq(DType::f64, {s.batch, s.seqlen_q, s.heads, s.head_dim}),
        dk(DType::f64, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim}),
        dv(DType::f64, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v}) {}

  AttentionOptions& options() { return args.options; }
  void give_block_bias(int64_t batches, int64_t heads) {
    const int64_t entries = args.pattern.num_blocks();
    block_bias = Numbers(DType::f32, {batches, heads, entries}, coarse_wave(batches * heads * entries, 0.6, 0.2));
    dblock_bias = Numbers(DType::f32, {batches, heads, entries});
    options().block_bias = block_bias.view;
  }
  void give_attn_bias(int64_t b, int64_t h, int64_t q, int64_t k) {
    attn_bias = Numbers(DType::f64, {b, h, q, k}, wave(b * h * q * k, 0.9, 0.2));
    dattn_bias = Numbers(DType::f64, {b, h, q, k});
    options().attn_bias = attn_bias.view;
  }
  void give_sinks() {
    sinks = Numbers(DType::f32, {shape.heads}, coarse_wave(shape.heads, 2.1, 0.4));
    dsinks = Numbers(DType::f32, {shape.heads});
    options().sinks = sinks.view;
  }
  void give_alibi(bool per_batch) {
    std::vector<double> slopes = wave(shape.batch * shape.heads, 0.5, 0.1);
    if (!per_batch) slopes.resize(shape.heads);
    alibi = per_batch ? Numbers(DType::f32, {shape.batch, shape.heads}, slopes)
                      : Numbers(DType::f32, {shape.heads}, slopes);
    options().alibi_slopes = alibi.view;
  }

  BackwardArgs backward_args() const {
    BackwardArgs a;
    a.q = args.q;
    a.k = args.k;
    a.v = args.v;
    a.pattern = args.pattern;
    a.out = args.out;
    a.lse = args.lse;
    a.dout = dout.view;
    a.dlse = dlse.view;
    a.dq = dq.view;
    a.dk = dk.view;
    a.dv = dv.view;
    a.dblock_bias = dblock_bias.view;
    a.dattn_bias = dattn_bias.view;
    a.dsinks = dsinks.view;
    a.options = args.options;
    return a;
  }

  void forward() {
    InlineExecutor executor;
    reference_forward(args, executor);
  }
  double loss() {
    forward();
    double sum = 0;
    for (int64_t i = 0; i < out.view.numel(); ++i) sum += out.get(i) * dout.get(i);
    for (int64_t i = 0; i < lse.view.numel(); ++i) {
      if (lse.get(i) != -kInfinity) sum += lse.get(i) * dlse.get(i);
    }
    return sum;
  }
};

double difference(Numbers& x, int64_t i, const std::function<double()>& loss) {
  const double old = x.get(i);
  const auto at = [&](double step) {
    x.set(i, old + step);
    return loss();
  };
  const double slope = (8 * (at(kStep) - at(-kStep)) - (at(2 * kStep) - at(-2 * kStep))) / (12 * kStep);
  x.set(i, old);
  return slope;
}

void expect_slopes(const char* name, Numbers& x, const Numbers& gradient, const std::function<double()>& loss) {
  for (int64_t i = 0; i < x.view.numel(); ++i) {
    if (std::isinf(x.get(i))) {
      EXPECT_EQ(gradient.get(i), 0) << name << " " << i << " of a pair that is not there";
      continue;
    }
    const double want = difference(x, i, loss), got = gradient.get(i);
    const double stored = gradient.view.dtype == DType::f32 ? epsilon_of(DType::f32) / 2 * std::abs(want) : 0;
    ASSERT_NEAR(got, want, kTolerance + stored) << "d" << name << " " << i;
  }
}

void expect_all_slopes(Training& t) {
  const auto loss = [&] { return t.loss(); };
  expect_slopes("q", t.q, t.dq, loss);
  expect_slopes("k", t.k, t.dk, loss);
  expect_slopes("v", t.v, t.dv, loss);
  if (t.block_bias.view.defined()) expect_slopes("block_bias", t.block_bias, t.dblock_bias, loss);
  if (t.attn_bias.view.defined()) expect_slopes("attn_bias", t.attn_bias, t.dattn_bias, loss);
  if (t.sinks.view.defined()) expect_slopes("sinks", t.sinks, t.dsinks, loss);
}

const Shape kShape{.batch = 2, .seqlen_q = 18, .seqlen_k = 20, .heads = 2, .kv_heads = 1, .head_dim = 3,
                   .head_dim_v = 2};

// Against differences: once with out and lse recomputed, once as given.
void check(const std::function<void(Training&)>& change, const BlockPattern& pattern = dense_pattern(18, 20)) {
  Training t(kShape, pattern);
  change(t);
  InlineExecutor executor;
  reference_backward(t.backward_args(), executor);
  expect_all_slopes(t);
  const std::vector<double> recomputed[] = {t.dq.values(), t.dk.values(), t.dv.values()};
  t.forward();
  const BackwardProblem problem = resolve_backward(t.backward_args());
  fp64_backward({&problem, 1}, executor);
  const std::vector<double> given[] = {t.dq.values(), t.dk.values(), t.dv.values()};
  EXPECT_EQ(recomputed[0], given[0]);
  EXPECT_EQ(recomputed[1], given[1]);
  EXPECT_EQ(recomputed[2], given[2]);
}

TEST(Gradients, Dense) {
  check([](Training&) {});
}
TEST(Gradients, CausalWindowAndOffsets) {
  check([](Training& t) { t.options().causal = true; });
  check([](Training& t) {
    t.options().q_offset = 107;
    t.options().k_offset = 100;
    t.options().window_left = 4;
    t.options().window_right = 2;
  });
}
TEST(Gradients, KeyLengths) {  // of batch 1 nothing is left: its gradients are 0
  check([](Training& t) {
    t.key_lengths = {7, 0};
    t.options().key_lengths = t.key_lengths;
    t.options().align_to_key_lengths = true;
    t.options().causal = true;
    t.give_sinks();
  });
}
TEST(Gradients, ScaleAndSoftcap) {
  check([](Training& t) { t.options().scale = -1.3; });
  check([](Training& t) {
    t.options().scale = 1.3;
    t.options().softcap = 0.8;
  });
}
TEST(Gradients, Alibi) {
  check([](Training& t) { t.give_alibi(false); });
  check([](Training& t) { t.give_alibi(true); });
}
TEST(Gradients, Bitmaps) {
  // Block (0, 0): every third pair; (1, 0): the first key of each row; (1, 1) full; (0, 1) not kept.
  std::vector<uint64_t> bitmaps;
  for (int q = 0; q < 16; ++q) bitmaps.push_back(uint64_t{0x9249} >> (q % 3));
  for (int q = 0; q < 16; ++q) bitmaps.push_back(1);
  check([](Training& t) { t.give_block_bias(1, 1); },
        BlockPattern::from_csr({18, 20, 16, 16}, {0, 1, 3}, {0, 0, 1}, {0, 1, -1}, bitmaps));
}

// A pattern of its own for each head and batch; the last row of the last one is empty.
BlockPattern per_head_and_batch() {
  return BlockPattern::from_csr({18, 20, 16, 16, 2, 2}, {0, 1, 2, 4, 5, 6, 8, 9, 9}, {0, 1, 0, 1, 1, 1, 0, 1, 0});
}
TEST(Gradients, PatternPerHeadAndBatch) {
  check([](Training&) {}, per_head_and_batch());
  for (const int64_t batches : {1, 2}) {
    for (const int64_t heads : {1, 2}) {
      check([&](Training& t) { t.give_block_bias(batches, heads); }, per_head_and_batch());
    }
  }
}
TEST(Gradients, BlockBiasOfASharedPattern) {
  for (const int64_t batches : {1, 2}) {
    for (const int64_t heads : {1, 2}) check([&](Training& t) { t.give_block_bias(batches, heads); });
  }
}
TEST(Gradients, AttnBiasBroadcast) {
  check([](Training& t) { t.give_attn_bias(2, 1, 18, 1); });
  check([](Training& t) { t.give_attn_bias(1, 2, 1, 20); });
  check([](Training& t) { t.give_attn_bias(1, 1, 1, 1); });
}
TEST(Gradients, AttnBiasMinusInfinity) {  // single pairs, and all keys of a row
  check([](Training& t) {
    t.give_attn_bias(1, 1, 18, 20);
    t.options().causal = true;
    for (int64_t i = 0; i < 18 * 20; i += 7) t.attn_bias.set(i, -kInfinity);
    for (int64_t k = 0; k < 20; ++k) t.attn_bias.set(5 * 20 + k, -kInfinity);
    t.give_sinks();
  });
}
TEST(Gradients, Dropout) {
  check([](Training& t) {
    t.options().dropout = {.p = 0.4, .seed = 5, .offset = 9};
    t.give_attn_bias(1, 1, 1, 20);
    t.give_sinks();
  });
}
TEST(Gradients, Everything) {
  check([](Training& t) {
    t.options().causal = true;
    t.options().window_left = 12;
    t.options().scale = 0.7;
    t.options().softcap = 1.5;
    t.options().dropout = {.p = 0.2, .seed = 1};
    t.give_alibi(true);
    t.give_block_bias(2, 1);
    t.give_attn_bias(1, 2, 18, 1);
    t.give_sinks();
  }, per_head_and_batch());
}

// Two calls on disjoint keys, joined: each gives the gradients of the joined result by its keys, and they add up.
TEST(Gradients, JoinedResults) {
  const BlockPattern left = BlockPattern::from_csr({18, 20, 16, 16}, {0, 1, 2}, {0, 0});
  const BlockPattern right = BlockPattern::from_csr({18, 20, 16, 16}, {0, 0, 1}, {1});  // rows 0..15 see none of it
  Training a(kShape, left), b(kShape, right);
  b.args.q = a.args.q;
  b.args.k = a.args.k;
  b.args.v = a.args.v;
  Numbers out(DType::f64, {2, 18, 2, 2}), lse(DType::f64, {2, 2, 18});
  InlineExecutor executor;
  const auto loss = [&] {
    a.forward();
    b.forward();
    merge(a.out.view, a.lse.view, b.out.view, b.lse.view, out.view, lse.view, executor);
    double sum = 0;
    for (int64_t i = 0; i < out.view.numel(); ++i) sum += out.get(i) * a.dout.get(i);
    for (int64_t i = 0; i < lse.view.numel(); ++i) sum += lse.get(i) * a.dlse.get(i);
    return sum;
  };
  loss();
  for (const Training* t : {&a, &b}) {
    BackwardArgs args = a.backward_args();
    args.pattern = t->args.pattern;
    args.out = out.view;
    args.lse = lse.view;
    args.accumulate = true;
    const BackwardProblem problem = resolve_backward(args);
    fp64_backward({&problem, 1}, executor);
  }
  expect_slopes("q", a.q, a.dq, loss);
  expect_slopes("k", a.k, a.dk, loss);
  expect_slopes("v", a.v, a.dv, loss);
}

}  // namespace
}  // namespace tessera
