// The checks of `tessera check`, as a test: 150 random cases on every ISA of this machine. And checks of the checks:
// they are the same for the same seed, and a wrong result does not pass.
#include "tessera/check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_inputs.h"
#include "check/verdict.h"
#include "reference/forward.h"
#include "tessera/backward.h"

namespace tessera {
namespace {

TEST(Check, RandomCasesOnEveryIsa) {
  InlineExecutor executor;
  int64_t last = 0;
  const CheckReport report = run_check({.cases = 150, .seed = 2026}, executor, [&](int64_t done, int64_t total) {
    EXPECT_EQ(done, last + 1);
    EXPECT_EQ(total, 150);
    last = done;
  });
  EXPECT_EQ(last, 150);
  EXPECT_EQ(report.cases, 150);
  for (const CheckFailure& f : report.failures) {
    ADD_FAILURE() << "seed 2026 case " << f.case_number << " " << name_of(f.isa) << ": " << f.problem << "\n"
                  << f.config;
  }
  // Each ISA took every path in every dtype, and every path but the paged one backward.
  for (const Isa isa : usable_isas()) {
    const auto rows = std::count_if(report.rows.begin(), report.rows.end(),
                                    [&](const CheckRow& r) { return r.isa == isa && r.cases > 0; });
    EXPECT_EQ(rows, (5 + 4) * 3) << name_of(isa);
  }
}

TEST(Check, RejectsNonsense) {
  InlineExecutor executor;
  EXPECT_EQ(error_argument([&] { run_check({.cases = -1}, executor); }), "cases");
  std::vector<Isa> missing{Isa::automatic};
  EXPECT_EQ(error_argument([&] { run_check({.cases = 1, .isas = missing}, executor); }), "isas");
}

TEST(Cases, FollowFromTheSeed) {
  for (int64_t n = 0; n < 20; ++n) {
    const check::CaseConfig config = check::random_config(7, n);
    EXPECT_EQ(describe(config), describe(check::random_config(7, n)));
    const check::Case a(config), b(config);
    ASSERT_EQ(a.problems().size(), b.problems().size());
    for (size_t i = 0; i < a.problems().size(); ++i) {
      const Problem &x = a.problems()[i], &y = b.problems()[i];
      EXPECT_EQ(x.q.seq, y.q.seq);
      if (x.batch > 0 && x.seqlen_q > 0 && x.heads > 0) {
        EXPECT_EQ(std::memcmp(x.q.data, y.q.data, size_of(x.dtype)), 0);
      }
    }
  }
  EXPECT_NE(describe(check::random_config(7, 0)), describe(check::random_config(8, 0)));
}

// The bound must be below what a lost key, a wrong scale or a mask off by one does: else the check checks nothing.
// 129 keys, D 32: each key carries about 1 % of a row.
TEST(Cases, ToleranceSeesSmallMistakes) {
  check::CaseConfig config;
  config.seed = 5;
  config.seqlen_q = config.seqlen_k = 129;
  config.head_dim = config.head_dim_v = 32;
  config.causal = true;
  config.density = 1;
  const check::Case test(config);
  const Problem& good = test.problems()[0];
  const int64_t n = 129 * 32;
  InlineExecutor executor;
  std::vector<float> bound(n);
  const auto reference = [&](Problem p, float* out_bound) {
    std::vector<double> out(n);
    p.out = {reinterpret_cast<char*>(out.data()), n, 32, 32};
    p.out_dtype = DType::f64;
    p.lse.data = nullptr;
    reference_attention(p, executor, out_bound);
    return out;
  };
  const std::vector<double> expected = reference(good, bound.data());
  const auto worst = [&](const Problem& wrong) {
    const std::vector<double> out = reference(wrong, nullptr);
    double fraction = 0;
    for (int64_t i = 0; i < n; ++i) fraction = std::max(fraction, std::abs(out[i] - expected[i]) / bound[i]);
    return fraction;
  };
  EXPECT_EQ(worst(good), 0);
  Problem p = good;
  p.scale *= 1.001;
  EXPECT_GT(worst(p), 10);
  p = good;
  p.q_offset_given = true;
  p.q_offset = -1;  // the mask off by one
  EXPECT_GT(worst(p), 100);
  p = good;
  p.window_left = 127;  // the last row loses one key of 129
  EXPECT_GT(worst(p), 100);
}

// The same for gradients: 129 queries and keys, D 32.
TEST(Cases, GradientToleranceSeesSmallMistakes) {
  check::CaseConfig config;
  config.seed = 5;
  config.seqlen_q = config.seqlen_k = 129;
  config.head_dim = config.head_dim_v = 32;
  config.causal = true;
  config.density = 1;
  const check::Case test(config);
  constexpr int64_t n = 129 * 32;
  InlineExecutor executor;
  struct Result {
    std::vector<double> dq = std::vector<double>(n), dk = dq, dv = dq;
    std::vector<float> dq_bound = std::vector<float>(n), dk_bound = dq_bound, dv_bound = dq_bound;
  };
  const auto gradients = [&](BackwardArgs args) {
    Result r;
    args.dq = make_view(r.dq.data(), DType::f64, {1, 129, 1, 32});
    args.dk = make_view(r.dk.data(), DType::f64, {1, 129, 1, 32});
    args.dv = make_view(r.dv.data(), DType::f64, {1, 129, 1, 32});
    reference_backward(args, executor, {.dq = r.dq_bound.data(), .dk = r.dk_bound.data(), .dv = r.dv_bound.data()});
    return r;
  };
  const Result expected = gradients(test.backward_args());
  // Largest error over bound of dq, dk and dv.
  const auto worst = [&](const BackwardArgs& wrong) {
    const Result r = gradients(wrong);
    std::array<double, 3> fraction{};
    for (int64_t i = 0; i < n; ++i) {
      fraction[0] = std::max(fraction[0], std::abs(r.dq[i] - expected.dq[i]) / expected.dq_bound[i]);
      fraction[1] = std::max(fraction[1], std::abs(r.dk[i] - expected.dk[i]) / expected.dk_bound[i]);
      fraction[2] = std::max(fraction[2], std::abs(r.dv[i] - expected.dv[i]) / expected.dv_bound[i]);
    }
    return fraction;
  };
  for (const double fraction : worst(test.backward_args())) EXPECT_EQ(fraction, 0);
  BackwardArgs args = test.backward_args();
  args.options.scale = 1.001 / std::sqrt(32.0);
  for (const double fraction : worst(args)) EXPECT_GT(fraction, 10);
  args = test.backward_args();
  args.options.q_offset = -1;  // the mask off by one
  for (const double fraction : worst(args)) EXPECT_GT(fraction, 100);
  args = test.backward_args();
  args.options.window_left = 127;  // the last row loses one key of 129
  for (const double fraction : worst(args)) EXPECT_GT(fraction, 100);
}

// Dilated cases: more heads than rates and fewer, segments and rates that do not divide, a clipped segment, grouped
// heads, and with each seed other options. 90 tokens: some blocks of 16 in a segment.
check::CaseConfig dilated_config(uint64_t seed) {
  check::CaseConfig config;
  config.seed = seed;
  config.path = CheckPath::dilated;
  config.batch = 2;
  config.heads = 4;
  config.kv_heads = seed % 3 ? 2 : 1;
  config.seqlen_q = config.seqlen_k = 90;
  config.head_dim = 12;
  config.head_dim_v = 20;
  config.segment_lengths = {33, 200};
  config.dilation_rates = {seed % 2 ? 1 : 2, 5};
  config.block_q = 16;
  config.block_k = 32;
  config.density = 0.8;
  config.source = seed % 4 == 0 ? check::PatternSource::named : check::PatternSource::random_bitmaps;
  config.kind = PatternKind::random;
  config.pattern_per_head = seed % 2;
  config.causal = seed % 2;
  config.dlse = seed % 3;
  return config;
}

// Rounded to fp64 the plain chain, which takes a dilated case apart by the definition, is the reference, which has the
// library's plan of it: a mistake in either shows. Values must be those of one softmax over all (w, r).
TEST(Cases, PlainDilatedIsTheReferenceInFp64) {
  InlineExecutor executor;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    check::CaseConfig config = dilated_config(seed);
    config.dtype = config.gradient_dtype = DType::f64;
    if (seed % 4 == 1) config.window_left = 21;
    if (seed % 4 == 2) config.window_left = config.window_right = 9;
    config.key_lengths = seed % 5 == 1;
    config.softcap = seed % 3 ? 0 : 3;
    config.alibi = seed % 2;
    config.alibi_per_batch = seed % 4 == 1;
    config.attn_bias = config.bias_minus_infinity = seed % 3 == 1;
    config.dropout = seed % 3 == 2 ? 0.3 : 0;
    const check::Case test(config);
    const std::vector<check::Truth> forward = check::truths_of(test, executor);
    ASSERT_EQ(forward.size(), 1u);
    std::vector<double> out(forward[0].out.size());
    check::plain_dilated(test, out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      ASSERT_NEAR(out[i], forward[0].out[i], 1e-12 * (1 + std::abs(out[i]))) << "out " << i << " " << describe(config);
    }
    const check::GradientTruth truth(test, executor);
    std::array<std::vector<double>, 3> plain;
    for (int g = 0; g < 3; ++g) plain[g].resize(truth.values[g].value.size());
    check::plain_dilated_gradients(test, {plain[0].data(), plain[1].data(), plain[2].data()});
    for (int g = 0; g < 3; ++g) {
      double largest = 0;
      for (size_t i = 0; i < plain[g].size(); ++i) {
        const double value = truth.values[g].value[i];
        largest = std::max(largest, std::abs(value));
        ASSERT_NEAR(plain[g][i], value, 1e-12 * (1 + std::abs(value)))
            << check::kGradientNames[g] << " " << i << " " << describe(config);
        if (!truth.values[g].touched[i / truth.values[g].inner]) {
          ASSERT_EQ(value, 0) << check::kGradientNames[g] << " " << i << " " << describe(config);
        }
      }
      EXPECT_GT(largest, 0.1) << check::kGradientNames[g] << " " << describe(config);
    }
  }
}

// The bound must be below what one row too many, a wrong rate or scale does. And rows that nothing reads are hostile:
// of one head, 3 rows of 4.
TEST(Cases, DilatedToleranceSeesSmallMistakes) {
  InlineExecutor executor;
  check::CaseConfig config = dilated_config(1);
  config.source = check::PatternSource::named;
  config.kind = PatternKind::dense;
  config.pattern_per_head = false;
  config.segment_lengths = {30, 90};
  config.dilation_rates = {1, 2};
  config.dq = config.dk = config.dv = true;
  const check::Case test(config);
  const check::GradientTruth truth(test, executor);
  const auto worst = [&](auto change) {  // of out, dq, dk, dv
    DilatedForwardArgs forward = test.dilated_args();
    DilatedBackwardArgs args = test.dilated_backward_args();
    change(forward.dilation, forward.options);
    change(args.dilation, args.options);
    args.accumulate = false;
    const check::Truth expected = check::truths_of(test, executor)[0];
    std::vector<double> out(expected.out.size()), gradients[3];
    forward.out = make_view(static_cast<void*>(out.data()), DType::f64, {2, 90, 4, 20});
    forward.lse = {};
    reference_dilated_forward(forward, executor);
    MutableTensorView* views[] = {&args.dq, &args.dk, &args.dv};
    for (int g = 0; g < 3; ++g) {
      gradients[g].resize(truth.values[g].value.size());
      const auto& n = test.gradient(g).view.sizes;
      *views[g] = make_view(static_cast<void*>(gradients[g].data()), DType::f64, {n[0], n[1], n[2], n[3]});
    }
    reference_dilated_backward(args, executor);
    std::array<double, 4> fraction{};
    for (size_t i = 0; i < out.size(); ++i) {
      fraction[0] = std::max(fraction[0], std::abs(out[i] - expected.out[i]) / expected.out_bound[i]);
    }
    for (int g = 0; g < 3; ++g) {
      for (size_t i = 0; i < gradients[g].size(); ++i) {
        const double error = std::abs(gradients[g][i] - truth.values[g].value[i]);
        if (error > 0) fraction[g + 1] = std::max(fraction[g + 1], error / truth.values[g].bound[i]);
      }
    }
    return fraction;
  };
  const auto all = [&](double least, auto change) {
    for (const double fraction : worst(change)) EXPECT_GT(fraction, least);
  };
  for (const double fraction : worst([](Dilation&, AttentionOptions&) {})) EXPECT_EQ(fraction, 0);
  all(10, [](Dilation&, AttentionOptions& o) { o.scale = 1.001 / std::sqrt(12.0); });
  all(10, [](Dilation&, AttentionOptions& o) { o.window_left = 86; });  // rate 2: 88 tokens back, one pair a head
  const std::vector<int64_t> lengths{29, 90}, rates{1, 3};
  all(100, [&](Dilation& d, AttentionOptions&) { d.segment_lengths = lengths; });
  all(100, [&](Dilation& d, AttentionOptions&) { d.dilation_rates = rates; });

  config.heads = config.kv_heads = 1;
  config.segment_lengths = {90};
  config.dilation_rates = {4};
  const check::Case gaps(config);
  const DilatedForwardArgs& args = gaps.dilated_args();
  for (int64_t s = 0; s < 90; ++s) {
    const int64_t at = s * args.q.strides[1];
    EXPECT_EQ(std::isnan(load_as_double(args.q.data, args.q.dtype, at)), s % 4 != 0) << s;
  }
}

// Rounded to fp64 the plain implementation is another one of the reference: both are right, or wrong in the same way.
TEST(Cases, PlainGradientsAreTheReferenceInFp64) {
  InlineExecutor executor;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    check::CaseConfig config;
    config.seed = seed;
    config.dtype = config.gradient_dtype = DType::f64;
    config.batch = 2;
    config.heads = 4;
    config.kv_heads = 2;
    config.seqlen_q = 40;
    config.seqlen_k = 50;
    config.head_dim = 12;
    config.head_dim_v = 20;
    config.block_q = 32;
    config.block_k = 16;
    config.source = check::PatternSource::random_bitmaps;
    config.density = 0.8;
    config.causal = config.dlse = true;
    config.pattern_per_head = seed % 2;
    config.softcap = seed % 3 ? 0 : 3;
    config.alibi = config.block_bias = config.attn_bias = config.bias_minus_infinity = seed % 2;
    config.sinks = seed % 4 > 0;
    config.dropout = seed % 3 ? 0.3 : 0;
    if (seed % 5 == 4) {
      config.path = CheckPath::varlen;
      config.seqlens_q = {30, 5};
      config.seqlens_k = {30, 40};
      config.block_bias = config.attn_bias = false;
    }
    const check::Case test(config);
    const check::GradientTruth truth(test, executor);
    std::array<std::vector<double>, check::kGradients> plain;
    for (int g = 0; g < check::kGradients; ++g) plain[g].resize(truth.values[g].value.size());
    for (size_t n = 0; n < test.backward_problems().size(); ++n) {
      const auto at = [&](check::Gradient g, int64_t offset) {
        return plain[g].empty() ? nullptr : plain[g].data() + offset;
      };
      check::plain_gradients(test.backward_problems()[n],
                             {at(check::kDq, test.first_q(n) * 4 * 12), at(check::kDk, test.first_k(n) * 2 * 12),
                              at(check::kDv, test.first_k(n) * 2 * 20), at(check::kDBlockBias, 0),
                              at(check::kDAttnBias, 0), at(check::kDSinks, 0)});
    }
    for (int g = 0; g < check::kGradients; ++g) {
      // The gradients of block_bias and sinks are fp32.
      const double epsilon = g == check::kDBlockBias || g == check::kDSinks ? epsilon_of(DType::f32) : 1e-12;
      for (size_t i = 0; i < plain[g].size(); ++i) {
        const double value = truth.values[g].value[i];
        ASSERT_NEAR(plain[g][i], value, epsilon * (1 + std::abs(value)))
            << check::kGradientNames[g] << " " << i << " " << describe(config);
      }
    }
  }
}

}  // namespace
}  // namespace tessera
