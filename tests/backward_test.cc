// backward() on every ISA of this machine and in every dtype against the fp64 reference: the adversarial list of
// attention_forward_test.cc for gradients, one test a hostility.
// Random combinations are in check_test.cc. Memory that no pair touches is NaN or Inf in all of them, in dout and dlse
// as well, and gradients that no pair has a part in must be exactly 0.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "adversarial_cases.h"
#include "attention_inputs.h"
#include "check/verdict.h"
#include "tessera/backward.h"

namespace tessera {
namespace {

using check::CaseConfig;
using check::Values;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DType kDtypes[] = {DType::f32, DType::bf16, DType::f16};

// Judges the gradients of `config` in each dtype on each ISA, inline and on three threads.
void expect_right(CaseConfig config) {
  InlineExecutor executor;
  ThreadPool pool(3);
  for (const DType dtype : kDtypes) {
    config.dtype = dtype;
    if (config.gradient_dtype != DType::f32) config.gradient_dtype = dtype;
    check::Case test(config);
    const check::GradientTruth truth(test, executor);
    for (const Isa isa : usable_isas()) {
      test.run(isa, executor);
      EXPECT_EQ(judge_backward(test, truth, isa, executor).problem, "") << name_of(isa) << " " << describe(config);
      const std::vector<std::byte> gradients = test.gradient_memory();
      EXPECT_EQ(judge_backward(test, truth, isa, pool).problem, "") << name_of(isa) << " " << describe(config);
      EXPECT_TRUE(gradients == test.gradient_memory())
          << "bits depend on the threads: " << name_of(isa) << " " << describe(config);
    }
  }
}

// Every second shape gets gradients in the dtype of the inputs, and every third a gradient of lse.
CaseConfig small(int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim = 32) {
  CaseConfig c = dense_case(seqlen_q, seqlen_k, head_dim);
  c.gradient_dtype = c.seed % 2 ? DType::bf16 : DType::f32;  // bf16: the dtype of the inputs
  c.dlse = c.seed % 3 == 0;
  return c;
}

void expect_right(const CaseList& list) {
  for (const CaseConfig& config : list) expect_right(config);
}

// Forward and backward of one contiguous call.
struct TrainingCall : Call {
  Numbers dout, dq, dk, dv;
  BackwardArgs back;

  TrainingCall(const Shape& s, DType dtype, const BlockPattern& pattern)
      : Call(s, dtype, pattern),
        dout(dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim_v},
             wave(s.batch * s.seqlen_q * s.heads * s.head_dim_v, 1.1, 0.2)),
        dq(dtype, {s.batch, s.seqlen_q, s.heads, s.head_dim}),
        dk(dtype, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim}),
        dv(dtype, {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v}) {
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
  BackwardInfo run(Isa isa, Executor& executor) {
    args.isa = back.isa = isa;
    back.options = args.options;
    forward(args, executor);
    return backward(back, executor);
  }
};

TEST(Backward, RunsTheIsaThatWasAsked) {
  InlineExecutor executor;
  TrainingCall c({.seqlen_q = 20, .seqlen_k = 20, .head_dim = 8, .head_dim_v = 8}, DType::f32, dense_pattern(20, 20));
  for (const Isa isa : usable_isas()) EXPECT_EQ(c.run(isa, executor).isa, isa);
  EXPECT_EQ(c.run(Isa::automatic, executor).isa, automatic_isa());
  for (const Isa isa : {Isa::sse4, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (std::find(usable_isas().begin(), usable_isas().end(), isa) != usable_isas().end()) continue;
    c.back.isa = isa;
    EXPECT_EQ(error_argument([&] { backward(c.back, executor); }), "isa") << name_of(isa);
  }
}

TEST(Backward, LengthsZeroAndOne) {
  for (const int64_t q : {0, 1, 17}) {
    for (const int64_t k : {0, 1, 17}) expect_right(small(q, k));
  }
  CaseConfig c = small(20, 20);
  c.batch = 0;
  expect_right(c);
}

TEST(Backward, DecodeLengths) {  // forward takes its decode schedule up to 16 queries; backward has none
  for (const int64_t q : {1, 2, 5, 15, 16}) {
    CaseConfig c = small(q, 165, 64);
    c.heads = 4;
    c.kv_heads = 2;
    c.causal = true;
    c.block_q = 16;
    expect_right(c);
  }
}

TEST(Backward, LengthsAroundABlock) { expect_right(lengths_around_a_block(small)); }

TEST(Backward, BlockSizesThatDiffer) { expect_right(block_sizes_that_differ(small)); }

TEST(Backward, HeadDims) { expect_right(head_dims(small)); }

TEST(Backward, GroupsOfHeads) { expect_right(groups_of_heads(small)); }

TEST(Backward, MasksOfEveryKind) { expect_right(masks_of_every_kind(small)); }

TEST(Backward, RowsThatSeeNothing) {
  for (const int64_t q : {5, 150}) {
    CaseConfig c = small(q, 100);
    c.dlse = true;
    c.density = 0;
    expect_right(c);
    c.density = 1;
    c.causal = true;
    c.q_offset = -1000;
    c.sinks = true;
    expect_right(c);
    c.q_offset = -q / 2;  // half of them
    expect_right(c);
  }
}

TEST(Backward, NanThatOthersSee) {
  // A NaN in q, k, v or dout reaches the gradients of the pairs it takes part in; all others stay clean, also those
  // that share a tile with it: rows before it (causal), or outside a bitmap.
  for (uint64_t seed = 0; seed < 16; ++seed) {
    CaseConfig c = small(100, 100);
    c.seed = seed;
    c.causal = true;
    c.visible_nan = true;
    c.nan_in_dout = seed % 3 == 0;
    expect_right(c);
    c.causal = false;
    c.source = check::PatternSource::random_bitmaps;
    expect_right(c);
    c.seqlen_q = 9;
    expect_right(c);
  }
}

// Nothing depends on what is masked: q and dout of rows without keys, k and v of keys that nobody sees. This one needs
// no reference. Finite garbage changes no bit; NaN and Inf take a way around them, whose products are the same but for
// roundings: of sums of at most 90 terms, and of weights before the native bf16 dot.
TEST(Backward, MaskedBytesChangeNothing) {
  InlineExecutor executor;
  const Shape shape{.seqlen_q = 70, .seqlen_k = 90, .heads = 2, .head_dim = 24, .head_dim_v = 40};
  for (const DType dtype : kDtypes) {
    for (const Isa isa : usable_isas()) {
      std::vector<std::vector<double>> first;
      for (const double garbage : {0.0, kNan, kInfinity, -3.0}) {
        TrainingCall c(shape, dtype, dense_pattern(70, 90, 32, 48));
        c.args.options.causal = true;
        c.args.options.q_offset = -20;  // rows 0..19 see nothing, keys 50..89 are seen by nobody
        const auto spoil = [&](Numbers& t, int64_t begin, int64_t end, int64_t row) {
          for (int64_t i = begin * row; i < end * row; ++i) t.set(i, garbage);
        };
        spoil(c.q, 0, 20, 2 * 24);
        spoil(c.dout, 0, 20, 2 * 40);
        spoil(c.k, 50, 90, 24);
        spoil(c.v, 50, 90, 40);
        c.run(isa, executor);
        const std::vector<std::vector<double>> gradients{c.dq.values(), c.dk.values(), c.dv.values()};
        if (first.empty()) first = gradients;
        const bool finite = std::isfinite(garbage), native = isa == Isa::avx512_bf16 && dtype == DType::bf16;
        EXPECT_TRUE(!finite || gradients == first) << name_of(isa) << " " << name_of(dtype) << " " << garbage;
        const double tolerance = 90 * epsilon_of(DType::f32) + (native ? 2 : 1) * epsilon_of(dtype);
        for (size_t g = 0; g < first.size(); ++g) {
          double largest = 0;
          for (const double x : first[g]) largest = std::max(largest, std::abs(x));
          for (size_t i = 0; i < first[g].size(); ++i) {
            ASSERT_NEAR(gradients[g][i], first[g][i], tolerance * largest)
                << name_of(isa) << " " << name_of(dtype) << " " << garbage << " " << g << " " << i;
          }
        }
        for (int64_t i = 0; i < 20 * 2 * 24; ++i) ASSERT_EQ(gradients[0][i], 0);
        for (int64_t i = 50 * 24; i < 90 * 24; ++i) ASSERT_EQ(gradients[1][i], 0);
        for (int64_t i = 50 * 40; i < 90 * 40; ++i) ASSERT_EQ(gradients[2][i], 0);
        EXPECT_NE(gradients[0][20 * 2 * 24], gradients[0][21 * 2 * 24]);
      }
    }
  }
}

TEST(Backward, InfiniteScoresMakeTheRowNan) {  // as softmax in PyTorch; a row of -inf has no gradient
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    TrainingCall c({.seqlen_q = 40, .seqlen_k = 40, .head_dim = 4, .head_dim_v = 4}, DType::f32, dense_pattern(40, 40));
    Numbers bias(DType::f32, {1, 1, 40, 40});
    bias.set(5 * 40 + 30, kInfinity);
    for (int64_t k = 0; k < 40; ++k) bias.set(6 * 40 + k, -kInfinity);
    for (int64_t i = 0; i < 4; ++i) c.dout.set(6 * 4 + i, kNan);
    c.args.options.attn_bias = bias.view;
    c.run(isa, executor);
    for (int64_t q = 0; q < 40; ++q) {
      EXPECT_EQ(std::isnan(c.dq.get(q * 4)), q == 5) << name_of(isa) << " row " << q;
    }
    EXPECT_EQ(c.dq.get(6 * 4), 0) << name_of(isa);
    EXPECT_TRUE(std::isnan(c.dk.get(0))) << name_of(isa);
  }
}

TEST(Backward, Logits) {
  for (const int64_t q : {3, 130}) {
    for (const Values values : {Values::large, Values::max_last, Values::denormal}) {
      CaseConfig c = small(q, 130, 64);
      c.values = values;
      expect_right(c);
      c.seed += 100;  // denormal: in dout or not
      expect_right(c);
    }
    for (const double scale : {0.0, -0.2, 1.0}) {
      CaseConfig c = small(q, 130, 64);
      c.scale = scale;
      expect_right(c);
      c.causal = true;  // scale 0 meets -inf
      expect_right(c);
    }
  }
}

TEST(Backward, EachOptionAlone) { expect_right(each_option_alone(small)); }

TEST(Backward, BiasGradientsOfEveryShape) {  // sums over batches, heads, queries and keys, in each dtype
  for (uint64_t seed = 0; seed < 16; ++seed) {
    CaseConfig c = small(40, 50, 8);
    c.seed = seed;
    c.batch = 2;
    c.heads = 2;
    c.density = 0.7;
    c.block_q = 32;
    c.block_k = 16;
    c.attn_bias = c.block_bias = c.sinks = true;
    c.bias_minus_infinity = seed % 2;
    c.attn_bias_dtype = seed % 3 ? DType::f32 : DType::bf16;
    c.dattn_bias_fp32 = seed % 4 < 2;
    c.dq = c.dk = c.dv = seed % 5 == 0;
    expect_right(c);
  }
}

TEST(Backward, AllOptionsTogether) {
  for (const int64_t q : {7, 90}) {
    CaseConfig c = small(q, 110, 40);
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.source = check::PatternSource::random_bitmaps;
    c.density = 0.8;
    c.scale = 0.3;
    c.causal = c.key_lengths = c.dlse = true;
    c.window_left = 60;
    c.softcap = 3;
    c.alibi = c.block_bias = c.attn_bias = c.bias_minus_infinity = c.sinks = true;
    c.dropout = 0.2;
    expect_right(c);
  }
}

TEST(Backward, GradientsThatAreNotWanted) {
  for (int wanted = 0; wanted < 8; ++wanted) {
    CaseConfig c = small(40, 70, 24);
    c.heads = 2;
    c.dq = wanted & 1;
    c.dk = wanted & 2;
    c.dv = wanted & 4;
    expect_right(c);
    c.causal = c.attn_bias = c.sinks = true;
    c.softcap = 2;
    expect_right(c);
    c.visible_nan = true;
    expect_right(c);
  }
}

TEST(Backward, Accumulates) {
  for (const int64_t q : {7, 90}) {
    CaseConfig c = small(q, 110, 40);
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.density = 0.5;
    c.gradient_dtype = DType::f32;
    c.accumulate = true;
    expect_right(c);
  }
}

// lse and out joined with other keys: a row that sees none of this pattern's gave its sink no weight here.
TEST(Backward, SinksOfJoinedRowsThatSeeNothingHere) {
  const Shape s{.batch = 1, .seqlen_q = 48, .seqlen_k = 32, .heads = 2, .kv_heads = 1, .head_dim = 8, .head_dim_v = 8};
  std::vector<uint64_t> bits(16, 0xffff);
  bits[3] = 0;  // query 19: not a bit of its only block
  const BlockPattern pattern = BlockPattern::from_csr({.seqlen_q = 48, .seqlen_k = 32, .block_q = 16, .block_k = 16},
                                                      {0, 2, 3, 3}, {0, 1, 0}, {-1, -1, 0}, bits);
  InlineExecutor executor;
  const auto dsinks_of = [&](DType dtype, Isa isa) {
    TrainingCall call(s, dtype, pattern);
    Numbers sinks(DType::f32, {2}, {0.3, -0.7}), dsinks(DType::f32, {2}, {9, 9});
    for (int64_t i = 0; i < call.out.view.numel(); ++i) call.out.set(i, 0.1 * std::sin(static_cast<double>(i)));
    for (int64_t i = 0; i < call.lse.view.numel(); ++i) call.lse.set(i, 2 + 0.01 * static_cast<double>(i));
    call.back.options.sinks = sinks.view;
    call.back.dsinks = dsinks.view;
    call.back.isa = isa;
    backward(call.back, executor);
    return dsinks.values();
  };
  const std::vector<double> expected = dsinks_of(DType::f64, Isa::automatic);
  for (const Isa isa : usable_isas()) {
    const std::vector<double> got = dsinks_of(DType::f32, isa);
    for (int h = 0; h < 2; ++h) EXPECT_NEAR(got[h], expected[h], 1e-5 * std::abs(expected[h])) << name_of(isa);
  }
}

TEST(Backward, StridesOfEveryKind) {  // gaps, negative, broadcast, bases off by any number of elements
  for (uint64_t seed = 0; seed < 20; ++seed) {
    CaseConfig c = small(33, 65, 24);
    c.seed = seed;
    c.batch = c.heads = c.kv_heads = 2;
    c.accumulate = seed % 3 == 0 && c.gradient_dtype == DType::f32;
    expect_right(c);
  }
}

TEST(Backward, PackedSequences) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    CaseConfig c = small(70, 130);
    c.seed = seed;
    c.heads = 4;
    c.kv_heads = 2;
    c.density = 0.7;
    c.causal = seed % 4 < 2;
    c.path = CheckPath::varlen;
    c.batch = 4;
    c.seqlens_q = {40, 0, 1, 70};
    c.seqlens_k = {40, 3, 90, static_cast<int64_t>(seed)};
    c.dropout = seed % 2 ? 0.3 : 0;  // differs from sequence to sequence
    c.sinks = seed % 3 == 0;         // its gradient is the sum over them
    expect_right(c);
  }
}

TEST(Backward, OffsetsBeyond32Bits) {
  // 24 tokens 2^27 elements apart: 3.2e9 elements, of which a few pages exist.
  constexpr int64_t kStep = int64_t{1} << 27, kTokens = 24, kDim = 8;
  const size_t bytes = kStep * kTokens * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  float* sparse = static_cast<float*>(memory);
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    TrainingCall c({.seqlen_q = kTokens, .seqlen_k = kTokens, .head_dim = kDim, .head_dim_v = kDim}, DType::f32,
                   dense_pattern(kTokens, kTokens));
    c.run(isa, executor);
    // All tensors side by side in the sparse memory.
    int64_t place = 0;
    const auto spread = [&](const Numbers& from) {
      MutableTensorView t = make_view(sparse + place++ * kDim, DType::f32, {1, kTokens, 1, kDim});
      t.strides[1] = kStep;
      for (int64_t s = 0; s < kTokens; ++s) {
        std::memcpy(static_cast<float*>(t.data) + s * kStep, from.memory.data() + s * kDim * 4, kDim * 4);
      }
      return t;
    };
    const std::vector<double> zeros(kTokens * kDim);
    const Numbers nothing(DType::f32, {1, kTokens, 1, kDim}, zeros);
    c.back.q = spread(c.q), c.back.k = spread(c.k), c.back.v = spread(c.v), c.back.out = spread(c.out);
    c.back.dout = spread(c.dout);
    c.back.dq = spread(nothing), c.back.dk = spread(nothing), c.back.dv = spread(nothing);
    backward(c.back, executor);
    const std::pair<const Numbers*, MutableTensorView> gradients[] = {
        {&c.dq, c.back.dq}, {&c.dk, c.back.dk}, {&c.dv, c.back.dv}};
    for (const auto& [expected, view] : gradients) {
      for (int64_t i = 0; i < kTokens * kDim; ++i) {
        EXPECT_EQ(static_cast<float*>(view.data)[i / kDim * kStep + i % kDim], expected->get(i)) << name_of(isa) << i;
      }
    }
  }
  munmap(memory, bytes);
}

// Scratch grows by at most 15 % of what the tensors and the fp32 gradients of 16-bit tensors grow by: nothing of the
// size of a score matrix, nor of B * H * Sq * block. 2,048 and 8,192 tokens in a window of 64, two heads.
TEST(Backward, ScratchDoesNotFollowTheSequence) {
  ThreadPool pool(2);
  for (const DType dtype : kDtypes) {
    size_t scratch[2];
    const int64_t tokens[2] = {2048, 8192};
    for (int i = 0; i < 2; ++i) {
      const int64_t n = tokens[i];
      PatternSpec spec;
      spec.kind = PatternKind::local_window;
      spec.seqlen_q = spec.seqlen_k = n;
      spec.block_q = spec.block_k = 64;
      spec.window = 64;
      TrainingCall c({.seqlen_q = n, .seqlen_k = n, .heads = 2, .kv_heads = 2, .head_dim = 64, .head_dim_v = 64}, dtype,
                     make_pattern(spec));
      scratch[i] = c.run(Isa::automatic, pool).scratch_bytes;
    }
    const auto elements = static_cast<double>((tokens[1] - tokens[0]) * 2 * 64);
    const double tensors = elements * 8 * static_cast<double>(size_of(dtype));  // q, k, v, out, dout, dq, dk, dv
    const double gradients = dtype == DType::f32 ? 0 : elements * 3 * sizeof(float);
    EXPECT_LE(static_cast<double>(scratch[1]) - static_cast<double>(scratch[0]), 0.15 * tensors + gradients)
        << name_of(dtype);
    EXPECT_GT(scratch[0], 0u);
  }
}

}  // namespace
}  // namespace tessera
