// quality() and attention_mass() against a naive fp64 computation that holds the whole score matrix, for every option
// that changes the true attention, every dtype, both layouts and grouped heads. Sizes: two to five blocks with ragged
// ends, block_q != block_k, more rows than one register tile and remainders of every kind, so that empty, full and
// partial tiles, bitmaps and empty pattern rows all occur.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "call/problem.h"
#include "gtest/gtest.h"
#include "tessera/analysis.h"
#include "tessera/error.h"

namespace tessera {
namespace {

struct Sizes {
  int64_t batch = 2, heads = 4, kv_heads = 2, seqlen_q = 75, seqlen_k = 90, head_dim = 24, head_dim_v = 20;
};

// A tensor with its memory.
struct Data {
  std::vector<char> bytes;
  TensorView view;

  double at(int64_t b, int64_t s, int64_t h, int64_t d) const {
    const auto& t = view.strides;
    return load_as_double(view.data, view.dtype, b * t[0] + s * t[1] + h * t[2] + d * t[3]);
  }
};

Data random_data(std::mt19937& random, DType dtype, Layout layout, int64_t b, int64_t s, int64_t h, int64_t d) {
  Data data;
  data.bytes.resize(static_cast<size_t>(b * s * h * d) * size_of(dtype));
  std::normal_distribution<double> normal(0, 1.5);
  for (int64_t i = 0; i < b * s * h * d; ++i) store_from_double(data.bytes.data(), dtype, i, normal(random));
  data.view = attention_view(static_cast<const void*>(data.bytes.data()), dtype, layout, b, s, h, d);
  return data;
}

// Keeps about `share` of the blocks, leaves row 1 empty and, if asked, gives every third kept block a random bitmap.
BlockPattern random_pattern(std::mt19937& random, PatternShape shape, double share, bool bitmaps) {
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, bitmap_index;
  std::vector<uint64_t> words;
  int32_t made = 0;
  for (int64_t r = 0; r < shape.total_rows(); ++r) {
    for (int64_t c = 0; c < shape.cols(); ++c) {
      if (r % shape.rows() == 1 || random() % 1000 >= share * 1000) continue;
      indices.push_back(static_cast<int32_t>(c));
      if (!bitmaps) continue;
      const bool partial = indices.size() % 3 == 0;
      bitmap_index.push_back(partial ? made++ : -1);
      if (!partial) continue;
      const int per_row = shape.bitmap_words();
      for (int w = 0; w < shape.block_q * per_row; ++w) {
        const int bits = shape.block_k - w % per_row * 64;
        const uint64_t word = (uint64_t{random()} << 32) | random();
        words.push_back(bits >= 64 ? word : word & ((uint64_t{1} << bits) - 1));
      }
    }
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  return BlockPattern::from_csr(shape, indptr, indices, bitmap_index, words);
}

struct Case {
  Data q, k, v;
  AnalysisInput input;
  Sizes sizes;
};

void make_case(Case& c, unsigned seed, DType dtype = DType::f32, Layout layout = Layout::bshd) {
  std::mt19937 random(seed);
  const Sizes& s = c.sizes;
  c.q = random_data(random, dtype, layout, s.batch, s.seqlen_q, s.heads, s.head_dim);
  c.k = random_data(random, dtype, layout, s.batch, s.seqlen_k, s.kv_heads, s.head_dim);
  c.v = random_data(random, dtype, layout, s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v);
  c.input.q = c.q.view, c.input.k = c.k.view, c.input.v = c.v.view;
}

// The true attention of one head, whole: scores and weights [Sq][Sk], -inf where not admitted.
struct Truth {
  std::vector<std::vector<double>> scores, weights;
  std::vector<double> max, sum;  // [Sq]
  double score_error = 0;        // bound on the fp32 error of a score
};

Truth truth_of(const Case& c, int64_t b, int64_t h) {
  const Sizes& s = c.sizes;
  const AttentionOptions& o = c.input.options;
  const double scale = o.scale.value_or(1 / std::sqrt(static_cast<double>(s.head_dim)));
  const int64_t keys = o.key_lengths.empty() ? s.seqlen_k : o.key_lengths[b];
  const int64_t diagonal = o.q_offset.value_or((o.align_to_key_lengths ? keys : s.seqlen_k) - s.seqlen_q) - o.k_offset;
  Truth t;
  for (int64_t q = 0; q < s.seqlen_q; ++q) {
    std::vector<double> row(s.seqlen_k, -std::numeric_limits<double>::infinity());
    for (int64_t k = 0; k < keys; ++k) {
      const int64_t distance = q - k + diagonal;
      if (o.causal.value_or(false) && distance < 0) continue;
      if (o.window_left && distance > *o.window_left) continue;
      if (o.window_right && -distance > *o.window_right) continue;
      double dot = 0, magnitude = 0;
      for (int64_t d = 0; d < s.head_dim; ++d) {
        const double product = c.q.at(b, q, h, d) * c.k.at(b, k, h / (s.heads / s.kv_heads), d);
        dot += product;
        magnitude += std::abs(product);
      }
      double x = dot * scale;
      double error = std::abs(scale) * magnitude * static_cast<double>(s.head_dim + 2);
      if (o.softcap > 0) x = o.softcap * std::tanh(x / o.softcap);
      if (o.alibi_slopes.defined()) {
        const double slope = static_cast<const float*>(o.alibi_slopes.data)[h];
        x -= slope * static_cast<double>(std::abs(distance));
      }
      if (o.attn_bias.defined()) {
        const auto& strides = o.attn_bias.strides;
        x += load_as_double(o.attn_bias.data, o.attn_bias.dtype, h * strides[1] + q * strides[2] + k * strides[3]);
      }
      if (std::isfinite(x)) error += 2 * std::abs(x);
      t.score_error = std::max(t.score_error, error * epsilon_of(DType::f32));
      row[k] = x;
    }
    const double max = *std::max_element(row.begin(), row.end());
    std::vector<double> weight(s.seqlen_k, 0.0);
    double sum = 0;
    for (int64_t k = 0; k < s.seqlen_k; ++k) {
      if (std::isfinite(row[k])) sum += weight[k] = std::exp(row[k] - max);
    }
    if (sum > 0) {
      for (double& w : weight) w /= sum;
    }
    t.scores.push_back(row);
    t.weights.push_back(weight);
    t.max.push_back(max);
    t.sum.push_back(sum);
  }
  return t;
}

bool admits(const Truth& t, int64_t q, int64_t k) { return t.scores[q][k] > -std::numeric_limits<double>::infinity(); }

// Everything quality() reports, the plain way; `rows` picks the token rows.
struct Naive {
  std::vector<double> coverage;
  double best = 0, nearest = 0, squared_error = 0, squared_norm = 0, largest_value = 0, score_error = 0;
  int64_t kept = 0, admissible = 0, outputs = 0;

  void add(const Naive& o) {
    coverage.insert(coverage.end(), o.coverage.begin(), o.coverage.end());
    best += o.best, nearest += o.nearest, squared_error += o.squared_error, squared_norm += o.squared_norm;
    kept += o.kept, admissible += o.admissible, outputs += o.outputs;
    largest_value = std::max(largest_value, o.largest_value);
    score_error = std::max(score_error, o.score_error);
  }
};

// Admissible by geometry alone: an attn_bias of -inf does not make a block inadmissible.
bool geometry_admits(const Case& c, int64_t b, int64_t q, int64_t k) {
  const AttentionOptions& o = c.input.options;
  const int64_t keys = o.key_lengths.empty() ? c.sizes.seqlen_k : o.key_lengths[b];
  const int64_t aligned = (o.align_to_key_lengths ? keys : c.sizes.seqlen_k) - c.sizes.seqlen_q;
  const int64_t distance = q - k + o.q_offset.value_or(aligned) - o.k_offset;
  return k < keys && (!o.causal.value_or(false) || distance >= 0) && (!o.window_left || distance <= *o.window_left) &&
         (!o.window_right || -distance <= *o.window_right);
}

Naive naive_head(const Case& c, const BlockPattern& pattern, int64_t b, int64_t h) {
  const Sizes& s = c.sizes;
  const Truth t = truth_of(c, b, h);
  const BlockPatternView view = pattern.view();
  const PatternShape& shape = view.shape;
  const AttentionOptions& o = c.input.options;
  Naive n;
  n.score_error = t.score_error;
  const int64_t keys = o.key_lengths.empty() ? s.seqlen_k : o.key_lengths[b];
  const int64_t diagonal = o.q_offset.value_or((o.align_to_key_lengths ? keys : s.seqlen_k) - s.seqlen_q) - o.k_offset;
  for (int64_t i = 0; i < shape.rows(); ++i) {
    const int64_t q_begin = i * shape.block_q, q_end = std::min(q_begin + shape.block_q, s.seqlen_q);
    // Kept share of each row, and masses of the admissible blocks.
    std::vector<std::vector<bool>> kept(s.seqlen_q, std::vector<bool>(s.seqlen_k, false));
    std::vector<bool> in_row(shape.cols(), false);
    const int64_t row = view.row_id(b, h, i);
    for (int64_t e = view.indptr[row]; e < view.indptr[row + 1]; ++e) {
      in_row[view.indices[e]] = true;
      for (int64_t q = q_begin; q < q_end; ++q) {
        for (int64_t x = 0; x < shape.block_k; ++x) {
          const int64_t k = view.indices[e] * int64_t{shape.block_k} + x;
          const uint64_t* bits = view.bitmap(e);
          const bool on = bits == nullptr || (bits[(q - q_begin) * shape.bitmap_words() + x / 64] >> (x % 64) & 1) != 0;
          if (k < s.seqlen_k) kept[q][k] = on;
        }
      }
    }
    struct Block {
      int64_t col;
      double mass;
    };
    std::vector<Block> blocks;
    int64_t budget = 0;
    for (int64_t j = 0; j < shape.cols(); ++j) {
      bool admissible = false;
      double mass = 0;
      for (int64_t q = q_begin; q < q_end; ++q) {
        for (int64_t k = j * shape.block_k; k < std::min((j + 1) * shape.block_k, s.seqlen_k); ++k) {
          admissible |= geometry_admits(c, b, q, k);
          mass += t.weights[q][k];
        }
      }
      if (!admissible) continue;
      blocks.push_back({j, mass});
      budget += in_row[j];
    }
    n.kept += budget;
    n.admissible += static_cast<int64_t>(blocks.size());
    const int64_t d = std::max<int64_t>(0, q_end - 1 + diagonal) / shape.block_k;
    const auto take = [&](auto less) {
      std::vector<Block> order = blocks;
      std::sort(order.begin(), order.end(), less);
      double sum = 0;
      for (int64_t x = 0; x < budget; ++x) sum += order[x].mass;
      return sum;
    };
    n.best += take([](const Block& x, const Block& y) { return x.mass > y.mass; });
    n.nearest += take([&](const Block& x, const Block& y) {
      const int64_t dx = std::abs(x.col - d), dy = std::abs(y.col - d);
      return dx != dy ? dx < dy : x.col < y.col;
    });
    for (int64_t q = q_begin; q < q_end; ++q) {
      if (t.sum[q] == 0) continue;
      double share = 0;
      for (int64_t k = 0; k < s.seqlen_k; ++k) share += kept[q][k] ? t.weights[q][k] : 0;
      n.coverage.push_back(share);
      const double sink =
          o.sinks.defined() ? std::exp(static_cast<const float*>(o.sinks.data)[h] - t.max[q]) / t.sum[q] : 0;
      for (int64_t x = 0; x < s.head_dim_v; ++x) {
        double dense = 0, sparse = 0;
        for (int64_t k = 0; k < s.seqlen_k; ++k) {
          if (!admits(t, q, k)) continue;
          const double value = c.v.at(b, k, h / (s.heads / s.kv_heads), x);
          n.largest_value = std::max(n.largest_value, std::abs(value));
          dense += t.weights[q][k] * value;
          if (kept[q][k]) sparse += t.weights[q][k] * value;
        }
        dense /= 1 + sink;
        sparse = share > 0 ? sparse / (share + sink) : 0;
        n.squared_error += (sparse - dense) * (sparse - dense);
        n.squared_norm += dense * dense;
        ++n.outputs;
      }
    }
  }
  return n;
}

void expect_figures(const QualityFigures& f, Naive n, bool has_v, const std::string& what) {
  SCOPED_TRACE(what);
  ASSERT_EQ(f.rows, static_cast<int64_t>(n.coverage.size()));
  EXPECT_DOUBLE_EQ(f.density, n.admissible ? static_cast<double>(n.kept) / n.admissible : 0.0);
  // A weight's relative error: twice the scores' (its own and the maximum's), the exponential's and a tile's sum.
  const double weight = 2 * n.score_error + 64 * epsilon_of(DType::f32);
  const double rows = static_cast<double>(n.coverage.size());
  if (n.coverage.empty()) {
    EXPECT_EQ(f.coverage, 0);
    return;
  }
  double sum = 0;
  for (double x : n.coverage) sum += x;
  std::sort(n.coverage.begin(), n.coverage.end());
  EXPECT_NEAR(f.coverage, sum / rows, 2 * weight);
  EXPECT_NEAR(f.coverage_min, n.coverage[0], 2 * weight);
  EXPECT_NEAR(f.coverage_p5, n.coverage[static_cast<size_t>(std::ceil(0.05 * rows)) - 1], 2 * weight);
  EXPECT_NEAR(f.oracle_coverage, n.best / rows, 2 * weight);
  EXPECT_NEAR(f.locality, n.nearest / rows, 2 * weight);
  EXPECT_DOUBLE_EQ(f.efficiency, f.density > 0 ? f.coverage / f.density : 0);
  EXPECT_DOUBLE_EQ(f.oracle_ratio, f.oracle_coverage > 0 ? f.coverage / f.oracle_coverage : 0);
  ASSERT_EQ(f.output_error.has_value(), has_v);
  if (!has_v) return;
  const double norm = std::sqrt(n.squared_norm);
  const double output = 4 * weight * n.largest_value * std::sqrt(static_cast<double>(n.outputs)) / norm;
  EXPECT_NEAR(*f.output_error, std::sqrt(n.squared_error) / norm, output);
  EXPECT_LT(output, 0.05);  // the tolerance means something
}

void compare(const Case& c, std::span<const BlockPattern> patterns) {
  ThreadPool pool(2);
  const std::vector<Quality> found = quality(c.input, patterns, pool);
  ASSERT_EQ(found.size(), patterns.size());
  for (size_t p = 0; p < patterns.size(); ++p) {
    Naive all;
    ASSERT_EQ(found[p].heads.size(), static_cast<size_t>(c.sizes.batch * c.sizes.heads));
    for (int64_t b = 0; b < c.sizes.batch; ++b) {
      for (int64_t h = 0; h < c.sizes.heads; ++h) {
        const Naive n = naive_head(c, patterns[p], b, h);
        const std::string what = "pattern " + std::to_string(p) + " b " + std::to_string(b) + " h " + std::to_string(h);
        expect_figures(found[p].heads[static_cast<size_t>(b * c.sizes.heads + h)], n, c.input.v.defined(), what);
        all.add(n);
      }
    }
    expect_figures(found[p], all, c.input.v.defined(), "all heads");
  }
}

// Shared, per head with bitmaps, per batch and head with other block sizes.
std::vector<BlockPattern> patterns_for(const Sizes& s, unsigned seed) {
  std::mt19937 random(seed);
  const auto shape = [&](int block_q, int block_k, int64_t heads, int64_t batches) {
    return PatternShape{s.seqlen_q, s.seqlen_k, block_q, block_k, heads, batches};
  };
  return {random_pattern(random, shape(16, 32, 1, 1), 0.5, false),
          random_pattern(random, shape(16, 32, s.heads, 1), 0.5, true),
          random_pattern(random, shape(32, 16, s.heads, s.batch), 0.3, true),
          random_pattern(random, shape(16, 32, 1, 1), 1.0, false)};
}

TEST(Quality, PlainInEveryDtypeAndLayout) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
      SCOPED_TRACE(std::string(name_of(dtype)));
      Case c;
      make_case(c, 1, dtype, layout);
      compare(c, patterns_for(c.sizes, 2));
    }
  }
}

TEST(Quality, SizesAroundTileEdges) {
  for (const auto& [sq, sk, d, dv] :
       {std::array<int64_t, 4>{1, 1, 1, 1}, {17, 33, 3, 16}, {64, 64, 16, 17}, {65, 31, 33, 8}, {5, 129, 8, 40}}) {
    SCOPED_TRACE(std::to_string(sq) + " x " + std::to_string(sk));
    Case c;
    c.sizes = {.batch = 1, .heads = 2, .kv_heads = 2, .seqlen_q = sq, .seqlen_k = sk, .head_dim = d, .head_dim_v = dv};
    c.input.options.causal = sq % 2 == 1;
    make_case(c, 3);
    compare(c, patterns_for(c.sizes, 4));
  }
}

TEST(Quality, Masks) {
  const std::vector<int64_t> lengths{90, 41};
  for (int n = 0; n < 7; ++n) {
    SCOPED_TRACE(n);
    Case c;
    make_case(c, 5);
    AttentionOptions& o = c.input.options;
    if (n == 0) o.causal = true;
    if (n == 1) o.causal = true, o.window_left = 20;
    if (n == 2) o.window_left = 7, o.window_right = 30;
    if (n == 3) o.key_lengths = lengths;
    if (n == 4) o.key_lengths = lengths, o.causal = true, o.align_to_key_lengths = true;  // rows that see no key
    if (n == 5) o.causal = true, o.q_offset = 3, o.k_offset = 20;
    if (n == 6) o.causal = true, o.q_offset = -200;  // nobody sees anything
    compare(c, patterns_for(c.sizes, 6));
  }
}

TEST(Quality, ScoreOptions) {
  std::vector<float> slopes{0.5f, 0.25f, 0.1f, 0.0f}, sinks{0.5f, -2.0f, 6.0f, 1.0f};
  std::vector<float> bias(4 * 75 * 90);
  std::mt19937 random(7);
  for (float& x : bias) {
    x = random() % 5 == 0 ? -std::numeric_limits<float>::infinity() : static_cast<float>(random() % 100) * 0.02f;
  }
  for (int n = 0; n < 6; ++n) {
    SCOPED_TRACE(n);
    Case c;
    make_case(c, 8);
    AttentionOptions& o = c.input.options;
    if (n == 0) o.scale = 0.05;
    if (n == 1) o.scale = -0.3;
    if (n == 2) o.softcap = 2.5;
    if (n == 3) o.alibi_slopes = make_view(static_cast<const void*>(slopes.data()), DType::f32, {4});
    if (n == 4) o.attn_bias = make_view(static_cast<const void*>(bias.data()), DType::f32, {1, 4, 75, 90});
    if (n == 5) o.sinks = make_view(static_cast<const void*>(sinks.data()), DType::f32, {4});
    compare(c, patterns_for(c.sizes, 9));
  }
}

// Scores of +-1e4 whose maximum comes in the last block: earlier tiles must vanish, not overflow.
TEST(Quality, RisingMaximum) {
  Case c;
  c.sizes = {.batch = 1, .heads = 1, .kv_heads = 1, .seqlen_q = 40, .seqlen_k = 100, .head_dim = 4, .head_dim_v = 3};
  make_case(c, 10);
  auto* q = reinterpret_cast<float*>(c.q.bytes.data());
  auto* k = reinterpret_cast<float*>(c.k.bytes.data());
  for (int64_t i = 0; i < 40; ++i) std::fill_n(q + 4 * i, 4, 2.0f);
  for (int64_t i = 0; i < 100; ++i) std::fill_n(k + 4 * i, 4, static_cast<float>(i * 25 - 1250));
  const std::vector<BlockPattern> patterns = patterns_for(c.sizes, 11);
  InlineExecutor executor;
  const Quality found = quality(c.input, patterns[3], executor);
  const Naive n = naive_head(c, patterns[3], 0, 0);
  EXPECT_EQ(found.coverage_min, 0);  // row 1 of blocks is empty
  double sum = 0;
  for (double x : n.coverage) sum += x;
  EXPECT_NEAR(found.coverage, sum / 40, 1e-6);
}

// A dense pattern keeps everything: exactly, as sparse and dense sums are the same operations.
TEST(Quality, DenseIsPerfect) {
  Case c;
  make_case(c, 12, DType::bf16);
  c.input.options.causal = true;
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  for (int64_t i = 0; i < 5; ++i) {
    for (int32_t j = 0; j < 6; ++j) indices.push_back(j);
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  const BlockPattern dense = BlockPattern::from_csr({75, 90, 16, 16}, indptr, indices);
  InlineExecutor executor;
  const Quality f = quality(c.input, dense, executor);
  EXPECT_EQ(f.coverage, 1);
  EXPECT_EQ(f.coverage_min, 1);
  EXPECT_EQ(f.density, 1);
  EXPECT_EQ(f.output_error, 0);
  EXPECT_NEAR(f.oracle_coverage, 1, 1e-6);
  EXPECT_NEAR(f.locality, 1, 1e-6);
}

TEST(Quality, BitEqualOnAnyNumberOfThreads) {
  Case c;
  make_case(c, 13);
  const std::vector<BlockPattern> patterns = patterns_for(c.sizes, 14);
  InlineExecutor one;
  ThreadPool two(2), three(3);
  const std::vector<Quality> a = quality(c.input, patterns, one);
  for (Executor* executor : {static_cast<Executor*>(&two), static_cast<Executor*>(&three)}) {
    const std::vector<Quality> b = quality(c.input, patterns, *executor);
    for (size_t p = 0; p < patterns.size(); ++p) {
      EXPECT_EQ(a[p].coverage, b[p].coverage);
      EXPECT_EQ(a[p].coverage_p5, b[p].coverage_p5);
      EXPECT_EQ(a[p].oracle_coverage, b[p].oracle_coverage);
      EXPECT_EQ(a[p].output_error, b[p].output_error);
    }
  }
}

// Judging a pattern alone or among others gives the same numbers.
TEST(Quality, PatternsDoNotDisturbEachOther) {
  Case c;
  make_case(c, 15);
  const std::vector<BlockPattern> patterns = patterns_for(c.sizes, 16);
  InlineExecutor executor;
  const std::vector<Quality> together = quality(c.input, patterns, executor);
  for (size_t p = 0; p < patterns.size(); ++p) {
    const Quality alone = quality(c.input, patterns[p], executor);
    EXPECT_EQ(alone.coverage, together[p].coverage);
    EXPECT_EQ(alone.output_error, together[p].output_error);
  }
}

TEST(Quality, WithoutValues) {
  Case c;
  make_case(c, 17);
  c.input.v = {};
  compare(c, patterns_for(c.sizes, 18));
}

TEST(Quality, PaddingIsNeverRead) {
  const std::vector<int64_t> lengths{90, 41};
  Case clean, poisoned;
  make_case(clean, 19);
  make_case(poisoned, 19);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (Data* data : {&poisoned.k, &poisoned.v}) {
    auto* x = reinterpret_cast<float*>(data->bytes.data());
    const auto& t = data->view.strides;
    for (int64_t s = 41; s < 90; ++s) std::fill_n(x + t[0] + s * t[1], t[1], nan);
  }
  clean.input.options.key_lengths = poisoned.input.options.key_lengths = lengths;
  InlineExecutor executor;
  const std::vector<BlockPattern> patterns = patterns_for(clean.sizes, 20);
  const std::vector<Quality> a = quality(clean.input, patterns, executor);
  const std::vector<Quality> b = quality(poisoned.input, patterns, executor);
  for (size_t p = 0; p < patterns.size(); ++p) {
    EXPECT_EQ(a[p].coverage, b[p].coverage);
    EXPECT_EQ(a[p].output_error, b[p].output_error);
  }
}

// Sampling every row is the exact answer; a sample's coverage is that of its rows.
TEST(Quality, SampledRows) {
  Case c;
  c.sizes = {.batch = 1, .heads = 2, .kv_heads = 1, .seqlen_q = 700, .seqlen_k = 700, .head_dim = 16, .head_dim_v = 8};
  make_case(c, 21);
  c.input.options.causal = true;
  std::mt19937 random(22);
  const BlockPattern pattern = random_pattern(random, {700, 700, 32, 32}, 0.5, false);
  InlineExecutor executor;
  const Quality exact = quality(c.input, pattern, executor);
  const Quality all = quality(c.input, pattern, executor, {.sample_rows = 700, .seed = 1});
  EXPECT_EQ(exact.coverage, all.coverage);
  EXPECT_EQ(exact.output_error, all.output_error);
  const Quality some = quality(c.input, pattern, executor, {.sample_rows = 140, .seed = 1});
  EXPECT_EQ(some.rows, 280);
  EXPECT_EQ(some.density, exact.density);
  // 140 rows of a share in 0..1: standard error of the mean below .5 / sqrt(140) = .042; four of them.
  EXPECT_NEAR(some.coverage, exact.coverage, 0.17);
  EXPECT_NE(some.coverage, exact.coverage);
  const Quality again = quality(c.input, pattern, executor, {.sample_rows = 140, .seed = 1});
  EXPECT_EQ(some.coverage, again.coverage);
  const Quality other = quality(c.input, pattern, executor, {.sample_rows = 140, .seed = 2});
  EXPECT_NE(some.coverage, other.coverage);
}

TEST(Quality, EmptyLengths) {
  for (const auto& [sq, sk] : {std::pair<int64_t, int64_t>{0, 32}, {32, 0}, {0, 0}}) {
    Case c;
    c.sizes = {.batch = 1, .heads = 1, .kv_heads = 1, .seqlen_q = sq, .seqlen_k = sk, .head_dim = 4, .head_dim_v = 4};
    make_case(c, 23);
    const PatternShape shape{sq, sk, 16, 16};
    const BlockPattern pattern =
        BlockPattern::from_csr(shape, std::vector<int64_t>(static_cast<size_t>(shape.total_rows()) + 1), {});
    InlineExecutor executor;
    const Quality f = quality(c.input, pattern, executor);
    EXPECT_EQ(f.rows, 0);
    EXPECT_EQ(f.coverage, 0);
    EXPECT_EQ(f.density, 0);
  }
}

TEST(Quality, Mistakes) {
  Case c;
  make_case(c, 24);
  const std::vector<BlockPattern> patterns = patterns_for(c.sizes, 25);
  InlineExecutor executor;
  const auto argument = [&](const AnalysisInput& input, const QualityOptions& options = {}) -> std::string {
    try {
      quality(input, patterns[0], executor, options);
    } catch (const Error& e) {
      return e.argument();
    }
    return "none";
  };
  EXPECT_EQ(argument(c.input), "none");
  AnalysisInput input = c.input;
  input.options.dropout.p = 0.1;
  EXPECT_EQ(argument(input), "dropout");
  input = c.input;
  const float zero = 0;
  input.options.block_bias = make_view(static_cast<const void*>(&zero), DType::f32, {1, 1, 1});
  EXPECT_EQ(argument(input), "block_bias");
  EXPECT_EQ(argument(c.input, {.sample_rows = -1}), "sample_rows");
  const BlockPattern other = BlockPattern::from_csr({64, 64, 16, 16}, {0, 0, 0, 0, 0}, {});
  EXPECT_THROW(quality(c.input, other, executor), Error);
  // Not finite where a query looks: an error, never a number.
  auto* k = reinterpret_cast<float*>(c.k.bytes.data());
  auto* v = reinterpret_cast<float*>(c.v.bytes.data());
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const float k0 = std::exchange(k[5], bad);
    EXPECT_EQ(argument(c.input), "q, k");
    k[5] = k0;
    const float v0 = std::exchange(v[5], bad);
    EXPECT_EQ(argument(c.input), "v");
    v[5] = v0;
  }
  EXPECT_EQ(argument(c.input), "none");
}

TEST(MassMap, RefusesBlocksThatAreNone) {
  Case c;
  make_case(c, 26);
  ThreadPool pool(1);
  for (const int block : {0, -16, 8, 512}) {
    for (const auto& [q, k] : {std::pair{block, 16}, std::pair{16, block}}) {
      try {
        attention_mass(c.input, q, k, pool);
        FAIL() << q << " x " << k;
      } catch (const Error& e) {
        EXPECT_EQ(e.argument(), q == block ? "block_q" : "block_k");
      }
    }
  }
}

TEST(MassMap, AgainstNaive) {
  Case c;
  make_case(c, 26);
  c.input.options.causal = true;
  ThreadPool pool(2);
  const MassMap map = attention_mass(c.input, 16, 32, pool);
  ASSERT_EQ(map.shape.rows(), 5);
  ASSERT_EQ(map.shape.cols(), 3);
  std::vector<double> mean(15, 0.0);
  for (int64_t b = 0; b < 2; ++b) {
    std::fill(mean.begin(), mean.end(), 0.0);
    for (int64_t h = 0; h < 4; ++h) {
      const Truth t = truth_of(c, b, h);
      for (int64_t i = 0; i < 5; ++i) {
        double row = 0;
        for (int64_t j = 0; j < 3; ++j) {
          double mass = 0, tokens = 0;
          for (int64_t q = 16 * i; q < std::min<int64_t>(16 * i + 16, 75); ++q) {
            tokens += t.sum[q] > 0;
            for (int64_t k = 32 * j; k < std::min<int64_t>(32 * j + 32, 90); ++k) mass += t.weights[q][k];
          }
          const float found = map.head(b, h)[static_cast<size_t>(3 * i + j)];
          EXPECT_NEAR(found, mass / tokens, 2 * t.score_error + 64 * epsilon_of(DType::f32));
          mean[static_cast<size_t>(3 * i + j)] += found / 4.0;
          row += found;
        }
        EXPECT_NEAR(row, 1, 1e-6);
      }
    }
    const std::vector<float> found = map.mean_over_heads(b);
    for (size_t n = 0; n < 15; ++n) EXPECT_NEAR(found[n], mean[n], 1e-6);
  }
  EXPECT_THROW(attention_mass(c.input, 16, 32, pool, 100), Error);
  EXPECT_THROW(attention_mass(c.input, 17, 32, pool), Error);
}

// Lengths, blocks and batches that differ, causal or not: every kind is searched, and what comes out is what it says.
TEST(Optimize, EveryKindOnUnequalShapes) {
  const std::span<const PatternKind> all = all_pattern_kinds();
  for (const auto& [sq, sk] : {std::pair<int64_t, int64_t>{75, 190}, {190, 75}, {1, 40}}) {
    for (const bool causal : {false, true}) {
      SCOPED_TRACE(std::to_string(sq) + " x " + std::to_string(sk) + (causal ? " causal" : ""));
      Case c;
      c.sizes.seqlen_q = sq;
      c.sizes.seqlen_k = sk;
      make_case(c, 27);
      if (causal) c.input.options.causal = true;
      InlineExecutor executor;
      OptimizeOptions options;
      options.target_coverage = 0.7;
      options.kinds.assign(all.begin(), all.end());
      const OptimizeResult r = optimize(c.input, 16, 32, options, executor);
      ASSERT_EQ(r.candidates.size(), all.size());
      EXPECT_TRUE(r.best.reached);  // dense is among them
      for (size_t n = 0; n < all.size(); ++n) {
        SCOPED_TRACE(std::string(name_of(all[n])));
        const OptimizeResult::Candidate& candidate = r.candidates[n];
        EXPECT_EQ(candidate.spec.kind, all[n]);
        EXPECT_EQ(candidate.reached, candidate.coverage >= 0.7 * (1 - 1e-6));
        EXPECT_LE(r.bound_density, candidate.reached ? candidate.density : 1.0);
        if (all[n] == PatternKind::causal && !causal) continue;  // to be causal is another attention
        const Quality f = quality(c.input, make_pattern(candidate.spec), executor);
        EXPECT_NEAR(f.coverage, candidate.coverage, 1e-6);
        EXPECT_NEAR(f.density, candidate.density, 1e-12);
        EXPECT_LE(f.coverage, f.oracle_coverage + 1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace tessera
