// The fp64 reference gradients against numbers that somebody else computed: by hand, and by PyTorch 2.13.0's autograd
// of F.scaled_dot_product_attention in float64. Sizes and inputs are those of attention_reference_test.cc; the loss is
// sum(out * sin(0.9 i + 0.3)); numbers are printed as [B, S, H, D].
#include <gtest/gtest.h>

#include "training_inputs.h"

namespace tessera {
namespace {

// dq, dk, dv of the reference, of a call whose dlse is 0 as in PyTorch.
void expect_gradients(Training& t, const std::vector<double>& dq, const std::vector<double>& dk,
                      const std::vector<double>& dv, double tolerance = 1e-11) {
  BackwardArgs args = t.backward_args();
  args.dlse = {};
  InlineExecutor executor;
  reference_backward(args, executor);
  const auto near = [&](const char* name, const Numbers& got, const std::vector<double>& want) {
    ASSERT_EQ(got.view.numel(), static_cast<int64_t>(want.size())) << name;
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(got.get(static_cast<int64_t>(i)), want[i], tolerance) << name << " " << i;
    }
  };
  near("dq", t.dq, dq);
  near("dk", t.dk, dk);
  near("dv", t.dv, dv);
}

const Shape kSmall{.batch = 1, .seqlen_q = 3, .seqlen_k = 5, .heads = 2, .kv_heads = 1, .head_dim = 3, .head_dim_v = 2};

TEST(GradientsOfPyTorch, DenseGrouped) {
  Training t(kSmall, dense_pattern(3, 5));
  expect_gradients(
      t,
      {0.0246680742809, 0.0719327868565, 0.112771957816, 0.0543866980475, 0.065170775726, 0.0701333421038,
       -0.149084040758, -0.108245208151, -0.0577371534808, -0.0284020959737, -0.0267890713695, -0.0227830588044,
       0.0784058325255, 0.101295844085, 0.115137399577, -0.0384916259075, -0.0369147992392, -0.0320404834964},
      {0.250783635855, 0.257923545113, 0.143757980938, -0.16667838824, -0.239523572633, -0.199717078157,
       0.0338373419927, 0.105239658347, 0.127146118965, 0.206965213642, 0.126491772306, -0.0134727260336,
       -0.324907803249, -0.250131403133, -0.057714295713},
      {0.286353730252, 0.698232044363, 0.369261548862, 0.588327606922, 0.305551088753, 0.204497304256, 0.083014957876,
       -0.328949204675, -0.0614490539319, -0.618847681666});
}

TEST(GradientsOfPyTorch, CausalBottomRight) {  // attn_mask = ones(3, 5).tril(2)
  Training t(kSmall, dense_pattern(3, 5));
  t.options().causal = true;
  expect_gradients(
      t,
      {-0.0334445681268, 0.0210890714472, 0.0737388870774, 0.0340201162637, 0.0708796321693, 0.101407681631,
       0.044192958498, 0.0361617710357, 0.0249003602657, -0.00297171934758, -0.00221394618495, -0.00125840780331,
       0.0784058325255, 0.101295844085, 0.115137399577, -0.0384916259075, -0.0369147992392, -0.0320404834964},
      {0.278791933417, 0.282548695113, 0.153418390552, -0.215302847068, -0.309343906103, -0.257895692466,
       -0.0261896849253, 0.0558324048278, 0.111595642185, 0.0481011003868, 0.00262948425829, -0.0440788194037,
       -0.0854005018113, -0.0316666780964, 0.0369604791327},
      {0.346076187964, 0.742185916796, 0.435266313663, 0.6129764957, 0.311131726461, 0.135033574529, -0.287150674808,
       -0.718182160983, 0.17740871853, -0.228753756843});
}

TEST(GradientsOfPyTorch, BiasAndNegativeScale) {  // attn_mask = sin(0.9 i + 0.2) [1, 2, 1, 5] expanded, scale = -0.5
  Training t(kSmall, dense_pattern(3, 5));
  t.give_attn_bias(1, 2, 1, 5);
  t.options().scale = -0.5;
  expect_gradients(
      t,
      {-0.0250696322001, -0.0137474667591, -0.00119728105594, -0.0837846197703, -0.0510243165474, -0.0137061630905,
       -0.0386424848516, 0.00183374979372, 0.0421461810314, 0.0266036274895, 0.00613194255836, -0.0148874905391,
       -0.01383130945, -0.0205228135625, -0.0253810758615, 0.0107864443638, 0.0171735360015, 0.0220265668152},
      {-0.305892031706, -0.274463010589, -0.113949746988, 0.359652518118, 0.359226955938, 0.189851343305,
       -0.0865444819117, -0.153645623524, -0.148484827615, -0.159765021076, 0.0344473314765, 0.212458565782,
       0.192549016576, 0.0344343466984, -0.139875334483},
      {0.0139073637568, -0.22255127866, 0.016611807296, -0.274602180018, 0.318995268213, 0.236573538586, 0.353142981626,
       0.478300205248, 0.280074850919, 0.325539784044});
  const std::vector<double> dbias{-0.117455484717,  0.0927095968076, 0.0916024348272,  0.148905750404, -0.215762297321,
                                  -0.0901995572311, 0.167815281031,  -0.0976275669396, 0.134687512191, -0.114675669052};
  for (int64_t i = 0; i < 10; ++i) EXPECT_NEAR(t.dattn_bias.get(i), dbias[i], 1e-11) << i;
}

TEST(GradientsOfPyTorch, SoftcapThenAlibiWithSinks) {  // the formula of attention_reference_test.cc
  Training t(kSmall, dense_pattern(3, 5));
  t.give_sinks();
  t.sinks.set(0, 0.3);
  t.sinks.set(1, -0.6);
  t.give_alibi(false);
  t.alibi.set(0, 0.25);
  t.alibi.set(1, 0.5);
  t.options().softcap = 0.8;
  constexpr double kFp32Sinks = 1e-7;  // the literals' sinks are fp64
  expect_gradients(
      t,
      {-0.0140950393433, -0.0121361261817, -0.00909312901284, -0.000739532922644, 0.00781015989547, 0.0156621943907,
       -0.0102206463462, 0.00234783214853, 0.0147065857898, 0.00535753066842, -0.0036262847244, -0.0122861749028,
       0.0692269532549, 0.0659644275868, 0.0568094960611, -0.0125269541788, -0.00661552080245, -0.000113142655497},
      {0.0940944971119, 0.0542516693814, -0.0111065661648, -0.0576777618547, -0.0765575861407, -0.0594311814194,
       0.0157670990664, 0.101333627409, 0.1392413674, 0.119400622131, 0.0373072437927, -0.0623323142435,
       -0.108890197085, -0.0436912040349, 0.0420564449667},
      {0.158244502565, 0.303085823405, 0.251019598679, 0.389972332022, 0.305471425744, 0.224983490897,
       0.000878670363671, -0.237342629181, 0.038739397058, -0.380363201376},
      kFp32Sinks);
  EXPECT_NEAR(t.dsinks.get(0), -0.0172580651706, kFp32Sinks);
  EXPECT_NEAR(t.dsinks.get(1), -0.00294954731749, kFp32Sinks);
}

TEST(GradientsOfPyTorch, Blocks) {  // boolean attn_mask of blocks (0,0) (1,0) (1,2) (2,1); the last are ragged
  Training t({.seqlen_q = 40, .seqlen_k = 40, .head_dim = 2},
             BlockPattern::from_csr({40, 40, 16, 16}, {0, 1, 3, 4}, {0, 0, 2, 1}));
  BackwardArgs args = t.backward_args();
  args.dlse = {};
  InlineExecutor executor;
  reference_backward(args, executor);
  const std::vector<double> weights = wave(80, 0.37, 0.2);
  double dq = 0, dk = 0;
  for (int64_t i = 0; i < 80; ++i) {
    dq += t.dq.get(i) * weights[i];
    dk += t.dk.get(i) * weights[i];
  }
  EXPECT_NEAR(dq, 0.336760755727, 1e-11);
  EXPECT_NEAR(dk, 0.0760743168635, 1e-11);
  const std::vector<double> dv{
      0.142805787592,    0.155100080969,   0.129515543788,    0.0992144711187,   0.0905140345247,  0.0994193428356,
      0.10355904004,     0.0910633655891,  0.0796483082965,   0.091208010487,    0.125886423691,   0.154561248938,
      0.144758706729,    0.111696965959,   0.0915512033946,   0.094258707749,    -0.119474981916,  -0.110368536316,
      -0.0642799045636,  -0.0232835529528, 0.000312374022287, 0.0103817750226,   0.00760767651546, -0.0064265874521,
      -0.0283928180967,  -0.0624964234392, -0.105796159048,   -0.121539077146,   -0.0876470373141, -0.0404111665788,
      -0.00891839502378, 0.00719373077727, -0.0139164263072,  -0.00707789945222, 0.0134024236966,  0.0440456478965,
      0.082434630686,    0.111784680151,   0.103665771955,    0.066861508604};
  for (int64_t i = 0; i < 40; ++i) EXPECT_NEAR(t.dv.get(i), dv[i], 1e-11) << i;
}

TEST(GradientsByHand, TwoKeys) {
  // Scores 0 and ln 3: weights 1/4 and 3/4; values 8 and 4, out 5. With dout = 1: dv = weights, dscores
  // 1/4 (8 - 5) = 3/4 and -3/4; dq = -3/4 ln 3, dk = dscores q.
  Training t({.seqlen_k = 2}, dense_pattern(1, 2));
  t.q.set(0, 1);
  t.k.set(0, 0);
  t.k.set(1, std::log(3));
  t.v.set(0, 8);
  t.v.set(1, 4);
  t.dout.set(0, 1);
  expect_gradients(t, {-0.75 * std::log(3)}, {0.75, -0.75}, {0.25, 0.75}, 1e-15);
}

}  // namespace
}  // namespace tessera
