// Weights of softmax that are subnormal in fp32 (scores 87 to 103 below the largest) make Intel's cores 5 to 85 times
// slower. The kernels take them as 0, are as right as ever for logits of any size, and no caller's thread is left in
// another state than it came in.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

#include "adversarial_cases.h"
#include "attention_inputs.h"
#include "check/verdict.h"
#include "core/float_mode.h"
#include "tessera/backward.h"

namespace tessera {
namespace {

using check::CaseConfig;

// Whether this thread takes subnormal numbers for what they are, as operands and as results.
bool knows_subnormals() {
  volatile float tiny = 0x1p-100f, factor = 0x1p-40f, back = 0x1p60f;
  volatile float product = tiny * factor;  // 2^-140
  return product != 0 && product * back == 0x1p-80f;
}

// Watches the threads that run a call: what state they are in afterwards.
class WatchingExecutor : public Executor {
 public:
  int num_threads() const override { return 2; }
  void run(int n, const std::function<void(int)>& task) override {
    pool_.run(n, [&](int i) {
      task(i);
      if (!knows_subnormals()) left_flushing = true;
    });
  }
  std::atomic<bool> left_flushing{false};

 private:
  ThreadPool pool_{2};
};

TEST(FlushSubnormals, LastsAsLongAsItLives) {
  ASSERT_TRUE(knows_subnormals());
  {
    const FlushSubnormals outer;
    EXPECT_FALSE(knows_subnormals());
    {
      const FlushSubnormals inner;
      EXPECT_FALSE(knows_subnormals());
    }
    EXPECT_FALSE(knows_subnormals()) << "an inner one gives back what it found";
  }
  EXPECT_TRUE(knows_subnormals());
  try {
    const FlushSubnormals flush;
    throw std::runtime_error("on the way");
  } catch (const std::runtime_error&) {
  }
  EXPECT_TRUE(knows_subnormals());
}

// Two keys: a weight of e^-90, or 2^-129.8, beside one of 1. As the value it meets is 1e30, out would show it.
TEST(Subnormals, ASubnormalWeightIsNoWeight) {
  for (const Isa isa : usable_isas()) {
    for (const int64_t queries : {int64_t{1}, int64_t{20}}) {
      Call call({.seqlen_q = queries, .seqlen_k = 2}, DType::f32, dense_pattern(queries, 2));
      for (int64_t i = 0; i < queries; ++i) call.q.set(i, 90);
      call.k.set(0, 0);
      call.k.set(1, -1);
      call.v.set(0, 0);
      call.v.set(1, 1e30);
      call.args.options.scale = 1.0;
      call.args.isa = isa;
      InlineExecutor executor;
      forward(call.args, executor);
      EXPECT_EQ(call.out.get(0), 0) << name_of(isa) << ", " << queries << " queries";
    }
  }
}

// Logits of standard deviation .3 to 3,000 against fp64 by bounds: forward and gradients, every dtype, panels and
// decode; with slopes that are no powers of two.
TEST(Subnormals, LogitsOfEverySizeAreRight) {
  WatchingExecutor executor;
  for (const double deviation : {0.3, 14.0, 20.0, 60.0, 200.0, 3000.0}) {
    for (const int64_t queries : {int64_t{150}, int64_t{3}}) {
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        CaseConfig config = dense_case(queries, 150, 32);
        config.dtype = dtype;
        config.scale = deviation / std::sqrt(32.0);
        config.alibi = config.seed % 2 == 0;
        check::Case test(config);
        std::vector<check::Truth> truths;
        for (const Problem& p : test.problems()) truths.emplace_back(p, executor);
        const check::GradientTruth gradients(test, executor);
        for (const Isa isa : usable_isas()) {
          EXPECT_EQ(judge(test, truths, isa, executor).problem, "") << name_of(isa) << " " << describe(config);
          test.run(isa, executor);
          EXPECT_EQ(judge_backward(test, gradients, isa, executor).problem, "")
              << name_of(isa) << " " << describe(config);
        }
      }
    }
  }
  EXPECT_FALSE(executor.left_flushing);
  EXPECT_TRUE(knows_subnormals());
}

// The largest and least numbers that are allowed, with scores of 0 and of 1: never NaN.
TEST(EdgesOfOptions, AreRightOrRefused) {
  InlineExecutor executor;
  for (const Isa isa : usable_isas()) {
    for (const int64_t queries : {int64_t{1}, int64_t{20}}) {
      for (const double scale : {1e30, -1e30, 1e-30, 0.0, 1.0}) {
        for (const double softcap : {0.0, 1e30, 1e-30}) {
          for (const double q : {0.0, 1.0}) {
            Call call({.seqlen_q = queries, .seqlen_k = 20}, DType::f32, dense_pattern(queries, 20));
            for (int64_t i = 0; i < queries; ++i) call.q.set(i, q);
            call.args.isa = isa;
            call.args.options.scale = scale;
            call.args.options.softcap = softcap;
            forward(call.args, executor);
            for (const double x : call.out.values()) {
              EXPECT_TRUE(std::isfinite(x)) << name_of(isa) << " scale " << scale << " softcap " << softcap;
            }
          }
        }
      }
    }
  }
  Call call({.seqlen_q = 20, .seqlen_k = 20}, DType::f32, dense_pattern(20, 20));
  for (const double beyond : {3e38, 1e-40, std::numeric_limits<double>::quiet_NaN()}) {
    call.args.options = {};
    call.args.options.scale = beyond;
    EXPECT_EQ(error_argument([&] { forward(call.args, executor); }), "scale") << beyond;
    call.args.options = {};
    call.args.options.softcap = beyond;
    EXPECT_EQ(error_argument([&] { forward(call.args, executor); }), "softcap") << beyond;
  }
}

}  // namespace
}  // namespace tessera
