// The checks of `tessera check`, as a test: 150 random cases on every ISA of this machine. And checks of the checks:
// they are the same for the same seed, and a wrong result does not pass.
#include "tessera/check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/reference.h"
#include "attention_inputs.h"
#include "check/cases.h"

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
  // Each ISA took every path in every dtype.
  for (const Isa isa : usable_isas()) {
    const auto rows = std::count_if(report.rows.begin(), report.rows.end(), [&](const CheckRow& r) {
      return r.isa == isa && r.cases > 0;
    });
    EXPECT_EQ(rows, 4 * 3) << name_of(isa);
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
    p.lse = nullptr;
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

}  // namespace
}  // namespace tessera
