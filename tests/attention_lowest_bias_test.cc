// Masks made of the lowest number of a dtype (as many libraries write "not a key") are finite: a row of nothing else
// has equal weights, in every kernel, and no NaN reaches a gradient. 20 x 50 tokens: ragged ends of every tile; one
// query: the kernel for decoding.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_inputs.h"
#include "tessera/backward.h"

namespace tessera {
namespace {

constexpr int64_t kKeys = 50, kDim = 8, kMasked = 0;  // the row of lowest biases

struct LowestCase {
  DType dtype;
  DType bias_dtype;
  double bias;
};

const LowestCase kCases[] = {
    {DType::f32, DType::f32, std::numeric_limits<float>::lowest()},
    {DType::f32, DType::f32, -1e38},
    {DType::f32, DType::f64, std::numeric_limits<double>::lowest()},
    {DType::f32, DType::bf16, -3.3895313892515355e38},
    {DType::bf16, DType::bf16, -3.3895313892515355e38},
    {DType::f16, DType::f32, std::numeric_limits<float>::lowest()},
    {DType::f16, DType::f16, -65504},
    {DType::f64, DType::f64, std::numeric_limits<double>::lowest()},
};

struct LowestCall : Call {
  Numbers bias;
  LowestCall(const LowestCase& c, int64_t queries)
      : Call({.seqlen_q = queries, .seqlen_k = kKeys, .head_dim = kDim, .head_dim_v = kDim}, c.dtype,
             dense_pattern(queries, kKeys), c.dtype, c.dtype == DType::f64 ? DType::f64 : DType::f32),
        bias(c.bias_dtype, {1, 1, queries, kKeys}) {
    for (int64_t k = 0; k < kKeys; ++k) bias.set(kMasked * kKeys + k, c.bias);
    args.options.attn_bias = bias.view;
  }
};

template <class Check>
void for_each_case(Check check) {
  for (const LowestCase& c : kCases) {
    for (const int64_t queries : {int64_t{20}, int64_t{1}}) {
      for (const Isa isa : usable_isas()) {
        SCOPED_TRACE(std::string(name_of(c.dtype)) + " bias " + std::string(name_of(c.bias_dtype)) + " " +
                     std::to_string(queries) + " queries " + std::string(name_of(isa)));
        LowestCall call(c, queries);
        if (c.dtype != DType::f64) call.args.isa = isa;
        check(call, c);
      }
    }
  }
}

TEST(LowestBias, ARowOfNothingElseHasEqualWeights) {
  InlineExecutor executor;
  for_each_case([&](LowestCall& call, const LowestCase& c) {
    forward(call.args, executor);
    const double step = c.dtype == DType::bf16 ? 0x1p-8 : c.dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
    for (int64_t d = 0; d < kDim; ++d) {
      double mean = 0;
      for (int64_t k = 0; k < kKeys; ++k) mean += call.v.get(k * kDim + d) / kKeys;
      const double got = call.out.get(kMasked * kDim + d);
      if (c.bias == -65504) {  // leaves room for the differences of the scores; the others swallow them
        EXPECT_NE(got, 0) << d;
      } else {
        EXPECT_NEAR(got, mean, 4 * step + kKeys * 0x1p-24) << d;
      }
    }
    EXPECT_TRUE(std::isfinite(call.lse.get(kMasked)));
  });
}

TEST(LowestBias, WeightsSumToOne) {
  InlineExecutor executor;
  for_each_case([&](LowestCall& call, const LowestCase&) {
    const BlockWeights weights = attention_weights(call.args, executor);
    double sum = 0;
    for (size_t n = 0; n < weights.indices.size(); ++n) {
      for (int64_t k = 0; weights.indices[n].row == 0 && k < weights.block_k; ++k) {
        sum += weights.values[(n * weights.block_q + kMasked) * weights.block_k + k];
      }
    }
    EXPECT_NEAR(sum, 1, kKeys * 0x1p-24);
  });
}

// Rows like this one are padding: nothing comes back to them, and nothing must come from them. (Their own lse has no
// room for the logarithm of a sum beside a number of that size.)
TEST(LowestBias, GradientsOfTheOtherRowsAreTheirs) {
  InlineExecutor executor;
  for_each_case([&](LowestCall& call, const LowestCase& c) {
    if (c.dtype == DType::f64) return;
    const int64_t queries = call.shape.seqlen_q;
    forward(call.args, executor);
    Numbers dout(c.dtype, {1, queries, 1, kDim}, wave(queries * kDim, 0.9, 0.3));
    for (int64_t d = 0; d < kDim; ++d) dout.set(kMasked * kDim + d, 0);
    Numbers dq(DType::f32, {1, queries, 1, kDim}), dk(DType::f32, {1, kKeys, 1, kDim}),
        dv(DType::f32, {1, kKeys, 1, kDim});
    BackwardArgs args;
    args.q = call.args.q;
    args.k = call.args.k;
    args.v = call.args.v;
    args.pattern = call.args.pattern;
    args.out = call.args.out;
    args.lse = call.args.lse;
    args.dout = dout.view;
    args.dq = dq.view;
    args.dk = dk.view;
    args.dv = dv.view;
    args.options = call.args.options;
    args.isa = call.args.isa;
    backward(args, executor);
    Numbers dq64(DType::f64, {1, queries, 1, kDim}), dk64(DType::f64, {1, kKeys, 1, kDim}),
        dv64(DType::f64, {1, kKeys, 1, kDim});
    args.dq = dq64.view;
    args.dk = dk64.view;
    args.dv = dv64.view;
    reference_backward(args, executor);
    const double tolerance = c.dtype == DType::f32 ? 1e-5 : 0.02 * static_cast<double>(queries);
    for (int64_t i = 0; i < kKeys * kDim; ++i) {
      EXPECT_NEAR(dk.get(i), dk64.get(i), tolerance) << i;
      EXPECT_NEAR(dv.get(i), dv64.get(i), tolerance) << i;
    }
    for (int64_t i = 0; i < queries * kDim; ++i) EXPECT_NEAR(dq.get(i), dq64.get(i), tolerance) << i;
  });
}

// Padding at the left, a row of -inf for all queries: whole blocks of it are skipped, a block that it ends in is not,
// and what K and V hold there does not matter. As the call on the keys behind it.
TEST(PaddingAtTheLeft, IsTheCallOnTheOtherKeys) {
  constexpr int64_t kPadded = 40;  // two blocks of 16 and a half
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (const DType bias_dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      for (const int64_t queries : {int64_t{20}, int64_t{70}, int64_t{1}}) {
        for (const Isa isa : usable_isas()) {
          SCOPED_TRACE(std::string(name_of(dtype)) + " bias " + std::string(name_of(bias_dtype)) + " " +
                       std::to_string(queries) + " queries " + std::string(name_of(isa)));
          const Shape shape{.seqlen_q = queries, .seqlen_k = 90, .head_dim = kDim, .head_dim_v = kDim};
          const DType lse = dtype == DType::f64 ? DType::f64 : DType::f32;
          Call call(shape, dtype, dense_pattern(queries, 90), dtype, lse);
          Numbers bias(bias_dtype, {1, 1, 1, 90});
          for (int64_t k = 0; k < 90; ++k) bias.set(k, k < kPadded ? -std::numeric_limits<double>::infinity() : 0.5);
          for (int64_t i = 0; i < kPadded * kDim; ++i) {
            call.k.set(i, 1000);
            call.v.set(i, -1000);
          }
          call.args.options.attn_bias = bias.view;
          if (dtype != DType::f64) call.args.isa = isa;
          InlineExecutor executor;
          forward(call.args, executor);

          Shape rest = shape;
          rest.seqlen_k -= kPadded;
          Call other(rest, dtype, dense_pattern(queries, rest.seqlen_k), dtype, lse);
          for (int64_t i = 0; i < rest.seqlen_k * kDim; ++i) {
            other.k.set(i, call.k.get(kPadded * kDim + i));
            other.v.set(i, call.v.get(kPadded * kDim + i));
          }
          if (dtype != DType::f64) other.args.isa = isa;
          forward(other.args, executor);
          const double tolerance = 16 * std::max(epsilon_of(dtype), epsilon_of(lse));
          for (int64_t i = 0; i < queries * kDim; ++i) EXPECT_NEAR(call.out.get(i), other.out.get(i), tolerance);
          for (int64_t i = 0; i < queries; ++i) EXPECT_NEAR(call.lse.get(i), other.lse.get(i) + 0.5, 16 * tolerance);
        }
      }
    }
  }
}

}  // namespace
}  // namespace tessera
