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
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <memory>
#include <random>

#include "reference/backward.h"
#include "training_inputs.h"

namespace tessera {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kStep = 0x1p-10;
constexpr double kTolerance = 1e-10;

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

const Shape kShape{
    .batch = 2, .seqlen_q = 18, .seqlen_k = 20, .heads = 2, .kv_heads = 1, .head_dim = 3, .head_dim_v = 2};

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
  check(
      [](Training& t) {
        t.options().causal = true;
        t.options().window_left = 12;
        t.options().scale = 0.7;
        t.options().softcap = 1.5;
        t.options().dropout = {.p = 0.2, .seed = 1};
        t.give_alibi(true);
        t.give_block_bias(2, 1);
        t.give_attn_bias(1, 2, 18, 1);
        t.give_sinks();
      },
      per_head_and_batch());
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

// Rows that see no key: q, out and dout of theirs are not looked at.
TEST(Gradients, RowsWithoutKeysAreUntouched) {
  // 20 queries, 3 keys, causal: rows 0 .. 16 see nothing.
  const Shape shape{.seqlen_q = 20, .seqlen_k = 3, .head_dim = 2, .head_dim_v = 2};
  Training clean(shape, dense_pattern(20, 3)), hostile(shape, dense_pattern(20, 3));
  for (Training* t : {&clean, &hostile}) {
    t->options().causal = true;
    t->give_sinks();
    t->give_attn_bias(1, 1, 20, 3);
    t->forward();
  }
  for (int64_t i = 0; i < 17 * 2; ++i) {
    for (Numbers* n : {&hostile.q, &hostile.out, &hostile.dout}) n->set(i, std::nan(""));
  }
  for (int64_t i = 0; i < 17; ++i) hostile.dlse.set(i, std::nan(""));
  InlineExecutor executor;
  for (Training* t : {&clean, &hostile}) {
    for (Numbers* n : {&t->dq, &t->dk, &t->dv, &t->dattn_bias, &t->dsinks}) {
      for (int64_t i = 0; i < n->view.numel(); ++i) n->set(i, 77);
    }
    const BackwardProblem problem = resolve_backward(t->backward_args());
    fp64_backward({&problem, 1}, executor);
  }
  for (int64_t i = 0; i < 17 * 2; ++i) EXPECT_EQ(hostile.dq.get(i), 0);
  EXPECT_NE(hostile.dq.get(17 * 2), 0);
  EXPECT_EQ(hostile.dq.values(), clean.dq.values());
  EXPECT_EQ(hostile.dk.values(), clean.dk.values());
  EXPECT_EQ(hostile.dv.values(), clean.dv.values());
  EXPECT_EQ(hostile.dattn_bias.values(), clean.dattn_bias.values());
  EXPECT_EQ(hostile.dsinks.values(), clean.dsinks.values());
}

// NaN where no pair is admitted reaches nothing; where one is, the rows and keys that it meets and no others.
TEST(Gradients, NanGoesAlongAdmittedPairsOnly) {
  const auto run = [](int64_t nan_key, Numbers Training::*tensor) {
    auto t = std::make_unique<Training>(Shape{.seqlen_q = 20, .seqlen_k = 20},
                                        BlockPattern::from_csr({20, 20, 16, 16}, {0, 1, 3}, {0, 0, 1}));
    t->options().causal = true;
    t->options().window_left = 5;
    if (tensor != nullptr) ((*t).*tensor).set(nan_key, std::nan(""));
    InlineExecutor executor;
    reference_backward(t->backward_args(), executor);
    return t;
  };
  const auto clean = run(0, nullptr);
  // Key and value 10 meet rows 10 .. 15; of these, row q meets keys q - 5 .. q. dv only knows weights: of K.
  for (Numbers Training::*tensor : {static_cast<Numbers Training::*>(&Call::k), &Training::dout}) {
    const auto t = run(10, tensor);
    const bool row = tensor == &Training::dout;  // dout of row 10 alone
    for (int64_t i = 0; i < 20; ++i) {
      const bool dq = row ? i == 10 : i >= 10 && i <= 15, dk = row ? i >= 5 && i <= 10 : i >= 5 && i <= 15;
      EXPECT_EQ(std::isnan(t->dq.get(i)), dq) << i;
      EXPECT_EQ(std::isnan(t->dk.get(i)), dk) << i;
      EXPECT_EQ(std::isnan(t->dv.get(i)), dk) << i;
      if (!dq) {
        EXPECT_EQ(t->dq.get(i), clean->dq.get(i)) << i;
      }
      if (!dk) {
        EXPECT_EQ(t->dk.get(i), clean->dk.get(i)) << i;
        EXPECT_EQ(t->dv.get(i), clean->dv.get(i)) << i;
      }
    }
  }
  const auto t = run(10, &Call::v);
  for (int64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(std::isnan(t->dq.get(i)), i >= 10 && i <= 15) << i;
    EXPECT_EQ(std::isnan(t->dk.get(i)), i >= 5 && i <= 15) << i;
    EXPECT_EQ(t->dv.get(i), clean->dv.get(i)) << i;
  }
}

TEST(Gradients, AccumulateAndWantedOnly) {
  Training once(kShape, dense_pattern(18, 20)), twice(kShape, dense_pattern(18, 20));
  InlineExecutor executor;
  reference_backward(once.backward_args(), executor);
  BackwardArgs args = twice.backward_args();
  args.dk = {};
  reference_backward(args, executor);
  args.accumulate = true;
  reference_backward(args, executor);
  for (int64_t i = 0; i < once.dq.view.numel(); ++i) EXPECT_DOUBLE_EQ(twice.dq.get(i), 2 * once.dq.get(i));
  for (int64_t i = 0; i < once.dk.view.numel(); ++i) EXPECT_EQ(twice.dk.get(i), 0);
  for (int64_t i = 0; i < once.dv.view.numel(); ++i) EXPECT_DOUBLE_EQ(twice.dv.get(i), 2 * once.dv.get(i));
}

TEST(Gradients, StridedGradientsInFp32) {  // dk and dv as slices of one [B, Sk, 2, Hkv, 3]
  Training t(kShape, dense_pattern(18, 20));
  InlineExecutor executor;
  reference_backward(t.backward_args(), executor);
  std::vector<float> packed(2 * 20 * 2 * 3, 77), queries(t.dq.view.numel());
  BackwardArgs args = t.backward_args();
  const auto slice = [&](int64_t n, int64_t dim) {
    MutableTensorView v = make_view(packed.data() + n * 3, DType::f32, {2, 20, 1, dim});
    v.strides = {20 * 6, 6, 3, 1};
    return v;
  };
  args.dq = make_view(queries.data(), DType::f32, {2, 18, 2, 3});
  args.dk = slice(0, 3);
  args.dv = slice(1, 2);
  reference_backward(args, executor);
  for (int64_t row = 0; row < 40; ++row) {
    for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(packed[row * 6 + i], static_cast<float>(t.dk.get(row * 3 + i)));
    for (int64_t i = 0; i < 2; ++i) EXPECT_EQ(packed[row * 6 + 3 + i], static_cast<float>(t.dv.get(row * 2 + i)));
    EXPECT_EQ(packed[row * 6 + 5], 77);  // no element
  }
  for (size_t i = 0; i < queries.size(); ++i) EXPECT_EQ(queries[i], static_cast<float>(t.dq.get(i)));
}

TEST(Gradients, SameBitsOnAnyNumberOfThreads) {
  const auto run = [](int threads) {
    Training t(kShape, per_head_and_batch());
    t.give_block_bias(1, 1);
    t.give_attn_bias(1, 2, 18, 1);
    t.give_sinks();
    t.options().dropout = {.p = 0.2};
    ThreadPool pool(threads);
    reference_backward(t.backward_args(), pool);
    return std::vector{t.dq.values(),          t.dk.values(),         t.dv.values(),
                       t.dblock_bias.values(), t.dattn_bias.values(), t.dsinks.values()};
  };
  const auto one = run(1);
  EXPECT_EQ(run(2), one);
  EXPECT_EQ(run(3), one);
}

// backward() serves fp64 by the reference kernel, which has no instruction set to choose.
TEST(Gradients, EntryPointForFp64) {
  Training t(kShape, dense_pattern(18, 20));
  t.forward();
  InlineExecutor executor;
  reference_backward(t.backward_args(), executor);
  const std::vector<double> dq = t.dq.values();
  t.dq = Numbers(DType::f64, {2, 18, 2, 3});
  EXPECT_EQ(backward(t.backward_args(), executor).isa, Isa::automatic);
  EXPECT_EQ(t.dq.values(), dq);
  BackwardArgs args = t.backward_args();
  args.isa = Isa::avx2;
  EXPECT_EQ(error_argument([&] { backward(args, executor); }), "isa");
}

// Packed sequences are calls of their own; sinks get the sum over them.
TEST(Gradients, PackedSequences) {
  const int64_t lengths_q[] = {3, 0, 18}, lengths_k[] = {5, 4, 20};
  const std::vector<int64_t> cu_q{0, 3, 3, 21}, cu_k{0, 5, 9, 29};
  std::vector<BlockPattern> patterns;
  for (int i = 0; i < 3; ++i) patterns.push_back(dense_pattern(lengths_q[i], lengths_k[i]));
  const Shape all{.seqlen_q = 21, .seqlen_k = 29, .heads = 2, .kv_heads = 1, .head_dim = 3, .head_dim_v = 2};
  Training t(all, dense_pattern(21, 29));
  t.give_sinks();
  const auto packed = [](auto view) {  // [1, ...] as [...]
    for (int i = 0; i + 1 < view.rank; ++i) {
      view.sizes[i] = view.sizes[i + 1];
      view.strides[i] = view.strides[i + 1];
    }
    --view.rank;
    return view;
  };
  AttentionOptions options = t.options();
  options.causal = true;
  InlineExecutor executor;
  forward_varlen({.q = packed(t.args.q),
                  .k = packed(t.args.k),
                  .v = packed(t.args.v),
                  .out = packed(t.args.out),
                  .lse = packed(t.args.lse),
                  .cu_seqlens_q = cu_q,
                  .cu_seqlens_k = cu_k,
                  .patterns = patterns,
                  .options = options},
                 executor);
  const BackwardArgs whole = t.backward_args();
  backward_varlen({.q = packed(whole.q),
                   .k = packed(whole.k),
                   .v = packed(whole.v),
                   .out = packed(whole.out),
                   .dout = packed(whole.dout),
                   .lse = packed(whole.lse),
                   .dlse = packed(whole.dlse),
                   .dq = packed(whole.dq),
                   .dk = packed(whole.dk),
                   .dv = packed(whole.dv),
                   .dsinks = whole.dsinks,
                   .cu_seqlens_q = cu_q,
                   .cu_seqlens_k = cu_k,
                   .patterns = patterns,
                   .options = options},
                  executor);
  std::vector<double> dsinks(2);
  for (int i = 0; i < 3; ++i) {
    Training one(
        {.seqlen_q = lengths_q[i], .seqlen_k = lengths_k[i], .heads = 2, .kv_heads = 1, .head_dim = 3, .head_dim_v = 2},
        patterns[i]);
    one.options() = options;
    one.dsinks = Numbers(DType::f32, {2});
    const auto part = [](const Numbers& from, int64_t first, Numbers& to) {
      for (int64_t n = 0; n < to.view.numel(); ++n) to.set(n, from.get(first + n));
    };
    part(t.q, cu_q[i] * 6, one.q);
    part(t.k, cu_k[i] * 3, one.k);
    part(t.v, cu_k[i] * 2, one.v);
    part(t.dout, cu_q[i] * 4, one.dout);
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t q = 0; q < lengths_q[i]; ++q) one.dlse.set(h * lengths_q[i] + q, t.dlse.get(h * 21 + cu_q[i] + q));
    }
    reference_backward(one.backward_args(), executor);
    const auto same = [&](const char* name, const Numbers& all_of, int64_t first, const Numbers& want) {
      for (int64_t n = 0; n < want.view.numel(); ++n) {
        EXPECT_NEAR(all_of.get(first + n), want.get(n), 1e-14) << name << " of sequence " << i << ", " << n;
      }
    };
    same("dq", t.dq, cu_q[i] * 6, one.dq);
    same("dk", t.dk, cu_k[i] * 3, one.dk);
    same("dv", t.dv, cu_k[i] * 2, one.dv);
    for (int64_t h = 0; h < 2; ++h) dsinks[h] += one.dsinks.get(h);
  }
  for (int64_t h = 0; h < 2; ++h) EXPECT_NEAR(t.dsinks.get(h), dsinks[h], 4 * epsilon_of(DType::f32)) << h;
}

// A training step in fp32 on random numbers, its gradients by the kernels, and how far these are from the reference as
// a fraction of the bounds. 80 x 96 tokens in blocks of 16: sums of a hundred terms, where bounds that add up errors
// without regard to signs would already be a hundred times too loose.
class Fp32Step {
 public:
  explicit Fp32Step(const std::function<void(AttentionOptions&)>& change = {}) {
    args_.q = random({2, 80, 2, 32});
    args_.k = random({2, 96, 1, 32});
    args_.v = random({2, 96, 1, 24});
    args_.pattern = dense_pattern(80, 96);
    args_.dout = random({2, 80, 2, 24});
    args_.dlse = random({2, 2, 80});
    args_.options.block_bias = random({1, 2, 30});
    args_.options.attn_bias = random({1, 1, 80, 1});
    args_.options.sinks = random({2});
    if (change) change(args_.options);
    const MutableTensorView out = zeros({2, 80, 2, 24}), lse = zeros({2, 2, 80});
    args_.out = out;
    args_.lse = lse;
    tessera::forward({.q = args_.q,
                      .k = args_.k,
                      .v = args_.v,
                      .pattern = args_.pattern,
                      .out = out,
                      .lse = lse,
                      .options = args_.options},
                     executor_);
  }

  // Largest error of each gradient by its bound. `mistake` is made to the kernel's call alone.
  std::vector<double> worst(const std::function<void(BackwardArgs&)>& mistake = {}) {
    std::vector<float> got[6], want[6], bound[6];
    BackwardArgs args = with_gradients(got);
    if (mistake) mistake(args);
    backward(args, executor_);
    args = with_gradients(want);
    for (int g = 0; g < 6; ++g) bound[g].resize(want[g].size());
    reference_backward(
        args, executor_,
        {bound[0].data(), bound[1].data(), bound[2].data(), bound[3].data(), bound[4].data(), bound[5].data()});
    std::vector<double> worst(6);
    for (int g = 0; g < 6; ++g) {
      for (size_t i = 0; i < want[g].size(); ++i) {
        worst[g] = std::max(worst[g], std::abs(double{got[g][i]} - want[g][i]) / bound[g][i]);
      }
    }
    return worst;
  }

 private:
  MutableTensorView zeros(std::initializer_list<int64_t> sizes) {
    numbers_.push_back(std::make_unique<Numbers>(DType::f32, sizes));
    return numbers_.back()->view;
  }
  MutableTensorView random(std::initializer_list<int64_t> sizes) {
    const MutableTensorView view = zeros(sizes);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < view.numel(); ++i) numbers_.back()->set(i, normal(random_));
    return view;
  }
  BackwardArgs with_gradients(std::vector<float> (&to)[6]) const {
    BackwardArgs args = args_;
    const TensorView like[] = {
        args.q, args.k, args.v, args.options.block_bias, args.options.attn_bias, args.options.sinks};
    MutableTensorView* gradients[] = {&args.dq, &args.dk, &args.dv, &args.dblock_bias, &args.dattn_bias, &args.dsinks};
    for (int g = 0; g < 6; ++g) {
      to[g].resize(like[g].numel());
      static_cast<detail::BasicView<void*>&>(*gradients[g]) = {to[g].data(), DType::f32, like[g].rank, like[g].sizes,
                                                               like[g].strides};
    }
    return args;
  }

  std::mt19937 random_{7};
  std::vector<std::unique_ptr<Numbers>> numbers_;
  BackwardArgs args_;
  ThreadPool executor_{2};
};

TEST(GradientBounds, HoldAndAreNotLoose) {
  for (const auto& [name, change] : std::vector<std::pair<const char*, std::function<void(AttentionOptions&)>>>{
           {"plain", {}},
           {"causal", [](AttentionOptions& o) { o.causal = true; }},
           {"softcap", [](AttentionOptions& o) { o.softcap = 2; }},
           {"large scores", [](AttentionOptions& o) { o.scale = 10; }},
           {"dropout", [](AttentionOptions& o) { o.dropout.p = 0.3; }}}) {
    const std::vector<double> worst = Fp32Step(change).worst();
    for (int g = 0; g < 6; ++g) EXPECT_LT(worst[g], 1) << name << ", gradient " << g;
    // Those of many elements: their largest error is no matter of luck.
    for (int g = 0; g < 3; ++g) EXPECT_GT(worst[g], 0.02) << name << ", gradient " << g;
  }
}

TEST(GradientBounds, OfCallsWithoutQueries) {  // keys and values have gradients: zeros
  Training t({.seqlen_q = 0, .seqlen_k = 20, .head_dim = 3, .head_dim_v = 2}, dense_pattern(0, 20));
  std::vector<float> dk(60, 77), dv(40, 77);
  t.dk.set(5, 77);
  InlineExecutor executor;
  reference_backward(t.backward_args(), executor, {.dk = dk.data(), .dv = dv.data()});
  for (const float bound : dk) EXPECT_LT(bound, 1e-30);
  for (const float bound : dv) EXPECT_LT(bound, 1e-30);
  EXPECT_EQ(t.dk.get(5), 0);
}

TEST(GradientBounds, NoticeSmallMistakes) {
  Fp32Step step;
  // The scale off by a few thousand epsilons; dlse left out.
  const std::vector<double> scale = step.worst([](BackwardArgs& a) { a.options.scale = (1 + 5e-4) / std::sqrt(32.0); });
  const std::vector<double> dlse = step.worst([](BackwardArgs& a) { a.dlse = {}; });
  for (const int g : {0, 1}) {
    EXPECT_GT(scale[g], 1) << g;
    EXPECT_GT(dlse[g], 1000) << g;
  }
  EXPECT_GT(scale[2], 1);
  for (const int g : {3, 4, 5}) EXPECT_GT(dlse[g], 100) << g;
}

// Where softcap saturates, products of any size err by at most 2 softcap as a score, and bounds stay finite.
TEST(GradientBounds, AreFiniteWhereSoftcapSaturates) {
  Training t(kShape, dense_pattern(18, 20));
  t.options().softcap = 0.5;
  t.options().scale = 1e15;
  InlineExecutor executor;
  std::vector<float> dq(t.dq.view.numel()), dk(t.dk.view.numel()), dv(t.dv.view.numel());
  reference_backward(t.backward_args(), executor, {.dq = dq.data(), .dk = dk.data(), .dv = dv.data()});
  for (const std::vector<float>* bounds : {&dq, &dk, &dv}) {
    for (const float bound : *bounds) {
      EXPECT_TRUE(std::isfinite(bound)) << bound;
      EXPECT_GT(bound, 0);
    }
  }
}

}  // namespace
}  // namespace tessera
