// KvCache against one pass over whole sequences. Lengths: pages of 16 that are full, just begun and one short of full;
// sequences of different lengths, chunks that begin inside a page; grouped heads. Truth: forward() on the whole, which
// tests elsewhere compare with fp64; both are within rounding of it, so they are within twice that of each other.
#include "tessera/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "tessera/error.h"
#include "tessera/pattern_combine.h"

namespace tessera {
namespace {

constexpr int64_t kBatch = 3, kHeads = 4, kKvHeads = 2, kDim = 24, kDimV = 16, kTokens = 100;
constexpr int kBlock = 16;

struct Tensor {
  std::vector<float> data;
  MutableTensorView view;
};

Tensor random_tensor(std::mt19937& random, std::initializer_list<int64_t> sizes) {
  Tensor t;
  int64_t n = 1;
  for (const int64_t s : sizes) n *= s;
  t.data.resize(static_cast<size_t>(n));
  std::normal_distribution<float> normal;
  for (float& x : t.data) x = normal(random);
  t.view = make_view(t.data.data(), DType::f32, sizes);
  return t;
}

// Rows [begin, end) of dimension 1, of all batches or of one.
template <class View>
View rows(View v, int64_t begin, int64_t end, int64_t b = -1) {
  v.sizes[1] = end - begin;
  const int64_t at = begin * v.strides[1] + std::max<int64_t>(b, 0) * v.strides[0];
  if (b >= 0) v.sizes[0] = 1;
  v.data = const_cast<float*>(static_cast<const float*>(v.data)) + at;
  return v;
}

struct Case {
  std::mt19937 random{7};
  Tensor q = random_tensor(random, {kBatch, kTokens, kHeads, kDim});
  Tensor k = random_tensor(random, {kBatch, kTokens, kKvHeads, kDim});
  Tensor v = random_tensor(random, {kBatch, kTokens, kKvHeads, kDimV});
  ThreadPool pool{2};

  // Of the first `tokens` of batch b, causal.
  Tensor whole(int64_t b, int64_t tokens, const BlockPattern& pattern, AttentionOptions options = {}) {
    Tensor out = random_tensor(random, {1, tokens, kHeads, kDimV});
    forward({.q = rows(q.view, 0, tokens, b),
             .k = rows(k.view, 0, tokens, b),
             .v = rows(v.view, 0, tokens, b),
             .pattern = pattern,
             .out = out.view,
             .options = options},
            pool);
    return out;
  }
};

// Row `token` of two outputs of one head dimension.
void expect_row(const Tensor& got, int64_t b, int64_t row, const Tensor& want, int64_t token) {
  for (int64_t i = 0; i < kHeads * kDimV; ++i) {
    const float x = got.data[static_cast<size_t>((b * got.view.sizes[1] + row) * kHeads * kDimV + i)];
    const float y = want.data[static_cast<size_t>(token * kHeads * kDimV + i)];
    // 100 keys of normal numbers: their sums are off by 100 epsilon at most, twice.
    ASSERT_NEAR(x, y, 1e-5) << "sequence " << b << " token " << token << " element " << i;
  }
}

PatternSpec spec_of(PatternKind kind) {
  PatternSpec s{.kind = kind, .seqlen_q = kTokens, .seqlen_k = kTokens, .block_q = 32, .block_k = kBlock};
  s.causal = true;
  const auto is = [&](PatternKind x) { return kind == x; };
  if (is(PatternKind::dilated_segments)) {
    s.segment_lengths = {32, 64};
    s.dilation_rates = {1, 2};
  } else if (is(PatternKind::hierarchical)) {
    s.density = 0.4, s.ranks = 3, s.ranks_per_node = 2;
  } else if (!is(PatternKind::dense) && !is(PatternKind::causal)) {
    s.density = 0.4;
  }
  if (is(PatternKind::random) || is(PatternKind::bigbird) || is(PatternKind::dilated_segments)) s.heads = kHeads;
  return s;
}

class KvCacheKinds : public ::testing::TestWithParam<PatternKind> {};

// Prompts of different lengths, then token by token, then a chunk: each token as in one pass, by the pattern of the
// whole and by its name.
TEST_P(KvCacheKinds, StepsAreRowsOfTheWhole) {
  Case c;
  PatternSpec spec = spec_of(GetParam());
  const BlockPattern pattern = make_pattern(spec);
  std::vector<Tensor> want;
  for (int64_t b = 0; b < kBatch; ++b) want.push_back(c.whole(b, kTokens, pattern));
  spec.seqlen_total = kTokens;
  for (const bool by_name : {false, true}) {
    KvCache cache(kBatch, kKvHeads, kDim, kDimV, DType::f32, kBlock);
    const auto step = [&](std::span<const int64_t> added) {  // the next tokens of each sequence
      const int64_t most = *std::max_element(added.begin(), added.end());
      Tensor q = random_tensor(c.random, {kBatch, most, kHeads, kDim}),
             out = random_tensor(c.random, {kBatch, most, kHeads, kDimV});
      Tensor k = random_tensor(c.random, {kBatch, most, kKvHeads, kDim}),
             v = random_tensor(c.random, {kBatch, most, kKvHeads, kDimV});
      const std::vector<int64_t> before(cache.lengths().begin(), cache.lengths().end());
      for (int64_t b = 0; b < kBatch; ++b) {
        for (int64_t i = 0; i < added[b]; ++i) {
          const int64_t token = before[b] + i, last = most - added[b] + i;  // q ends with the newest token
          std::copy_n(&c.k.data[(b * kTokens + token) * kKvHeads * kDim], kKvHeads * kDim,
                      &k.data[(b * most + i) * kKvHeads * kDim]);
          std::copy_n(&c.v.data[(b * kTokens + token) * kKvHeads * kDimV], kKvHeads * kDimV,
                      &v.data[(b * most + i) * kKvHeads * kDimV]);
          std::copy_n(&c.q.data[(b * kTokens + token) * kHeads * kDim], kHeads * kDim,
                      &q.data[(b * most + last) * kHeads * kDim]);
        }
      }
      cache.append(k.view, v.view, added, c.pool);
      CacheAttendArgs args{.q = q.view, .out = out.view};
      if (by_name) args.spec = spec;
      else args.pattern = pattern;
      cache.attend(args, c.pool);
      for (int64_t b = 0; b < kBatch; ++b) {
        ASSERT_EQ(cache.lengths()[b], before[b] + added[b]);
        for (int64_t i = 0; i < added[b]; ++i) expect_row(out, b, most - added[b] + i, want[b], before[b] + i);
      }
    };
    step(std::vector<int64_t>{5, 32, 47});
    for (int n = 0; n < 20; ++n) step(std::vector<int64_t>{1, 1, 1});
    step(std::vector<int64_t>{17, 0, 30});
    step(std::vector<int64_t>{1, 48, 1});
  }
}

INSTANTIATE_TEST_SUITE_P(All, KvCacheKinds, ::testing::ValuesIn(all_pattern_kinds().begin(), all_pattern_kinds().end()),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(KvCache, DenseOptionsAndLse) {
  Case c;
  std::vector<float> slopes(kBatch * kHeads), sinks{0.3f, -1, 2, 0};
  for (size_t i = 0; i < slopes.size(); ++i) slopes[i] = 0.01f * static_cast<float>(i);
  KvCache cache(kBatch, kKvHeads, kDim, kDimV, DType::f32, kBlock);
  cache.append(c.k.view, c.v.view, {}, c.pool);
  Tensor out = random_tensor(c.random, {kBatch, 3, kHeads, kDimV}), lse = random_tensor(c.random, {kBatch, kHeads, 3});
  CacheAttendArgs args{.q = rows(c.q.view, kTokens - 3, kTokens), .out = out.view, .lse = lse.view};
  args.options.scale = 0.3;
  args.options.window_left = 40;
  args.options.softcap = 5;
  args.options.alibi_slopes = make_view(static_cast<const void*>(slopes.data()), DType::f32, {kBatch, kHeads});
  args.options.sinks = make_view(static_cast<const void*>(sinks.data()), DType::f32, {kHeads});
  cache.attend(args, c.pool);
  const BlockPattern dense = make_pattern(
      {.kind = PatternKind::causal, .seqlen_q = kTokens, .seqlen_k = kTokens, .block_q = 32, .block_k = 32});
  for (int64_t b = 0; b < kBatch; ++b) {
    AttentionOptions o = args.options;
    o.alibi_slopes = make_view(static_cast<const void*>(slopes.data() + b * kHeads), DType::f32, {kHeads});
    const Tensor want = c.whole(b, kTokens, dense, o);
    for (int64_t i = 0; i < 3; ++i) expect_row(out, b, i, want, kTokens - 3 + i);
  }
  for (const float x : lse.data) EXPECT_TRUE(std::isfinite(x));
  // The same on one thread, bit by bit.
  const std::vector<float> first = out.data;
  InlineExecutor one;
  cache.attend(args, one);
  EXPECT_EQ(out.data, first);
}

// Rows before the beginning of a sequence see nothing.
TEST(KvCache, QueriesBeforeTheBeginningAreEmpty) {
  Case c;
  KvCache cache(kBatch, kKvHeads, kDim, kDimV, DType::f32, kBlock);
  const std::vector<int64_t> lengths{0, 2, 5};
  cache.append(rows(c.k.view, 0, 5), rows(c.v.view, 0, 5), lengths, c.pool);
  Tensor out = random_tensor(c.random, {kBatch, 4, kHeads, kDimV}), lse = random_tensor(c.random, {kBatch, kHeads, 4});
  cache.attend({.q = rows(c.q.view, 0, 4), .out = out.view, .lse = lse.view}, c.pool);
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t i = 0; i < 4; ++i) {
      const bool empty = i < 4 - lengths[b];
      for (int64_t n = 0; n < kHeads * kDimV && empty; ++n) EXPECT_EQ(out.data[(b * 4 + i) * kHeads * kDimV + n], 0);
      for (int64_t h = 0; h < kHeads; ++h) EXPECT_EQ(std::isinf(lse.data[(b * kHeads + h) * 4 + i]), empty);
    }
  }
}

// Beams: pages are shared until somebody writes, and whoever does leaves the others' tokens alone.
TEST(KvCache, ReorderSharesAndTruncateTakesBack) {
  Case c;
  KvCache cache(kBatch, kKvHeads, kDim, kDimV, DType::f32, kBlock);
  const auto tokens = [&](int64_t begin, int64_t end) {
    cache.append(rows(c.k.view, begin, end), rows(c.v.view, begin, end), {}, c.pool);
  };
  tokens(0, 40);
  const size_t bytes = cache.nbytes();
  const std::vector<int64_t> index{2, 2, 0, 2};
  cache.reorder(index);
  ASSERT_EQ(cache.batch(), 4);
  EXPECT_LE(cache.nbytes(), bytes + 1024);
  cache.reorder(std::vector<int64_t>{0, 1, 2});
  EXPECT_EQ(cache.pages(0)[2], cache.pages(1)[2]);
  tokens(40, 41);  // sequence b gets the token of batch b
  EXPECT_NE(cache.pages(0)[2], cache.pages(1)[2]);
  EXPECT_EQ(cache.pages(0)[1], cache.pages(1)[1]);
  const int64_t from[] = {2, 2, 0};
  const auto expect_steps = [&](int64_t length) {
    Tensor out = random_tensor(c.random, {kBatch, 1, kHeads, kDimV});
    cache.attend({.q = rows(c.q.view, 50, 51), .out = out.view}, c.pool);
    for (int64_t b = 0; b < kBatch; ++b) {
      // The same tokens laid side by side.
      Tensor k = random_tensor(c.random, {1, length, kKvHeads, kDim}),
             v = random_tensor(c.random, {1, length, kKvHeads, kDimV});
      for (int64_t t = 0; t < length; ++t) {
        const int64_t batch = t < 40 ? from[b] : b;
        std::copy_n(&c.k.data[(batch * kTokens + t) * kKvHeads * kDim], kKvHeads * kDim, &k.data[t * kKvHeads * kDim]);
        std::copy_n(&c.v.data[(batch * kTokens + t) * kKvHeads * kDimV], kKvHeads * kDimV,
                    &v.data[t * kKvHeads * kDimV]);
      }
      Tensor want = random_tensor(c.random, {1, 1, kHeads, kDimV});
      const BlockPattern all = make_pattern({.seqlen_q = 1, .seqlen_k = length});
      forward({.q = rows(c.q.view, 50, 51, b), .k = k.view, .v = v.view, .pattern = all, .out = want.view}, c.pool);
      expect_row(out, b, 0, want, 0);
      // Summaries of what is left, computed anew.
      const KvCache::Summaries s = cache.summaries(b);
      ASSERT_EQ(s.blocks, (length + kBlock - 1) / kBlock);
      for (int64_t j = 0; j < s.blocks; ++j) {
        for (int64_t n = 0; n < kKvHeads * kDim; ++n) {
          double sum = 0;
          float low = INFINITY, high = -INFINITY;
          const int64_t end = std::min(length, (j + 1) * kBlock);
          for (int64_t t = j * kBlock; t < end; ++t) {
            const float x = k.data[t * kKvHeads * kDim + n];
            sum += x, low = std::min(low, x), high = std::max(high, x);
          }
          const size_t at = static_cast<size_t>(j * kKvHeads * kDim + n);
          ASSERT_EQ(s.min[at], low);
          ASSERT_EQ(s.max[at], high);
          ASSERT_NEAR(s.mean[at], sum / static_cast<double>(end - j * kBlock), 16 * 4 * 0x1p-24);
        }
      }
    }
  };
  expect_steps(41);
  cache.truncate(std::vector<int64_t>{36, 36, 36});  // inside pages that 0 and 1 share no longer
  expect_steps(36);
  cache.truncate(std::vector<int64_t>{20, 20, 20});  // inside a page that they share
  expect_steps(20);
  tokens(20, 21);
  EXPECT_NE(cache.pages(0)[1], cache.pages(1)[1]);
  EXPECT_EQ(cache.pages(0)[0], cache.pages(1)[0]);
}

TEST(KvCache, MemoryIsThatOfTheTokens) {
  InlineExecutor one;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    KvCache cache(2, 2, 64, 64, dtype);
    std::vector<float> zeros(2 * 37 * 2 * 64);
    const TensorView k = make_view(static_cast<const void*>(zeros.data()), dtype, {2, 37, 2, 64});
    int64_t tokens = 0;
    while (tokens < 20000) {
      cache.append(k, k, {}, one);
      tokens += 37;
    }
    const double own = 2.0 * static_cast<double>(tokens) * 2 * 2 * 64 * static_cast<double>(size_of(dtype));
    const double blocks = 2.0 * 64 * 2 * 2 * 64 * static_cast<double>(size_of(dtype));  // one a sequence
    EXPECT_LE(static_cast<double>(cache.nbytes()), 1.05 * own + blocks) << name_of(dtype);
  }
}

TEST(KvCache, MistakesAreNamed) {
  Case c;
  const auto argument = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("allowed"), std::string::npos);
      return e.argument();
    }
    return "";
  };
  EXPECT_EQ(argument([] { KvCache(-1, 1, 8, 8, DType::f32); }), "batch");
  EXPECT_EQ(argument([] { KvCache(1, 0, 8, 8, DType::f32); }), "kv_heads");
  EXPECT_EQ(argument([] { KvCache(1, 1, 0, 8, DType::f32); }), "head_dim");
  EXPECT_EQ(argument([] { KvCache(1, 1, 8, 1 << 20, DType::f32); }), "head_dim_v");
  EXPECT_EQ(argument([] { KvCache(1, 1, 8, 8, DType::i32); }), "dtype");
  EXPECT_EQ(argument([] { KvCache(1, 1, 8, 8, DType::f32, 24); }), "block");

  KvCache cache(kBatch, kKvHeads, kDim, kDimV, DType::f32, kBlock);
  const auto append = [&](TensorView k, TensorView v, std::vector<int64_t> lengths = {}) {
    return argument([&] { cache.append(k, v, lengths, c.pool); });
  };
  const TensorView k = c.k.view, v = c.v.view;
  EXPECT_EQ(append(v, v), "k");
  EXPECT_EQ(append(k, k), "v");
  EXPECT_EQ(append(rows(k, 0, 3), v), "v");
  EXPECT_EQ(append(rows(k, 0, 3, 1), v), "k");
  EXPECT_EQ(append(k, v, {1, 2}), "lengths");
  EXPECT_EQ(append(k, v, {1, 2, kTokens + 1}), "lengths");
  EXPECT_EQ(append(k, v, {1, 2, -1}), "lengths");
  EXPECT_EQ(cache.lengths()[0], 0);  // nothing has changed
  EXPECT_EQ(append(k, v, {10, 50, 100}), "");

  Tensor out = random_tensor(c.random, {kBatch, 1, kHeads, kDimV});
  const auto attend = [&](auto&& change) {
    CacheAttendArgs args{.q = rows(TensorView(c.q.view), 0, 1), .out = out.view};
    change(args);
    return argument([&] { cache.attend(args, c.pool); });
  };
  EXPECT_EQ(attend([](CacheAttendArgs&) {}), "");
  EXPECT_EQ(attend([&](CacheAttendArgs& a) { a.q = k; }), "out");
  EXPECT_EQ(attend([](CacheAttendArgs& a) { a.q.sizes[3] = 8; }), "q");
  EXPECT_EQ(attend([](CacheAttendArgs& a) { a.q.sizes[0] = 1; }), "q");
  EXPECT_EQ(attend([](CacheAttendArgs& a) { a.options.q_offset = 3; }), "q_offset");
  EXPECT_EQ(attend([](CacheAttendArgs& a) { a.options.causal = false; }), "causal");
  EXPECT_EQ(attend([](CacheAttendArgs& a) { a.options.dropout.p = 0.5; }), "dropout");
  const BlockPattern short_one = make_pattern({.seqlen_q = 64, .seqlen_k = 64, .block_k = kBlock});
  EXPECT_EQ(attend([&](CacheAttendArgs& a) { a.pattern = short_one; }), "pattern");
  EXPECT_EQ(attend([&](CacheAttendArgs& a) { a.pattern = make_pattern({.seqlen_q = 128, .seqlen_k = 128}); }),
            "pattern");
  EXPECT_EQ(attend([&](CacheAttendArgs& a) { a.spec = PatternSpec{.block_k = 64}; }), "spec");
  EXPECT_EQ(attend([&](CacheAttendArgs& a) { a.spec = PatternSpec{.kind = PatternKind::random, .block_k = kBlock}; }),
            "density");
  EXPECT_EQ(argument([&] { cache.truncate(std::vector<int64_t>{0, 51, 0}); }), "lengths");
  EXPECT_EQ(argument([&] { cache.truncate(std::vector<int64_t>{0}); }), "lengths");
  EXPECT_EQ(argument([&] { cache.reorder(std::vector<int64_t>{0, 3}); }), "index");
  EXPECT_EQ(argument([&] { cache.summaries(3); }), "b");
}

}  // namespace
}  // namespace tessera
