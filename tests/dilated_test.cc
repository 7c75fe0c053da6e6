// dilated_forward() against gather-attend-scatter-join in fp64 (dilated_plain.h, which says what the cases are), in
// every dtype, on every ISA of this machine and in both layouts. Rows of q, k and v that no (w, r) reads are NaN.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <set>

#include <fmt/format.h>

#include "dilated_plain.h"

namespace tessera {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DType kDtypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

// Inputs of a case, with NaN wherever nothing reads; outputs full of NaN.
struct Setting {
  const DilatedCase& c;
  LaidOut q, k, v, out;
  Numbers lse;
  PlainResult truth;
  DilatedForwardArgs args;

  Setting(const DilatedCase& c, DType dtype, Layout layout)
      : c(c),
        q(dtype, layout, c.batch, c.seqlen, c.heads, c.head_dim),
        k(dtype, layout, c.batch, c.seqlen, c.kv_heads, c.head_dim),
        v(dtype, layout, c.batch, c.seqlen, c.kv_heads, c.head_dim_v),
        out(dtype, layout, c.batch, c.seqlen, c.heads, c.head_dim_v),
        lse(dtype == DType::f64 ? DType::f64 : DType::f32, {c.batch, c.heads, c.seqlen}),
        truth(filled(*this)) {
    poison(q, truth.q_read);
    poison(k, truth.kv_read);
    poison(v, truth.kv_read);
    clear();
    args.q = q.view;
    args.k = k.view;
    args.v = v.view;
    args.out = out.view;
    args.lse = lse.view;
    args.dilation = c.dilation();
    args.options = c.options();
  }
  Setting(const Setting&) = delete;

  void clear() {
    out.fill(kNan);
    for (int64_t i = 0; i < lse.view.numel(); ++i) lse.set(i, kNan);
  }

  // "" or the first element that is further from the truth than rounding explains (Higham, section 3.1: sums of n terms
  // lose n u; a weight exp(s) loses the absolute error of s).
  std::string wrong() const {
    const bool wide = args.q.dtype == DType::f64;
    const double u = wide ? 0x1p-53 : 0x1p-24, n = static_cast<double>(truth.most_keys);
    const double weight =
        std::expm1(u * ((static_cast<double>(c.head_dim) + 16) * truth.largest_score + 8 * c.softcap + 16));
    // Weights, partial results and the result itself are rounded to the dtype: half an epsilon each. Values are <= 1.
    const double relative = 2 * weight + (2 * n + 16) * u + 1.5 * epsilon_of(args.q.dtype);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t s = 0; s < c.seqlen; ++s) {
        for (int64_t h = 0; h < c.heads; ++h) {
          const double want_lse = *truth.lse.row(b, s, h), got_lse = lse.get((b * c.heads + h) * c.seqlen + s);
          const double lse_bound = weight + (n + 16) * u * (1 + std::abs(want_lse));
          if (!(got_lse == want_lse || std::abs(got_lse - want_lse) <= lse_bound)) {
            return fmt::format("lse of {}, {}, {}: {}, not {}", b, s, h, got_lse, want_lse);
          }
          for (int64_t d = 0; d < c.head_dim_v; ++d) {
            const double got = out.get(b, s, h, d), want = truth.out.row(b, s, h)[d];
            const bool empty = std::isinf(want_lse);
            if (empty ? got != 0 : !(std::abs(got - want) <= relative / (1 - c.dropout.p))) {
              return fmt::format("out of {}, {}, {}, {}: {}, not {} (bound {})", b, s, h, d, got, want, relative);
            }
          }
        }
      }
    }
    return "";
  }

 private:
  static PlainResult filled(Setting& s) {
    s.q.fill_wave(0.7, 0.1);
    s.k.fill_wave(0.3, 1.0);
    s.v.fill_wave(1.3, 0.5);
    return plain_dilated(s.c, s.q.dense(), s.k.dense(), s.v.dense());
  }
  static void poison(LaidOut& x, const std::vector<char>& read) {
    x.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      if (!read[(b * x.view.sizes[1] + s) * x.view.sizes[2] + h]) x.set(b, s, h, d, kNan);
    });
  }
};

TEST(Dilated, IsGatherAttendScatterJoin) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    for (const DType dtype : kDtypes) {
      Setting setting(c, dtype, c.layout);
      constexpr Isa kReference[] = {Isa::automatic};
      for (const Isa isa : dtype == DType::f64 ? kReference : usable_isas()) {
        setting.clear();
        setting.args.isa = isa;
        EXPECT_EQ(dilated_forward(setting.args, executor).isa, isa);
        EXPECT_EQ(setting.wrong(), "") << c.name << " " << name_of(dtype) << " " << name_of(isa);
      }
    }
  }
}

// The oracle agrees with gather-attend-scatter-join to fp64, and its bounds hold for every kernel. They are also worth
// something: no looser than 1000 fp32 roundings of the largest value, 1, and 8 of the dtype; a row taken wrongly is off
// by some tenths.
TEST(Dilated, ReferenceAndItsBounds) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      Setting setting(c, dtype, c.layout);
      Numbers out(DType::f64, {c.batch, c.seqlen, c.heads, c.head_dim_v});
      Numbers lse(DType::f64, {c.batch, c.heads, c.seqlen});
      std::vector<float> out_bound(out.view.numel(), -1), lse_bound(lse.view.numel(), -1);
      DilatedForwardArgs reference = setting.args;
      reference.out = out.view;
      reference.lse = lse.view;
      reference_dilated_forward(reference, executor, out_bound.data(), lse_bound.data());
      dilated_forward(setting.args, executor);
      std::string wrong, rounded;
      int64_t i = 0;
      setting.out.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        const double want = setting.truth.out.row(b, s, h)[d], got = setting.out.get(b, s, h, d), bound = out_bound[i];
        if (!(std::abs(out.get(i) - want) <= 1e-12)) wrong = fmt::format("{}: {}, not {}", i, out.get(i), want);
        const double largest = (1000 * 0x1p-24 + 8 * epsilon_of(dtype)) / (1 - c.dropout.p);
        if (!(std::abs(got - want) <= bound && bound <= largest)) {
          rounded = fmt::format("{}: {} for {}, bound {}", i, got, want, bound);
        }
        ++i;
      });
      for (int64_t n = 0; n < lse.view.numel(); ++n) {
        const int64_t b = n / c.seqlen / c.heads, h = n / c.seqlen % c.heads, s = n % c.seqlen;
        const double want = *setting.truth.lse.row(b, s, h), got = setting.lse.get(n);
        if (!(lse.get(n) == want || std::abs(lse.get(n) - want) <= 1e-12)) {
          wrong = fmt::format("lse {}: {}, not {}", n, lse.get(n), want);
        }
        if (!(got == want || (std::abs(got - want) <= lse_bound[n] && lse_bound[n] <= 1000 * 0x1p-24))) {
          rounded = fmt::format("lse {}: {} for {}, bound {}", n, got, want, lse_bound[n]);
        }
      }
      EXPECT_EQ(wrong, "") << c.name << " " << name_of(dtype);
      EXPECT_EQ(rounded, "") << c.name << " " << name_of(dtype);
    }
  }
}

TEST(Dilated, EveryCaseInTheOtherLayout) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f32, c.layout == Layout::bshd ? Layout::bhsd : Layout::bshd);
    dilated_forward(setting.args, executor);
    EXPECT_EQ(setting.wrong(), "") << c.name;
  }
}

// The cases hold what they are named for: some have uncovered rows, some rows that no query admits.
TEST(Dilated, CasesLeaveRowsUncovered) {
  int uncovered = 0, unread = 0;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f64, c.layout);
    uncovered += std::count(setting.truth.q_read.begin(), setting.truth.q_read.end(), 0) > 0;
    unread += std::count(setting.truth.kv_read.begin(), setting.truth.kv_read.end(), 0) > 0;
  }
  EXPECT_GE(uncovered, 5);
  EXPECT_GE(unread, 5);
}

TEST(Dilated, BitsDoNotDependOnThreads) {
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f32, c.layout);
    InlineExecutor one;
    dilated_forward(setting.args, one);
    const std::vector<char> out = setting.out.memory, lse = setting.lse.memory;
    for (const int threads : {2, 3}) {
      ThreadPool pool(threads);
      setting.clear();
      dilated_forward(setting.args, pool);
      EXPECT_TRUE(out == setting.out.memory && lse == setting.lse.memory) << c.name << ", " << threads << " threads";
    }
  }
}

TEST(Dilated, LseMayBeUndefined) {
  InlineExecutor executor;
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f32, c.layout);
    dilated_forward(setting.args, executor);
    const std::vector<char> out = setting.out.memory;
    setting.clear();
    setting.args.lse = {};
    dilated_forward(setting.args, executor);
    EXPECT_TRUE(out == setting.out.memory) << c.name;
  }
}

// One (w, r) of rate 1 over the whole sequence is the ordinary call, bit for bit, dropout included.
TEST(Dilated, OneSegmentOfRateOneIsForward) {
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
  Setting setting(c, DType::f32, Layout::bshd);
  dilated_forward(setting.args, executor);
  const std::vector<char> out = setting.out.memory, lse = setting.lse.memory;
  setting.clear();
  PatternSpec spec;
  spec.seqlen_q = spec.seqlen_k = c.seqlen;
  spec.causal = true;
  ForwardArgs plain;
  plain.q = setting.args.q;
  plain.k = setting.args.k;
  plain.v = setting.args.v;
  plain.out = setting.args.out;
  plain.lse = setting.args.lse;
  plain.pattern = make_pattern(spec);
  plain.options = setting.args.options;
  forward(plain, executor);
  EXPECT_TRUE(out == setting.out.memory && lse == setting.lse.memory);
}

// Each (w, r) draws its own dropout: with the same (w, r) twice and p > 0 the two differ, so out is not that of one.
TEST(Dilated, GroupsDropOnTheirOwn) {
  InlineExecutor executor;
  DilatedCase once{.name = "once",
                   .seqlen = 64,
                   .heads = 1,
                   .kv_heads = 1,
                   .segment_lengths = {64},
                   .dilation_rates = {1},
                   .dropout = {.p = 0.5, .seed = 1}};
  DilatedCase twice = once;
  twice.segment_lengths = {64, 64};
  twice.dilation_rates = {1, 1};
  Setting a(once, DType::f64, Layout::bshd), b(twice, DType::f64, Layout::bshd);
  dilated_forward(a.args, executor);
  dilated_forward(b.args, executor);
  double difference = 0;
  for (int64_t s = 0; s < 64; ++s) {
    difference = std::max(difference, std::abs(a.out.get(0, s, 0, 0) - b.out.get(0, s, 0, 0)));
  }
  EXPECT_GT(difference, 0.01);
}

TEST(Dilated, CountsPairs) {
  for (const DilatedCase& c : dilated_cases()) {
    Setting setting(c, DType::f64, c.layout);
    EXPECT_EQ(dilated_pairs(c.seqlen, setting.args.dilation, setting.args.options, c.batch, c.heads),
              setting.truth.pairs)
        << c.name;
  }
}

// The pattern over the sequence admits exactly the pairs that gather-attend-scatter-join meets.
TEST(Dilated, PatternOverTheSequence) {
  for (const DilatedCase& c : dilated_cases()) {
    if (c.window_left || !c.key_lengths.empty()) continue;  // no part of the pattern
    std::vector<char> met(c.heads * c.seqlen * c.seqlen);
    const Dense4 q(c.batch, c.seqlen, c.heads, c.head_dim), kv(c.batch, c.seqlen, c.kv_heads, c.head_dim);
    const Dense4 v(c.batch, c.seqlen, c.kv_heads, c.head_dim_v);
    plain_dilated(c, q, kv, v, [&](const PlainPair& p) { met[(p.h * c.seqlen + p.q) * c.seqlen + p.k] = 1; });
    const BlockPattern pattern = dilated_pattern(c.seqlen, c.dilation(), c.causal, c.heads, 32, 80);
    int64_t different = 0, admitted = 0;
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.seqlen; ++i) {
        for (int64_t j = 0; j < c.seqlen; ++j) {
          const bool kept = keeps(pattern.view(), h, i, j);
          admitted += kept;
          different += kept != (met[(h * c.seqlen + i) * c.seqlen + j] == 1);
        }
      }
    }
    EXPECT_EQ(different, 0) << c.name;
    EXPECT_GT(admitted, 0) << c.name;
  }
  const int64_t one[] = {1};
  EXPECT_EQ(error_argument([&] { dilated_pattern(32, {one, one, {}, {}}, false, 0, 16, 16); }), "heads");
  EXPECT_EQ(error_argument([&] { dilated_pattern(-1, {one, one, {}, {}}, false, 1, 16, 16); }), "seqlen_q");
}

// Shares and keys of single queries, which look at groups of rows and one period, against the pairs that are met. The
// cases have rates that share heads among offsets, overlapping segments, ragged ends and several periods.
TEST(Dilated, SharesOfTheSequenceCountEachPairOnce) {
  constexpr int kBlock = 16;
  int overlapping = 0, judged = 0;
  for (const DilatedCase& c : dilated_cases()) {
    if (c.window_left || !c.key_lengths.empty()) continue;  // no part of the pattern
    const Dilation dilation = c.dilation();
    if (dilation.make || (dilation.pattern && dilation.pattern->heads != 1)) {
      EXPECT_EQ(error_argument([&] { dilated_share(c.seqlen, dilation, c.causal, c.heads, kBlock); }),
                "dilation.pattern");
      continue;
    }
    std::vector<char> met(c.heads * c.seqlen * c.seqlen);
    std::set<std::array<int64_t, 3>> blocks;
    int64_t times = 0;
    const Dense4 q(c.batch, c.seqlen, c.heads, c.head_dim), kv(c.batch, c.seqlen, c.kv_heads, c.head_dim);
    const Dense4 v(c.batch, c.seqlen, c.kv_heads, c.head_dim_v);
    plain_dilated(c, q, kv, v, [&](const PlainPair& p) {
      if (p.b > 0) return;
      met[(p.h * c.seqlen + p.q) * c.seqlen + p.k] = 1;
      blocks.insert({p.h, p.q / kBlock, p.k / kBlock});
      ++times;
    });
    const int64_t pairs = std::count(met.begin(), met.end(), 1);
    const DilatedShare share = dilated_share(c.seqlen, dilation, c.causal, c.heads, kBlock);
    EXPECT_EQ(share.pairs, pairs) << c.name;
    EXPECT_EQ(share.blocks, static_cast<int64_t>(blocks.size())) << c.name;
    overlapping += times > pairs;
    ++judged;
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.seqlen; i += 7) {
        const std::vector<uint8_t> keys = dilated_keys(c.seqlen, dilation, c.causal, h, i);
        const auto first = met.begin() + (h * c.seqlen + i) * c.seqlen;
        EXPECT_TRUE(std::equal(keys.begin(), keys.end(), first)) << c.name << ", head " << h << ", query " << i;
      }
    }
  }
  EXPECT_GT(judged, 5);
  EXPECT_GT(overlapping, 1);
  const int64_t one[] = {1};
  const Dilation dilation{one, one, {}, {}};
  EXPECT_EQ(error_argument([&] { dilated_share(32, dilation, false, 1, 0); }), "block");
  EXPECT_EQ(error_argument([&] { dilated_keys(32, dilation, false, 0, 32); }), "query");
  EXPECT_EQ(error_argument([&] { dilated_keys(32, dilation, false, -1, 0); }), "head");
}

// Partials of the groups but one of rate 1, and lse: nothing else, whatever the length. S = 4096 is where scratch of
// the threads (some hundred kilobytes) no longer hides a copy of q, k or v (2 MiB each).
TEST(Dilated, ScratchIsPartialsOnly) {
  InlineExecutor executor;
  DilatedCase c{.name = "memory",
                .seqlen = 4096,
                .heads = 4,
                .kv_heads = 4,
                .head_dim = 32,
                .head_dim_v = 32,
                .segment_lengths = {64, 128, 256},
                .dilation_rates = {1, 2, 4}};
  const auto tensor = [&] { return LaidOut(DType::f32, Layout::bshd, 1, c.seqlen, c.heads, c.head_dim); };
  LaidOut q = tensor(), k = tensor(), v = tensor(), out = tensor();
  DilatedForwardArgs args;
  args.q = q.view;
  args.k = k.view;
  args.v = v.view;
  args.out = out.view;
  args.dilation = c.dilation();
  const size_t out_bytes = 4096 * 4 * 32 * 4, lse_bytes = 4096 * 4 * 4;
  const size_t partials = out_bytes * 3 / 4 + lse_bytes * 7 / 4;
  const ForwardInfo info = dilated_forward(args, executor);
  EXPECT_GE(info.scratch_bytes, partials);
  EXPECT_LE(info.scratch_bytes, partials + (512 << 10));
}

TEST(Dilated, EmptyTensors) {
  InlineExecutor executor;
  for (const auto& [batch, seqlen, heads] : {std::array<int64_t, 3>{0, 8, 2}, {1, 0, 2}, {1, 8, 0}}) {
    LaidOut x(DType::f32, Layout::bshd, batch, seqlen, heads, 8);
    LaidOut out(DType::f32, Layout::bshd, batch, seqlen, heads, 8);
    const int64_t lengths[] = {4, 8}, rates[] = {1, 2};
    DilatedForwardArgs args;
    args.q = args.k = args.v = x.view;
    args.out = out.view;
    args.dilation = {lengths, rates};
    EXPECT_NO_THROW(dilated_forward(args, executor));
  }
}

// q, k and v as views of stride 0 are longer than any memory; nothing of their length may be made on the way to saying
// what is wrong with such a call, or to counting its pairs.
TEST(Dilated, LongViewsCostNothing) {
  InlineExecutor executor;
  constexpr int64_t tokens = int64_t{1} << 38;
  const float row[8] = {};
  TensorView x = make_view(static_cast<const void*>(row), DType::f32, {1, tokens, 1, 8});
  x.strides = {0, 0, 0, 1};
  const int64_t lengths[] = {64}, rates[] = {2};
  DilatedForwardArgs args;
  args.q = args.k = args.v = x;
  args.out.rank = 4;
  args.out.sizes = {1, 5, 1, 8};
  args.dilation = {lengths, rates};
  EXPECT_EQ(error_argument([&] { dilated_forward(args, executor); }), "out");
  EXPECT_EQ(dilated_pairs(tokens, args.dilation, {}, 1, 1), tokens / 64 * 32 * 32);
  EXPECT_EQ(error_argument([&] { dilated_pairs(tokens, args.dilation, {}, 8, 1); }), "seqlen");
}

// A rate beyond the segment keeps its first row alone, however large: sums and products with it must not overflow.
TEST(Dilated, HugeRates) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kTokens = 50;
  InlineExecutor executor;
  const auto out = [&](int64_t rate) {
    Call c({.seqlen_q = kTokens, .seqlen_k = kTokens, .heads = 3, .kv_heads = 3, .head_dim = 8, .head_dim_v = 8},
           DType::f32, dense_pattern(kTokens, kTokens));
    DilatedForwardArgs args;
    args.q = c.args.q;
    args.k = c.args.k;
    args.v = c.args.v;
    args.out = c.args.out;
    args.lse = c.args.lse;
    const int64_t lengths[] = {16, kTokens}, rates[] = {rate, 1};
    args.dilation.segment_lengths = lengths;
    args.dilation.dilation_rates = rates;
    dilated_forward(args, executor);
    return c.out.values();
  };
  const std::vector<double> expected = out(16);
  for (const int64_t rate : {int64_t{17}, int64_t{1} << 40, kMost - kTokens, kMost - 3, kMost}) {
    EXPECT_EQ(out(rate), expected) << rate;
    const int64_t lengths[] = {16}, rates[] = {rate};
    Dilation dilation;
    dilation.segment_lengths = lengths;
    dilation.dilation_rates = rates;
    EXPECT_EQ(dilated_pairs(kTokens, dilation, {}, 1, 1), 4) << rate;
  }
}

TEST(Dilated, RefusesWhatItCannotDo) {
  InlineExecutor executor;
  DilatedCase c{
      .name = "errors", .seqlen = 40, .heads = 2, .kv_heads = 2, .segment_lengths = {20, 40}, .dilation_rates = {1, 2}};
  Setting setting(c, DType::f32, Layout::bshd);
  const auto argument = [&](auto change) {
    DilatedForwardArgs args = setting.args;
    change(args);
    return error_argument([&] { dilated_forward(args, executor); });
  };
  const int64_t none[] = {0, 1}, three[] = {1, 2, 3};
  Numbers numbers(DType::f32, {2});
  EXPECT_EQ(argument([](auto&) {}), "");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.segment_lengths = {}; }), "segment_lengths");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.segment_lengths = none; }), "segment_lengths");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.dilation_rates = none; }), "dilation_rates");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.dilation_rates = three; }), "dilation_rates");
  EXPECT_EQ(argument([&](auto& a) { a.options.q_offset = 0; }), "q_offset");
  EXPECT_EQ(argument([&](auto& a) { a.options.k_offset = 1; }), "k_offset");
  EXPECT_EQ(argument([&](auto& a) { a.options.align_to_key_lengths = true; }), "align_to_key_lengths");
  EXPECT_EQ(argument([&](auto& a) { a.options.sinks = numbers.view; }), "sinks");
  EXPECT_EQ(argument([&](auto& a) { a.options.block_bias = numbers.view; }), "block_bias");
  EXPECT_EQ(argument([&](auto& a) { a.options.softcap = -1; }), "softcap");
  EXPECT_EQ(argument([&](auto& a) { a.k.sizes[1] = a.v.sizes[1] = 39; }), "k");
  EXPECT_EQ(argument([&](auto& a) { a.v.sizes[1] = 39; }), "v");
  EXPECT_EQ(argument([&](auto& a) { a.q = {}; }), "q");
  EXPECT_EQ(argument([&](auto& a) { a.q.sizes[1] = a.k.sizes[1] = a.v.sizes[1] = -1; }), "q");
  EXPECT_EQ(argument([&](auto& a) { a.q.sizes[1] = a.k.sizes[1] = a.v.sizes[1] = int64_t{1} << 50; }), "q");
  EXPECT_EQ(argument([&](auto& a) { a.out.data = const_cast<void*>(a.q.data); }), "out");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.pattern = PatternSpec{.kind = PatternKind::random}; }), "density");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.pattern = PatternSpec{.heads = 3}; }), "pattern");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.make = [](const PatternSpec&) { return dense_pattern(20, 20); }; }), "");
  EXPECT_EQ(argument([&](auto& a) { a.dilation.make = [](const PatternSpec&) { return dense_pattern(19, 19); }; }),
            "pattern");
}

}  // namespace
}  // namespace tessera
