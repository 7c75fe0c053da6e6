// The fp64 reference against numbers that somebody else computed: by hand, and by PyTorch 2.13.0's
// F.scaled_dot_product_attention in float64. It is the oracle of all other tests, so it must not be tested against
// itself. Sizes are the smallest that tell rows, heads, keys and values apart, and one of 40 tokens in blocks of 16
// for the pattern.
//
// The literals: q = sin(0.7 i + 0.1), k = sin(0.3 i + 1), v = sin(1.3 i + 0.5) over the elements of [B, S, H, D] in
// order, transposed to [B, H, S, D] for PyTorch, enable_gqa=True; printed as [B, Sq, H, Dv].
#include "attention_inputs.h"

#include <gtest/gtest.h>

#include <limits>

namespace tessera {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const Shape kSmall{.batch = 1, .seqlen_q = 3, .seqlen_k = 5, .heads = 2, .kv_heads = 1, .head_dim = 3, .head_dim_v = 2};

void expect_near(const std::vector<double>& got, const std::vector<double>& expected, double tolerance = 1e-11) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], tolerance) << "element " << i;
}

struct Fp64Call : Call {
  Fp64Call(const Shape& s, const BlockPattern& pattern) : Call(s, DType::f64, pattern, DType::f64, DType::f64) {}
  std::vector<double> run() {
    InlineExecutor executor;
    reference_forward(args, executor);
    return out.values();
  }
};

TEST(Reference, TwoKeysByHand) {
  // Scores 0 and ln 3: weights 1/4 and 3/4; values 8 and 4; lse = ln 4.
  Fp64Call c({.seqlen_k = 2}, dense_pattern(1, 2));
  c.q.set(0, 1);
  c.k.set(0, 0);
  c.k.set(1, std::log(3));
  c.v.set(0, 8);
  c.v.set(1, 4);
  expect_near(c.run(), {5});
  EXPECT_NEAR(c.lse.get(0), std::log(4), 1e-15);
}

TEST(Reference, PyTorchDenseGrouped) {
  Fp64Call c(kSmall, dense_pattern(3, 5));
  expect_near(c.run(),
              {0.141614285868, 0.16876032691, 0.0206002095934, 0.0495621791156, -0.218666709911, -0.162692189147,
               0.143560277607, 0.16959089282, 0.0178155197608, 0.0477467089714, -0.21886639497, -0.162188114972});
}

TEST(Reference, PyTorchCausalBottomRight) {  // attn_mask = ones(3, 5).tril(2)
  Fp64Call c(kSmall, dense_pattern(3, 5));
  c.args.options.causal = true;
  const std::vector<double> expected{0.16099254941,   0.228245103833,  -0.000217913140352, 0.167735705878,
                                     0.499427021424,  0.0180743740967, 0.211280557906,     0.200973016674,
                                     0.0178155197608, 0.0477467089714, -0.21886639497,     -0.162188114972};
  expect_near(c.run(), expected);
  // The same by positions: queries from 102, keys from 100.
  c.args.options.q_offset = 102;
  c.args.options.k_offset = 100;
  expect_near(c.run(), expected);
}

TEST(Reference, PyTorchBiasAndNegativeScale) {  // attn_mask = sin(0.9 i + 0.2) [1, 2, 3, 5], scale = -0.5
  Fp64Call c(kSmall, dense_pattern(3, 5));
  const Numbers bias(DType::f64, {1, 2, 3, 5}, wave(30, 0.9, 0.2));
  c.args.options.attn_bias = bias.view;
  c.args.options.scale = -0.5;
  expect_near(c.run(),
              {-0.00303256026621, 0.0157670228347, 0.0821931571502, 0.110430059801, 0.00387720741909, 0.0333990973103,
               0.0424378328748, -0.0474110539467, -0.209902956431, 0.0250941293114, 0.0413441837295, 0.141552462108});
}

TEST(Reference, PyTorchBlocks) {  // boolean attn_mask of blocks (0,0) (1,0) (1,2) (2,1); the last are ragged
  const BlockPattern pattern = BlockPattern::from_csr({40, 40, 16, 16}, {0, 1, 3, 4}, {0, 0, 2, 1});
  Fp64Call c({.seqlen_q = 40, .seqlen_k = 40, .head_dim = 2}, pattern);
  expect_near(c.run(),
              {0.107151013352,  0.184192971235,  0.0584466871623,  0.180247582089,  0.0677736664309,  0.184492680031,
               0.106525071879,  0.130044893623,  0.136591804531,   0.11140811239,   0.182009170667,   0.0594427406619,
               0.180399795122,  0.0666082359567, 0.186470471554,   0.102187216836,  0.0279855823277,  0.0257735077615,
               0.0288820556735, 0.0435870664303, 0.0138119799314,  0.0335128122562, 0.0148781957973,  0.0481262427928,
               0.0207109322985, 0.02858831299,   0.0251432510171,  0.030061416629,  0.0427737366913,  0.0142888458147,
               0.0334038664996, 0.0148673645247, 0.0464107779956,  0.0484918472287, -0.0671592473236, -0.0693013131409,
               0.0646254918551, 0.038474588332,  0.00674246938075, -0.0999347231421});
}

TEST(Reference, SoftcapThenAlibiWithSinks) {
  // torch: s = 0.8 tanh(s / 0.8) - slope |q + 2 - k|, a column of sinks appended, softmax, column dropped.
  Fp64Call c(kSmall, dense_pattern(3, 5));
  const Numbers slopes(DType::f32, {2}, {0.25, 0.5});
  const std::vector<double> sink_values{0.3, -0.6};
  const Numbers sinks(DType::f32, {2}, sink_values);
  c.args.options.softcap = 0.8;
  c.args.options.alibi_slopes = slopes.view;
  c.args.options.sinks = sinks.view;
  // Sinks are fp32, the literals' fp64.
  constexpr double kTolerance = 1e-7;
  expect_near(c.run(),
              {0.0366955493816, 0.0456839834476, -0.0489343393585, 0.0663259220049, -0.0200093095314, -0.0875454611335,
               0.0356704473603, -0.0134779078064, -0.0521461418245, -0.0147902733098, -0.269124320104, -0.181738673235},
              kTolerance);
  expect_near(c.lse.values(),
              {1.71586557385, 1.82046800558, 1.54171098071, 1.37408191941, 1.11026145125, 1.46968556353}, kTolerance);
}

TEST(Reference, RowsWithoutKeys) {
  // 20 rows, causal with 3 keys at the end of the query range: rows 0 .. 16 see nothing.
  Fp64Call c({.seqlen_q = 20, .seqlen_k = 3, .head_dim = 2, .head_dim_v = 2}, dense_pattern(20, 3));
  c.args.options.causal = true;
  const float sink = 1;
  c.args.options.sinks = make_view(&sink, DType::f32, {1});
  const std::vector<double> out = c.run();
  for (int64_t q = 0; q < 20; ++q) {
    EXPECT_EQ(out[2 * q] == 0 && out[2 * q + 1] == 0, q < 17) << q;
    EXPECT_EQ(c.lse.get(q) == -kInfinity, q < 17) << q;
  }
}

TEST(Reference, MinusInfinityBiasIsNoKey) {
  Fp64Call c({.seqlen_q = 2, .seqlen_k = 3}, dense_pattern(2, 3));
  const Numbers bias(DType::f32, {1, 1, 2, 3}, {-kInfinity, 0, -kInfinity, -kInfinity, -kInfinity, -kInfinity});
  c.args.options.attn_bias = bias.view;
  const std::vector<double> out = c.run();
  EXPECT_DOUBLE_EQ(out[0], c.v.get(1));
  EXPECT_EQ(out[1], 0);
  EXPECT_EQ(c.lse.get(1), -kInfinity);
}

TEST(Reference, NanAndInfinityReachTheRowsThatSeeThem) {
  // Causal, 4 x 4: key 2 is NaN, so rows 2 and 3 are, as in PyTorch; value 1 infinite reaches rows 1 ..
  Fp64Call c({.seqlen_q = 4, .seqlen_k = 4}, dense_pattern(4, 4));
  c.args.options.causal = true;
  c.k.set(2, std::nan(""));
  std::vector<double> out = c.run();
  for (int q = 0; q < 4; ++q) EXPECT_EQ(std::isnan(out[q]), q >= 2) << q;
  c.k.set(2, kInfinity);
  c.q.set(2, 1);
  c.q.set(3, 1);
  out = c.run();
  for (int q = 0; q < 4; ++q) EXPECT_EQ(std::isnan(out[q]), q >= 2) << "+inf score, row " << q;
  c.k.set(2, 0);
  c.v.set(1, kInfinity);
  out = c.run();
  for (int q = 0; q < 4; ++q) EXPECT_EQ(std::isinf(out[q]), q >= 1) << q;
}

TEST(Reference, BoundGrowsWithLengthAndIsNotLoose) {
  // The bound of a 64-key row of unit numbers: above fp32's last bit, below a thousandth; for bf16 near its epsilon.
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Call c({.seqlen_q = 1, .seqlen_k = 64, .head_dim = 16, .head_dim_v = 4}, dtype, dense_pattern(1, 64), DType::f64);
    std::vector<float> out_bound(4), lse_bound(1);
    InlineExecutor executor;
    reference_forward(c.args, executor, out_bound.data(), lse_bound.data());
    for (const float b : out_bound) {
      EXPECT_GT(b, epsilon_of(dtype) * 0.01);
      EXPECT_LT(b, epsilon_of(dtype) * 400);
    }
    EXPECT_GT(lse_bound[0], 0x1p-24);
    EXPECT_LT(lse_bound[0], 1e-3);
  }
}

}  // namespace
}  // namespace tessera
