// dilated_backward(): the formula of the joined softmax against finite differences of gather-attend-scatter-join, fp64
// against that formula, and every kernel against it as well (dilated_plain.h, which says what the cases are). Rows that
// no (w, r) reads are NaN, in dout, out and dlse too.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated_plain.h"

namespace tessera {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Inputs of a case and a forward call done; NaN wherever nothing reads. Gradients full of NaN.
struct Setting {
  const DilatedCase& c;
  LaidOut q, k, v, out, dout, dlse, dq, dk, dv;
  Numbers lse, bias, dbias;
  PlainResult truth;
  PlainGradients gradients;
  DilatedForwardArgs forward_args;
  DilatedBackwardArgs args;

  Setting(const DilatedCase& c, DType dtype, DType gradient_dtype, Layout layout, DType bias_dtype = DType::f32)
      : c(c),
        q(dtype, layout, c.batch, c.seqlen, c.heads, c.head_dim),
        k(dtype, layout, c.batch, c.seqlen, c.kv_heads, c.head_dim),
        v(dtype, layout, c.batch, c.seqlen, c.kv_heads, c.head_dim_v),
        out(dtype, layout, c.batch, c.seqlen, c.heads, c.head_dim_v),
        dout(dtype, layout, c.batch, c.seqlen, c.heads, c.head_dim_v),
        dlse(dtype == DType::f64 ? dtype : DType::f32, Layout::bhsd, c.batch, c.seqlen, c.heads, 1),
        dq(gradient_dtype, layout, c.batch, c.seqlen, c.heads, c.head_dim),
        dk(gradient_dtype, layout, c.batch, c.seqlen, c.kv_heads, c.head_dim),
        dv(gradient_dtype, layout, c.batch, c.seqlen, c.kv_heads, c.head_dim_v),
        lse(dlse.view.dtype, {c.batch, c.heads, c.seqlen}),
        bias(bias_dtype, {c.bias_sizes[0], c.bias_sizes[1], c.bias_sizes[2], c.bias_sizes[3]},
             {c.bias.begin(), c.bias.end()}),
        dbias(bias_dtype, {c.bias_sizes[0], c.bias_sizes[1], c.bias_sizes[2], c.bias_sizes[3]}),
        truth(filled(*this)),
        gradients(plain_dilated_gradients(c, truth, q.dense(), k.dense(), v.dense(), dout.dense(), dlse.dense())) {
    poison(q, truth.q_read);
    poison(k, truth.kv_read);
    poison(v, truth.kv_read);
    std::vector<char> sees(truth.q_read.size());  // a key
    for (size_t i = 0; i < sees.size(); ++i) sees[i] = !std::isinf(truth.lse.values[i]);
    poison(dout, sees);
    poison(dlse, sees);
    forward_args.q = q.view;
    forward_args.k = k.view;
    forward_args.v = v.view;
    forward_args.out = out.view;
    forward_args.lse = lse.view;
    forward_args.dilation = c.dilation();
    forward_args.options = c.options();
    if (!c.bias.empty()) forward_args.options.attn_bias = bias.view;
    args.q = q.view;
    args.k = k.view;
    args.v = v.view;
    args.out = out.view;
    args.lse = lse.view;
    args.dout = dout.view;
    args.dlse = make_view(static_cast<const void*>(dlse.memory.data()), dlse.view.dtype, {c.batch, c.heads, c.seqlen});
    args.dq = dq.view;
    args.dk = dk.view;
    args.dv = dv.view;
    if (!c.bias.empty()) args.dattn_bias = dbias.view;
    args.dilation = c.dilation();
    args.options = forward_args.options;
    clear();
  }
  Setting(const Setting&) = delete;

  void clear() {
    for (LaidOut* x : {&dq, &dk, &dv}) x->fill(kNan);
    for (int64_t i = 0; i < dbias.view.numel(); ++i) dbias.set(i, kNan);
  }
  void run_forward(Isa isa, Executor& executor) {
    forward_args.isa = args.isa = isa;
    dilated_forward(forward_args, executor);
    std::vector<char> covered = truth.q_read;
    poison(out, covered);
  }

  // "" or the first element that is further from the formula than rounding explains. `added`: what the gradients held.
  std::string wrong(double added = 0) const {
    const bool wide = args.q.dtype == DType::f64;
    const double u = wide ? 0x1p-53 : 0x1p-24, n = static_cast<double>(truth.most_keys);
    double largest_lse = 0;
    for (const double x : truth.lse.values) {
      if (!std::isinf(x)) largest_lse = std::max(largest_lse, std::abs(x));
    }
    // Errors of a weight exp(s - lse), of sums of at most S (w, r) H / Hkv terms (Higham, section 3.1), and in 16-bit
    // dtypes the roundings of weights, dscores and out.
    const double weight = std::expm1(u * ((static_cast<double>(c.head_dim) + 16) * truth.largest_score + 8 * c.softcap +
                                          16 + (n + 16) * (1 + largest_lse)));
    const double terms = static_cast<double>(c.seqlen) * static_cast<double>(c.segment_lengths.size()) *
                         static_cast<double>(c.heads) / static_cast<double>(c.kv_heads);
    const double relative = 3 * weight + u * (terms + 4 * static_cast<double>(c.head_dim_v) + 64) +
                            (wide || args.q.dtype == DType::f32 ? 0 : 3 * epsilon_of(args.q.dtype));
    const struct {
      const char* name;
      const LaidOut& got;
      const MutableTensorView& view;
      const Dense4 &want, &magnitude;
    } all[] = {{"dq", dq, args.dq, gradients.dq, gradients.dq_magnitude},
               {"dk", dk, args.dk, gradients.dk, gradients.dk_magnitude},
               {"dv", dv, args.dv, gradients.dv, gradients.dv_magnitude}};
    std::string text;
    for (const auto& x : all) {
      if (!x.view.defined()) continue;
      x.got.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        const double magnitude = x.magnitude.row(b, s, h)[d], want = x.want.row(b, s, h)[d] + added;
        const double got = x.got.get(b, s, h, d);
        const double underflow = x.view.dtype == DType::f16 && magnitude > 0 ? 0x1p-25 : 0;
        // What gets no gradient stays as it is.
        const double bound =
            magnitude == 0 ? 0 : relative * magnitude + epsilon_of(x.view.dtype) * std::abs(want) + underflow;
        if (text.empty() && !(std::abs(got - want) <= bound)) {
          text = fmt::format("{} of {}, {}, {}, {}: {}, not {} (bound {})", x.name, b, s, h, d, got, want, bound);
        }
      });
    }
    const double sums = relative + u * static_cast<double>(c.batch * c.heads) * terms;  // as many as share an element
    for (int64_t i = 0; args.dattn_bias.defined() && i < dbias.view.numel(); ++i) {
      const double want = gradients.dbias[i], got = dbias.get(i);
      const double bound = sums * gradients.dbias_magnitude[i] + epsilon_of(dbias.view.dtype) * std::abs(want);
      if (text.empty() && !(std::abs(got - want) <= bound)) {
        text = fmt::format("dattn_bias {}: {}, not {} (bound {})", i, got, want, bound);
      }
    }
    return text;
  }

 private:
  static PlainResult filled(Setting& s) {
    s.q.fill_wave(0.7, 0.1);
    s.k.fill_wave(0.3, 1.0);
    s.v.fill_wave(1.3, 0.5);
    s.dout.fill_wave(0.9, 0.2);
    s.dlse.fill_wave(0.4, 0.8);
    return plain_dilated(s.c, s.q.dense(), s.k.dense(), s.v.dense());
  }
  static void poison(LaidOut& x, const std::vector<char>& read) {
    x.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      if (!read[(b * x.view.sizes[1] + s) * x.view.sizes[2] + h]) x.set(b, s, h, d, kNan);
    });
  }
};

double loss(const DilatedCase& c, const Dense4& q, const Dense4& k, const Dense4& v, const Dense4& dout,
            const Dense4& dlse) {
  const PlainResult r = plain_dilated(c, q, k, v);
  double sum = 0;
  for (size_t i = 0; i < dout.values.size(); ++i) sum += r.out.values[i] * dout.values[i];
  for (size_t i = 0; i < dlse.values.size(); ++i) {
    if (!std::isinf(r.lse.values[i])) sum += r.lse.values[i] * dlse.values[i];
  }
  return sum;
}

// Central differences at a few elements of each input of each case, and along one direction through all elements.
// Their error is some h^2 = 1e-10 of third derivatives, and the rounding of the loss over h, 1e-9.
TEST(DilatedBackward, FormulaIsTheDerivative) {
  constexpr double h = 1e-5, tolerance = 1e-6;
  for (const DilatedCase& c : dilated_cases()) {
    LaidOut q(DType::f64, Layout::bshd, c.batch, c.seqlen, c.heads, c.head_dim);
    LaidOut k(DType::f64, Layout::bshd, c.batch, c.seqlen, c.kv_heads, c.head_dim);
    LaidOut v(DType::f64, Layout::bshd, c.batch, c.seqlen, c.kv_heads, c.head_dim_v);
    LaidOut dout(DType::f64, Layout::bshd, c.batch, c.seqlen, c.heads, c.head_dim_v);
    LaidOut dlse(DType::f64, Layout::bshd, c.batch, c.seqlen, c.heads, 1);
    double phase = 0;
    for (LaidOut* x : {&q, &k, &v, &dout, &dlse}) x->fill_wave(0.7 + 0.1 * phase, phase), ++phase;
    Dense4 in[] = {q.dense(), k.dense(), v.dense()};
    const Dense4 g = dout.dense(), l = dlse.dense();
    const PlainResult result = plain_dilated(c, in[0], in[1], in[2]);
    const PlainGradients gradients = plain_dilated_gradients(c, result, in[0], in[1], in[2], g, l);
    const Dense4* wants[] = {&gradients.dq, &gradients.dk, &gradients.dv};
    for (int t = 0; t < 3; ++t) {
      std::vector<double>& x = in[t].values;
      const std::vector<double> before = x;
      const auto difference = [&](const std::vector<double>& direction) {
        for (size_t i = 0; i < x.size(); ++i) x[i] = before[i] + h * direction[i];
        const double above = loss(c, in[0], in[1], in[2], g, l);
        for (size_t i = 0; i < x.size(); ++i) x[i] = before[i] - h * direction[i];
        const double below = loss(c, in[0], in[1], in[2], g, l);
        x = before;
        return (above - below) / (2 * h);
      };
      for (size_t n = 0; n < 3; ++n) {
        std::vector<double> direction(x.size(), 0);
        double want = 0;
        if (n == 0) {
          direction = wave(static_cast<int64_t>(x.size()), 2.1, 0.3);
        } else {
          direction[(n * 7919 + 13) % x.size()] = 1;
        }
        for (size_t i = 0; i < x.size(); ++i) want += direction[i] * wants[t]->values[i];
        EXPECT_NEAR(difference(direction), want, tolerance * (1 + std::abs(want)))
            << c.name << ", input " << t << ", direction " << n;
      }
    }
    if (c.bias.empty()) continue;
    DilatedCase above = c, below = c;  // biases are fp32: steps that it resolves
    double want = 0, norm = 0;
    const std::vector<double> direction = wave(static_cast<int64_t>(c.bias.size()), 2.1, 0.3);
    for (size_t i = 0; i < c.bias.size(); ++i) {
      above.bias[i] += static_cast<float>(0x1p-12 * direction[i]);
      below.bias[i] -= static_cast<float>(0x1p-12 * direction[i]);
      const double step = static_cast<double>(above.bias[i]) - below.bias[i];
      want += step * gradients.dbias[i] * 0x1p11;
      norm += std::abs(gradients.dbias[i]);
    }
    EXPECT_GT(norm, 1e-3);
    const double got = (loss(above, in[0], in[1], in[2], g, l) - loss(below, in[0], in[1], in[2], g, l)) * 0x1p11;
    EXPECT_NEAR(got, want, 10 * tolerance * (1 + std::abs(want))) << c.name << ", attn_bias";
  }
}

TEST(DilatedBackward, Fp64IsTheFormula) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f64, DType::f64, c.layout);
    setting.run_forward(Isa::automatic, executor);
    EXPECT_EQ(dilated_backward(setting.args, executor).isa, Isa::automatic);
    EXPECT_EQ(setting.wrong(), "") << c.name;
  }
}

TEST(DilatedBackward, KernelsAreTheFormula) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      Setting setting(c, dtype, DType::f32, c.layout);
      for (const Isa isa : usable_isas()) {
        setting.run_forward(isa, executor);
        setting.clear();
        EXPECT_EQ(dilated_backward(setting.args, executor).isa, isa);
        EXPECT_EQ(setting.wrong(), "") << c.name << " " << name_of(dtype) << " " << name_of(isa);
      }
    }
  }
}

// 16-bit gradients come from sums in fp32, rounded once; where there is one (w, r) of rate 1, straight from the kernel.
// In the layout that the other tests do not use.
TEST(DilatedBackward, GradientsInTheDtypeOfTheInputs) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::bf16, DType::bf16, c.layout == Layout::bshd ? Layout::bhsd : Layout::bshd);
    setting.run_forward(Isa::automatic, executor);
    dilated_backward(setting.args, executor);
    EXPECT_EQ(setting.wrong(), "") << c.name;
  }
}

TEST(DilatedBackward, Accumulates) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f32, DType::f32, c.layout);
    setting.run_forward(Isa::automatic, executor);
    for (LaidOut* x : {&setting.dq, &setting.dk, &setting.dv}) x->fill(0.5);
    setting.args.accumulate = true;
    dilated_backward(setting.args, executor);
    EXPECT_EQ(setting.wrong(0.5), "") << c.name;
  }
}

TEST(DilatedBackward, EachGradientAlone) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f32, DType::f32, c.layout);
    setting.run_forward(Isa::automatic, executor);
    const DilatedBackwardArgs all = setting.args;
    for (int wanted = 0; wanted < 4; ++wanted) {
      setting.args = all;
      if (wanted != 3) setting.args.dattn_bias = {};
      if (wanted != 0) setting.args.dq = {};
      if (wanted != 1) setting.args.dk = {};
      if (wanted != 2) setting.args.dv = {};
      setting.clear();
      dilated_backward(setting.args, executor);
      EXPECT_EQ(setting.wrong(), "") << c.name << ", gradient " << wanted;
    }
  }
}

// attn_bias in all its sizes, shared by batches, heads, queries or keys, so that parts of a (w, r) and several (w, r)
// add to one element; bias and gradient in another dtype than q as well. Segments that go as batches, one by one, and
// ragged.
TEST(DilatedBackward, AttnBiasOfEverySize) {
  InlineExecutor executor;
  DilatedCase c{.name = "bias",
                .batch = 2,
                .seqlen = 40,
                .heads = 6,
                .kv_heads = 2,
                .head_dim = 8,
                .head_dim_v = 8,
                .segment_lengths = {10, 16, 40},
                .dilation_rates = {1, 2, 4},
                .causal = true,
                .key_lengths = {40, 31},
                .dropout = {.p = 0.2, .seed = 3, .offset = 1}};
  for (int shape = 0; shape < 16; ++shape) {
    const auto size = [&](int bit, int64_t n) { return shape >> bit & 1 ? n : 1; };
    for (const int64_t batch : {1, 2, 7}) {  // 7: more batches than segments
      c.batch = batch;
      c.key_lengths.assign(batch, 31);
      const DilatedCase biased = c.with_bias({size(3, batch), size(2, c.heads), size(1, c.seqlen), size(0, c.seqlen)});
      for (const auto& [dtype, bias_dtype] : {std::pair{DType::f64, DType::f64},
                                              {DType::f64, DType::f32},
                                              {DType::f32, DType::bf16},
                                              {DType::bf16, DType::f32}}) {
        Setting setting(biased, dtype, dtype, batch == 1 ? Layout::bhsd : Layout::bshd, bias_dtype);
        setting.run_forward(Isa::automatic, executor);
        dilated_backward(setting.args, executor);
        EXPECT_EQ(setting.wrong(), "") << fmt::format("{}", fmt::join(biased.bias_sizes, ", "));
      }
    }
  }
}

TEST(DilatedBackward, BitsDoNotDependOnThreads) {
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::bf16, DType::bf16, c.layout);
    InlineExecutor one;
    setting.run_forward(Isa::automatic, one);
    dilated_backward(setting.args, one);
    const std::vector<char> dq = setting.dq.memory, dk = setting.dk.memory, dv = setting.dv.memory;
    const std::vector<char> dbias = setting.dbias.memory;
    for (const int threads : {2, 3}) {
      ThreadPool pool(threads);
      setting.clear();
      dilated_backward(setting.args, pool);
      EXPECT_TRUE(dq == setting.dq.memory && dk == setting.dk.memory && dv == setting.dv.memory &&
                  dbias == setting.dbias.memory)
          << c.name << ", " << threads << " threads";
    }
  }
}

// One (w, r) of rate 1 over the whole sequence is the ordinary call, bit for bit.
TEST(DilatedBackward, OneSegmentOfRateOneIsBackward) {
  InlineExecutor executor;
  DilatedCase c{.name = "whole",
                .batch = 2,
                .seqlen = 130,
                .heads = 4,
                .kv_heads = 2,
                .segment_lengths = {1000},
                .dilation_rates = {1},
                .causal = true,
                .dropout = {.p = 0.2, .seed = 5, .offset = 1}};
  Setting setting(c, DType::f32, DType::f32, Layout::bshd);
  setting.run_forward(Isa::automatic, executor);
  dilated_backward(setting.args, executor);
  const std::vector<char> dq = setting.dq.memory, dk = setting.dk.memory, dv = setting.dv.memory;
  setting.clear();
  PatternSpec spec;
  spec.seqlen_q = spec.seqlen_k = c.seqlen;
  spec.causal = true;
  BackwardArgs plain;
  plain.q = setting.args.q;
  plain.k = setting.args.k;
  plain.v = setting.args.v;
  plain.out = setting.args.out;
  plain.lse = setting.args.lse;
  plain.dout = setting.args.dout;
  plain.dlse = setting.args.dlse;
  plain.dq = setting.args.dq;
  plain.dk = setting.args.dk;
  plain.dv = setting.args.dv;
  plain.pattern = make_pattern(spec);
  plain.options = setting.args.options;
  backward(plain, executor);
  EXPECT_TRUE(dq == setting.dq.memory && dk == setting.dk.memory && dv == setting.dv.memory);
}

// fp32 gradients are summed in place; 16-bit ones have an fp32 buffer of their size (twice their bytes).
TEST(DilatedBackward, ScratchIsTheSumsOf16BitGradients) {
  InlineExecutor executor;
  DilatedCase c{.name = "memory",
                .seqlen = 128,
                .heads = 2,
                .kv_heads = 2,
                .segment_lengths = {64, 128},
                .dilation_rates = {1, 2}};
  size_t bytes[2];
  for (const bool wide : {false, true}) {
    Setting setting(c, DType::bf16, wide ? DType::f32 : DType::bf16, Layout::bshd);
    setting.run_forward(Isa::automatic, executor);
    bytes[wide] = dilated_backward(setting.args, executor).scratch_bytes;
  }
  EXPECT_EQ(bytes[0] - bytes[1], 3 * 128 * 2 * 16 * sizeof(float));
}

// What is not wanted costs no memory: sums of dq, of dk and dv, of dattn_bias.
TEST(DilatedBackward, ScratchIsOfWantedGradientsOnly) {
  InlineExecutor executor;
  const DilatedCase c = DilatedCase{
      .name = "memory",
      .seqlen = 128,
      .heads = 2,
      .kv_heads = 2,
      .segment_lengths = {64, 128},
      .dilation_rates = {1,
                         2}}.with_bias({1, 1, 128, 128});
  Setting setting(c, DType::bf16, DType::bf16, Layout::bshd);
  setting.run_forward(Isa::automatic, executor);
  const auto bytes = [&](bool dq, bool dkv, bool bias) {
    DilatedBackwardArgs args = setting.args;
    if (!dq) args.dq = {};
    if (!dkv) args.dk = args.dv = {};
    if (!bias) args.dattn_bias = {};
    return dilated_backward(args, executor).scratch_bytes;
  };
  const size_t gradient = 128 * 2 * 16 * sizeof(float), all = bytes(true, true, true);
  EXPECT_EQ(all - bytes(false, true, true), gradient);
  EXPECT_EQ(all - bytes(true, false, true), 2 * gradient);
  // Segments of 64: two of 64 x 64; those of 128: offsets 0 and 1, 64 x 64 each.
  EXPECT_GE(all - bytes(true, true, false), 2 * 64 * 64 * sizeof(float));  // and what its pass needs
}

// The oracle's gradient of attn_bias is the formula's, and its bounds hold for every kernel without being far off.
TEST(DilatedBackward, ReferenceBoundsTheGradientOfAttnBias) {
  InlineExecutor executor;
  for (const std::array<int64_t, 4>& sizes : {std::array<int64_t, 4>{2, 4, 60, 60}, {1, 1, 60, 60}, {1, 4, 1, 60}}) {
    const DilatedCase c = DilatedCase{.name = "bounds",
                                      .batch = 2,
                                      .seqlen = 60,
                                      .heads = 4,
                                      .kv_heads = 2,
                                      .segment_lengths = {20, 60},
                                      .dilation_rates = {1, 3},
                                      .causal = true}
                              .with_bias(sizes);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Setting setting(c, dtype, DType::f32, Layout::bshd);
      setting.run_forward(Isa::automatic, executor);
      Numbers exact(DType::f64, {sizes[0], sizes[1], sizes[2], sizes[3]});
      std::vector<float> bounds(c.bias.size());
      DilatedBackwardArgs args = setting.args;
      args.dq = args.dk = args.dv = {};
      args.dattn_bias = exact.view;
      reference_dilated_backward(args, executor, {.dattn_bias = bounds.data()});
      dilated_backward(setting.args, executor);
      double largest = 0, largest_bound = 0;
      for (size_t i = 0; i < bounds.size(); ++i) {
        const auto n = static_cast<int64_t>(i);
        EXPECT_NEAR(exact.get(n), setting.gradients.dbias[i], 1e-12);
        EXPECT_LE(std::abs(setting.dbias.get(n) - exact.get(n)), bounds[i] + epsilon_of(DType::f32));
        largest = std::max(largest, std::abs(exact.get(n)));
        largest_bound = std::max<double>(largest_bound, bounds[i]);
      }
      EXPECT_LT(largest_bound, largest * (dtype == DType::f32 ? 1e-2 : 1));
    }
  }
}

TEST(DilatedBackward, EmptyTensors) {
  InlineExecutor executor;
  for (const auto& [batch, seqlen, heads] : {std::array<int64_t, 3>{0, 8, 2}, {1, 0, 2}, {1, 8, 0}}) {
    LaidOut x(DType::f32, Layout::bshd, batch, seqlen, heads, 8), dq = x, dk = x, dv = x;
    for (LaidOut* g : {&dq, &dk, &dv}) g->view.data = g->memory.data();
    Numbers lse(DType::f32, {batch, heads, seqlen});
    const int64_t lengths[] = {4, 8}, rates[] = {1, 2};
    DilatedBackwardArgs args;
    args.q = args.k = args.v = args.out = args.dout = x.view;
    args.lse = lse.view;
    args.dq = dq.view;
    args.dk = dk.view;
    args.dv = dv.view;
    args.dilation = {lengths, rates};
    EXPECT_NO_THROW(dilated_backward(args, executor));
  }
}

TEST(DilatedBackward, RefusesWhatItCannotDo) {
  InlineExecutor executor;
  DilatedCase c{
      .name = "errors", .seqlen = 40, .heads = 2, .kv_heads = 2, .segment_lengths = {20, 40}, .dilation_rates = {1, 2}};
  Setting setting(c, DType::bf16, DType::bf16, Layout::bshd);
  setting.run_forward(Isa::automatic, executor);
  const auto argument = [&](auto change) {
    DilatedBackwardArgs args = setting.args;
    change(args);
    return error_argument([&] { dilated_backward(args, executor); });
  };
  const int64_t none[] = {0, 1};
  Numbers numbers(DType::f32, {2});
  EXPECT_EQ(argument([](auto&) {}), "");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.segment_lengths = {}; }), "segment_lengths");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.dilation_rates = none; }), "dilation_rates");
  EXPECT_EQ(argument([&](auto& a) { a.options.sinks = numbers.view; }), "sinks");
  EXPECT_EQ(argument([&](auto& a) { a.dattn_bias = numbers.view; }), "dattn_bias");  // of no attn_bias
  EXPECT_EQ(argument([&](auto& a) { a.k.sizes[1] = a.v.sizes[1] = 39; }), "k");
  EXPECT_EQ(argument([&](auto& a) { a.dout.sizes[1] = 39; }), "dout");
  EXPECT_EQ(argument([&](auto& a) { a.lse = {}; }), "lse");
  EXPECT_EQ(argument([&](auto& a) { a.dq.dtype = DType::f16; }), "dq");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.pattern = PatternSpec{.kind = PatternKind::random}; }), "density");
  EXPECT_NE(argument([&](auto& a) { a.accumulate = true; }), "");  // 16-bit gradients cannot be added to
}

}  // namespace
}  // namespace tessera
