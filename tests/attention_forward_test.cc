// forward() on every ISA of this machine and in every dtype against the fp64 reference: the adversarial list (half of
// it in adversarial_cases.h), one test a hostility. Random combinations are in check_test.cc. Memory that no query
// admits is NaN or Inf in all of them.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "adversarial_cases.h"
#include "attention_inputs.h"
#include "check/verdict.h"

namespace tessera {
namespace {

using check::CaseConfig;
using check::Values;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kDtypes[] = {DType::f32, DType::bf16, DType::f16};

// Judges `config` in each dtype on each ISA, inline and on three threads.
void expect_right(CaseConfig config) {
  InlineExecutor executor;
  ThreadPool pool(3);
  for (const DType dtype : kDtypes) {
    config.dtype = dtype;
    check::Case test(config);
    std::vector<check::Truth> truths;
    for (const Problem& p : test.problems()) truths.emplace_back(p, executor);
    for (const Isa isa : usable_isas()) {
      const check::Verdict inline_verdict = judge(test, truths, isa, executor);
      EXPECT_EQ(inline_verdict.problem, "") << name_of(isa) << " " << describe(config);
      const std::vector<std::byte> out = test.out_memory(), lse = test.lse_memory();
      EXPECT_EQ(judge(test, truths, isa, pool).problem, "") << name_of(isa) << " " << describe(config);
      EXPECT_TRUE(out == test.out_memory() && lse == test.lse_memory())
          << "bits depend on the threads: " << name_of(isa) << " " << describe(config);
    }
  }
}

CaseConfig small(int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim = 32) {
  return dense_case(seqlen_q, seqlen_k, head_dim);
}

void expect_right(const CaseList& list) {
  for (const CaseConfig& config : list) expect_right(config);
}

TEST(Forward, RunsTheIsaThatWasAsked) {
  InlineExecutor executor;
  Call c({.seqlen_q = 20, .seqlen_k = 20, .head_dim = 8, .head_dim_v = 8}, DType::f32, dense_pattern(20, 20));
  for (const Isa isa : usable_isas()) {
    c.args.isa = isa;
    EXPECT_EQ(forward(c.args, executor).isa, isa);
  }
  c.args.isa = Isa::automatic;
  EXPECT_EQ(forward(c.args, executor).isa, automatic_isa());
  for (const Isa isa : {Isa::sse4, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (std::find(usable_isas().begin(), usable_isas().end(), isa) != usable_isas().end()) continue;
    c.args.isa = isa;
    EXPECT_EQ(error_argument([&] { forward(c.args, executor); }), "isa") << name_of(isa);
  }
}

TEST(Forward, Fp64IsTheReference) {
  InlineExecutor executor;
  const Shape shape{.seqlen_q = 20, .seqlen_k = 20, .head_dim = 8, .head_dim_v = 8};
  Call a(shape, DType::f64, dense_pattern(20, 20), DType::f64, DType::f64);
  Call b(shape, DType::f64, dense_pattern(20, 20), DType::f64, DType::f64);
  EXPECT_EQ(forward(a.args, executor).isa, Isa::automatic);
  reference_forward(b.args, executor);
  EXPECT_EQ(a.out.values(), b.out.values());
  EXPECT_EQ(a.lse.values(), b.lse.values());
  a.args.isa = usable_isas()[0];
  EXPECT_EQ(error_argument([&] { forward(a.args, executor); }), "isa");
}

TEST(Forward, LengthsZeroAndOne) {
  for (const int64_t q : {0, 1, 17}) {
    for (const int64_t k : {0, 1, 17}) expect_right(small(q, k));
  }
  CaseConfig c = small(20, 20);
  c.batch = 0;
  expect_right(c);
  InlineExecutor executor;
  Call no_heads({.seqlen_q = 20, .seqlen_k = 20, .heads = 0, .kv_heads = 0}, DType::f32, dense_pattern(20, 20));
  EXPECT_NO_THROW(forward(no_heads.args, executor));
}

TEST(Forward, LengthsAroundABlock) { expect_right(lengths_around_a_block(small)); }

TEST(Forward, BlockSizesThatDiffer) { expect_right(block_sizes_that_differ(small)); }

TEST(Forward, HeadDims) { expect_right(head_dims(small)); }

TEST(Forward, GroupsOfHeads) { expect_right(groups_of_heads(small)); }

TEST(Forward, MasksOfEveryKind) { expect_right(masks_of_every_kind(small)); }

TEST(Forward, RowsThatSeeNothing) {
  for (const int64_t q : {5, 150}) {  // decode and panels
    CaseConfig c = small(q, 100);
    c.density = 0;
    expect_right(c);
    c.density = 1;
    c.causal = true;
    c.q_offset = -1000;
    c.sinks = true;
    expect_right(c);
  }
}

TEST(Forward, NanThatOthersSee) {
  // Rows that see the NaN are NaN, the rows before it (causal) or outside the bitmap stay clean.
  for (uint64_t seed = 0; seed < 12; ++seed) {
    CaseConfig c = small(100, 100);
    c.seed = seed;
    c.causal = true;
    c.visible_nan = true;
    expect_right(c);
    c.causal = false;
    c.source = check::PatternSource::random_bitmaps;
    expect_right(c);
    c.seqlen_q = 9;
    expect_right(c);
  }
}

TEST(Forward, InfiniteScoresMakeTheRowNan) {  // as softmax in PyTorch
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    Call c({.seqlen_q = 40, .seqlen_k = 40, .head_dim = 4, .head_dim_v = 4}, DType::f32, dense_pattern(40, 40));
    Numbers bias(DType::f32, {1, 1, 40, 40});
    bias.set(5 * 40 + 30, kInfinity);
    for (int64_t k = 0; k < 40; ++k) bias.set(6 * 40 + k, -kInfinity);
    c.args.options.attn_bias = bias.view;
    c.args.isa = isa;
    forward(c.args, executor);
    for (int64_t q = 0; q < 40; ++q) {
      EXPECT_EQ(std::isnan(c.out.get(q * 4)), q == 5) << name_of(isa) << " row " << q;
    }
    EXPECT_EQ(c.out.get(6 * 4), 0) << name_of(isa);
    EXPECT_EQ(c.lse.get(6), -kInfinity) << name_of(isa);
  }
}

TEST(Forward, Logits) {
  for (const int64_t q : {3, 130}) {
    for (const Values values : {Values::large, Values::max_last, Values::denormal}) {
      CaseConfig c = small(q, 130, 64);
      c.values = values;
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

TEST(Forward, EachOptionAlone) { expect_right(each_option_alone(small)); }

TEST(Forward, AllOptionsTogether) {
  for (const int64_t q : {7, 90}) {
    CaseConfig c = small(q, 110, 40);
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.source = check::PatternSource::random_bitmaps;
    c.density = 0.8;
    c.scale = 0.3;
    c.causal = c.key_lengths = true;
    c.window_left = 60;
    c.softcap = 3;
    c.alibi = c.block_bias = c.attn_bias = c.bias_minus_infinity = c.sinks = true;
    c.dropout = 0.2;
    expect_right(c);
  }
}

TEST(Forward, StridesOfEveryKind) {  // gaps, negative, broadcast, bases off by any number of elements
  for (uint64_t seed = 0; seed < 20; ++seed) {
    CaseConfig c = small(33, 65, 24);
    c.seed = seed;
    c.batch = c.heads = c.kv_heads = 2;
    expect_right(c);
  }
}

TEST(Forward, PagesAndPackedSequences) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    CaseConfig c = small(seed % 2 ? 3 : 70, 130);
    c.seed = seed;
    c.path = CheckPath::paged;
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.density = 0.7;
    c.causal = seed % 4 < 2;
    c.key_lengths = c.align_to_key_lengths = seed % 3 == 0;
    expect_right(c);
    c.path = CheckPath::varlen;
    c.key_lengths = c.align_to_key_lengths = false;
    c.batch = 4;
    c.seqlens_q = {40, 0, 1, 70};
    c.seqlens_k = {40, 3, 90, static_cast<int64_t>(seed)};
    c.dropout = seed % 2 ? 0.3 : 0;  // differs from sequence to sequence
    expect_right(c);
  }
}

TEST(Forward, DecodeLengths) {
  for (int64_t q = 1; q <= 17; ++q) {  // 17 is beyond the decode schedule
    CaseConfig c = small(q, 165, 64);
    c.heads = 4;
    c.kv_heads = 2;
    c.causal = true;
    c.block_q = 16;
    expect_right(c);
  }
}

TEST(Forward, OffsetsBeyond32Bits) {
  // 24 keys 2^27 elements apart: 3.2e9 elements, of which a few pages exist.
  constexpr int64_t kStep = int64_t{1} << 27, kTokens = 24, kDim = 8;
  const size_t bytes = kStep * kTokens * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  float* sparse = static_cast<float*>(memory);
  InlineExecutor executor;
  Call c({.seqlen_q = kTokens, .seqlen_k = kTokens, .head_dim = kDim, .head_dim_v = kDim}, DType::f32,
         dense_pattern(kTokens, kTokens));
  for (const Isa isa : usable_isas()) {
    c.args.isa = isa;
    c.args.q = c.q.view, c.args.k = c.k.view, c.args.v = c.v.view, c.args.out = c.out.view;
    forward(c.args, executor);
    const std::vector<double> expected = c.out.values();
    // q, k, v and out side by side in the sparse memory.
    const auto spread = [&](const Numbers& from, int64_t at) {
      MutableTensorView t = make_view(sparse + at * kDim, DType::f32, {1, kTokens, 1, kDim});
      t.strides[1] = kStep;
      for (int64_t s = 0; s < kTokens; ++s) {
        std::memcpy(sparse + at * kDim + s * kStep, from.memory.data() + s * kDim * 4, kDim * 4);
      }
      return t;
    };
    c.args.q = spread(c.q, 0), c.args.k = spread(c.k, 1), c.args.v = spread(c.v, 2), c.args.out = spread(c.q, 3);
    forward(c.args, executor);
    for (int64_t i = 0; i < kTokens * kDim; ++i) {
      EXPECT_EQ(sparse[3 * kDim + i / kDim * kStep + i % kDim], expected[i]) << name_of(isa) << " " << i;
    }
  }
  munmap(memory, bytes);
}

TEST(Varlen, MistakesAreNamed) {
  InlineExecutor executor;
  std::vector<float> x(30 * 2 * 4), y(30 * 2 * 4);
  const std::vector<int64_t> good{0, 10, 30};
  const std::vector<BlockPattern> patterns{dense_pattern(10, 10), dense_pattern(20, 20)};
  const auto argument = [&](auto change) {
    VarlenForwardArgs a;
    a.q = a.k = a.v = make_view(static_cast<const void*>(x.data()), DType::f32, {30, 2, 4});
    a.out = make_view(y.data(), DType::f32, {30, 2, 4});
    a.cu_seqlens_q = a.cu_seqlens_k = good;
    a.patterns = patterns;
    change(a);
    return error_argument([&] { forward_varlen(a, executor); });
  };
  const std::vector<int64_t> few{0, 30}, late{1, 10, 30}, falling{0, 31, 30}, too_short{0, 10, 29}, lengths{10, 20};
  EXPECT_EQ(argument([](auto&) {}), "");
  EXPECT_EQ(argument([&](auto& a) { a.cu_seqlens_q = few; }), "cu_seqlens_q");
  EXPECT_EQ(argument([&](auto& a) { a.cu_seqlens_q = late; }), "cu_seqlens_q");
  EXPECT_EQ(argument([&](auto& a) { a.cu_seqlens_k = falling; }), "cu_seqlens_k");
  EXPECT_EQ(argument([&](auto& a) { a.cu_seqlens_k = too_short; }), "cu_seqlens_k");
  EXPECT_EQ(argument([&](auto& a) { a.cu_seqlens_q = {}; }), "cu_seqlens_q");
  EXPECT_EQ(argument([&](auto& a) { a.patterns = a.patterns.subspan(0, 1); }), "cu_seqlens_q");
  EXPECT_EQ(argument([](auto& a) { a.q.rank = 4; }), "q");
  EXPECT_EQ(argument([](auto& a) { a.out = {}; }), "out");
  EXPECT_EQ(argument([&](auto& a) { a.out.data = x.data() + 20 * 8; }), "out");  // another sequence's input
  EXPECT_EQ(argument([&](auto& a) { a.options.key_lengths = lengths; }), "key_lengths");
  EXPECT_EQ(argument([](auto& a) { a.options.q_offset = 0; }), "q_offset");
  EXPECT_EQ(argument([](auto& a) { a.options.attn_bias = a.q; }), "attn_bias");
  EXPECT_EQ(argument([](auto& a) { a.options.block_bias = a.q; }), "block_bias");
  const std::vector<BlockPattern> wrong{dense_pattern(10, 10), dense_pattern(20, 21)};
  EXPECT_EQ(argument([&](auto& a) { a.patterns = wrong; }), "pattern");
  // Views of one row that claim 2^46 rows: refused by what the patterns say, without memory for so many.
  const auto endless = [](TensorView& t) { t.sizes[0] = int64_t{1} << 46, t.strides[0] = 0; };
  EXPECT_EQ(argument([&](auto& a) { endless(a.q), a.out.sizes[0] = a.q.sizes[0], a.out.strides[0] = 0; }), "out");
  EXPECT_EQ(argument([&](auto& a) { endless(a.k), a.v = a.k; }), "cu_seqlens_k");
  EXPECT_EQ(argument([&](auto& a) { endless(a.k), a.k.sizes[0] = int64_t{1} << 50, a.v = a.k; }), "k");
}

}  // namespace
}  // namespace tessera
