// LongNet's dilated attention as the paper writes it: gather, attend, scatter, join by lse weights. All in fp64, one
// head and one segment at a time, without a thought of speed.
#pragma once

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "attention_inputs.h"
#include "call/dilated_plan.h"
#include "tessera/dilated.h"

namespace tessera {

struct DilatedCase {
  std::string name;
  int64_t batch = 1, seqlen = 1, heads = 1, kv_heads = 1, head_dim = 16, head_dim_v = 16;
  std::vector<int64_t> segment_lengths, dilation_rates;
  std::optional<PatternSpec> pattern;
  std::function<BlockPattern(const PatternSpec&)> make;
  Layout layout = Layout::bshd;
  bool causal = false;
  std::optional<int64_t> window_left, window_right;
  std::optional<double> scale;
  double softcap = 0;
  std::vector<int64_t> key_lengths;
  std::vector<float> slopes;            // [H], or [B, H]
  std::array<int64_t, 4> bias_sizes{};  // of attn_bias: B or 1, H or 1, S or 1, S or 1; 0: none
  std::vector<float> bias;
  Dropout dropout;

  DilatedCase with_bias(const std::array<int64_t, 4>& sizes) const {
    DilatedCase c = *this;
    c.bias_sizes = sizes;
    c.bias.resize(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
    // Multiples of 2^-6: bf16 has them.
    for (size_t i = 0; i < c.bias.size(); ++i) c.bias[i] = std::round(64 * std::sin(0.9f * static_cast<float>(i))) / 64;
    return c;
  }
  size_t bias_index(int64_t b, int64_t h, int64_t q, int64_t k) const {
    const auto& n = bias_sizes;
    const auto at = [](int64_t i, int64_t size) { return size == 1 ? 0 : i; };
    return static_cast<size_t>(((at(b, n[0]) * n[1] + at(h, n[1])) * n[2] + at(q, n[2])) * n[3] + at(k, n[3]));
  }
  Dilation dilation() const { return {segment_lengths, dilation_rates, pattern, make}; }
  AttentionOptions options() const {
    AttentionOptions o;
    o.scale = scale;
    o.causal = causal;
    o.window_left = window_left;
    o.window_right = window_right;
    o.softcap = softcap;
    o.key_lengths = key_lengths;
    o.dropout = dropout;
    const auto view = [](const std::vector<float>& x, std::initializer_list<int64_t> sizes) {
      return make_view(static_cast<const void*>(x.data()), DType::f32, sizes);
    };
    if (static_cast<int64_t>(slopes.size()) == heads) o.alibi_slopes = view(slopes, {heads});
    else if (!slopes.empty()) o.alibi_slopes = view(slopes, {batch, heads});
    if (!bias.empty()) o.attn_bias = view(bias, {bias_sizes[0], bias_sizes[1], bias_sizes[2], bias_sizes[3]});
    return o;
  }
};

// [B, S, H, D] in fp64.
struct Dense4 {
  int64_t seqlen = 0, heads = 0, dim = 0;
  std::vector<double> values;

  Dense4(int64_t batch, int64_t s, int64_t h, int64_t d) : seqlen(s), heads(h), dim(d), values(batch * s * h * d) {}
  double* row(int64_t b, int64_t s, int64_t h) { return &values[((b * seqlen + s) * heads + h) * dim]; }
  const double* row(int64_t b, int64_t s, int64_t h) const { return &values[((b * seqlen + s) * heads + h) * dim]; }
};

struct PlainResult {
  Dense4 out, lse;            // lse [B, S, H, 1]
  std::vector<char> q_read;   // [B, S, H] rows that some (w, r) covers
  std::vector<char> kv_read;  // [B, S, Hkv] rows that some query admits
  int64_t pairs = 0;
  int64_t most_keys = 0;     // of a query, over all (w, r)
  double largest_score = 0;  // largest sum of |scale q k|, and of what is added
};

inline bool keeps(const BlockPatternView& pattern, int64_t h, int64_t q, int64_t k) {
  const PatternShape& s = pattern.shape;
  const int64_t row = pattern.row_id(0, h, q / s.block_q);
  for (int64_t e = pattern.indptr[row]; e < pattern.indptr[row + 1]; ++e) {
    if (pattern.indices[e] != k / s.block_k) continue;
    const uint64_t* bits = pattern.bitmap(e);
    const int64_t i = k % s.block_k;
    return bits == nullptr || (bits[q % s.block_q * s.bitmap_words() + i / 64] >> (i % 64) & 1);
  }
  return false;
}

// One admitted pair of one (w, r): tokens, score, derivative of the score by q . k, and what dropout makes of a weight
// of 1.
struct PlainPair {
  int64_t b, h, q, k;
  double score, slope, keep;
};

inline PlainResult plain_dilated(const DilatedCase& c, const Dense4& q, const Dense4& k, const Dense4& v,
                                 const std::function<void(const PlainPair&)>& visit = {}) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t share = c.heads / c.kv_heads, groups = static_cast<int64_t>(c.segment_lengths.size());
  PlainResult result{Dense4(c.batch, c.seqlen, c.heads, c.head_dim_v), Dense4(c.batch, c.seqlen, c.heads, 1), {}, {}};
  result.q_read.assign(c.batch * c.seqlen * c.heads, 0);
  result.kv_read.assign(c.batch * c.seqlen * c.kv_heads, 0);
  std::vector<int64_t> keys_of(c.batch * c.seqlen * c.heads, 0);
  std::vector<Dense4> outs, lses;
  std::map<size_t, BlockPattern> patterns;  // by length
  for (int64_t g = 0; g < groups; ++g) {
    Dense4& out = outs.emplace_back(c.batch, c.seqlen, c.heads, c.head_dim_v);
    Dense4& lse = lses.emplace_back(c.batch, c.seqlen, c.heads, 1);
    std::fill(lse.values.begin(), lse.values.end(), -kInfinity);
    const int64_t w = std::min(c.segment_lengths[g], c.seqlen), r = c.dilation_rates[g];
    const int64_t segments = (c.seqlen + w - 1) / w;
    const Dropout dropout = dropout_of(c.dropout, g);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t segment = 0; segment < segments; ++segment) {
          std::vector<int64_t> tokens;  // gathered
          for (int64_t t = segment * w + h % r; t < std::min(c.seqlen, (segment + 1) * w); t += r) tokens.push_back(t);
          if (tokens.empty()) continue;
          PatternSpec spec = c.pattern.value_or(PatternSpec{});
          spec.seqlen_q = spec.seqlen_k = static_cast<int64_t>(tokens.size());
          spec.causal = c.causal;
          if (!patterns.contains(tokens.size())) patterns[tokens.size()] = c.make ? c.make(spec) : make_pattern(spec);
          const BlockPatternView pattern = patterns[tokens.size()].view();
          for (size_t i = 0; i < tokens.size(); ++i) {
            const int64_t tq = tokens[i];
            result.q_read[(b * c.seqlen + tq) * c.heads + h] = 1;
            std::vector<double> scores, slopes;
            std::vector<size_t> admitted;
            for (size_t j = 0; j < tokens.size(); ++j) {
              const int64_t tk = tokens[j];
              if (!keeps(pattern, h, static_cast<int64_t>(i), static_cast<int64_t>(j))) continue;
              if (c.causal && tk > tq) continue;
              if (c.window_left && tq - tk > *c.window_left) continue;
              if (c.window_right && tk - tq > *c.window_right) continue;
              if (!c.key_lengths.empty() && tk >= c.key_lengths[b]) continue;
              double dot = 0, magnitude = 0;
              for (int64_t d = 0; d < c.head_dim; ++d) {
                const double product = q.row(b, tq, h)[d] * k.row(b, tk, h / share)[d];
                dot += product;
                magnitude += std::abs(product);
              }
              const double scale = c.scale.value_or(1 / std::sqrt(static_cast<double>(c.head_dim)));
              double s = scale * dot, bias = 0, slope = scale;
              if (c.softcap > 0) {
                s = c.softcap * std::tanh(s / c.softcap);
                slope *= 1 - s / c.softcap * (s / c.softcap);
              }
              if (!c.slopes.empty()) {
                const size_t row = static_cast<int64_t>(c.slopes.size()) > c.heads ? b * c.heads + h : h;
                bias -= c.slopes[row] * std::abs(static_cast<double>(tq - tk));
              }
              if (!c.bias.empty()) bias += c.bias[c.bias_index(b, h, tq, tk)];
              scores.push_back(s + bias);
              slopes.push_back(slope);
              admitted.push_back(j);
              result.kv_read[(b * c.seqlen + tk) * c.kv_heads + h / share] = 1;
              result.largest_score = std::max(result.largest_score, std::abs(scale) * magnitude + std::abs(bias));
            }
            result.pairs += static_cast<int64_t>(admitted.size());
            int64_t& keys = keys_of[(b * c.seqlen + tq) * c.heads + h];
            keys += static_cast<int64_t>(admitted.size());
            result.most_keys = std::max(result.most_keys, keys);
            double sum = 0;
            for (const double s : scores) sum += std::exp(s);
            if (admitted.empty()) continue;
            *lse.row(b, tq, h) = std::log(sum);  // scattered
            for (size_t n = 0; n < admitted.size(); ++n) {
              double keep = 1;
              if (c.dropout.p > 0) {
                const uint64_t stream = static_cast<uint64_t>((b * segments + segment) * c.heads + h);
                const uint32_t random =
                    dropout_random(dropout, stream, static_cast<int64_t>(i), static_cast<int64_t>(admitted[n]));
                keep = random < drop_threshold(dropout.p) ? 0 : 1 / (1 - dropout.p);
              }
              const double weight = std::exp(scores[n]) / sum * keep;
              if (visit) visit({b, h, tq, tokens[admitted[n]], scores[n], slopes[n], keep});
              for (int64_t d = 0; d < c.head_dim_v; ++d) {
                out.row(b, tq, h)[d] += weight * v.row(b, tokens[admitted[n]], h / share)[d];
              }
            }
          }
        }
      }
    }
  }
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t s = 0; s < c.seqlen; ++s) {
      for (int64_t h = 0; h < c.heads; ++h) {
        double sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += std::exp(*lses[g].row(b, s, h));
        *result.lse.row(b, s, h) = std::log(sum);
        if (sum == 0) continue;
        for (int64_t g = 0; g < groups; ++g) {
          const double weight = std::exp(*lses[g].row(b, s, h)) / sum;
          for (int64_t d = 0; d < c.head_dim_v; ++d) {
            result.out.row(b, s, h)[d] += weight * outs[g].row(b, s, h)[d];
          }
        }
      }
    }
  }
  return result;
}

// Gradients of sum(out * dout) + sum(lse * dlse), and for each element the sum of the absolute values of what it is the
// sum of: what rounding errors are relative to.
struct PlainGradients {
  Dense4 dq, dk, dv, dq_magnitude, dk_magnitude, dv_magnitude;
  std::vector<double> dbias, dbias_magnitude;  // of attn_bias
};

// The joined result is one softmax over all pairs, so P = exp(score - lse) and dscore = P (dP - delta). Values of v are
// at most 1.
inline PlainGradients plain_dilated_gradients(const DilatedCase& c, const PlainResult& result, const Dense4& q,
                                              const Dense4& k, const Dense4& v, const Dense4& dout,
                                              const Dense4& dlse) {
  const int64_t share = c.heads / c.kv_heads;
  const Dense4 of_q(c.batch, c.seqlen, c.heads, c.head_dim), of_k(c.batch, c.seqlen, c.kv_heads, c.head_dim),
      of_v(c.batch, c.seqlen, c.kv_heads, c.head_dim_v);
  const std::vector<double> of_bias(c.bias.size());
  PlainGradients g{of_q, of_k, of_v, of_q, of_k, of_v, of_bias, of_bias};
  plain_dilated(c, q, k, v, [&](const PlainPair& pair) {
    const auto [b, h, i, j, score, slope, keep] = pair;
    const int64_t kv = h / share;
    const double p = std::exp(score - *result.lse.row(b, i, h));
    double dp = 0, delta = -*dlse.row(b, i, h), dp_magnitude = 0, delta_magnitude = std::abs(delta);
    for (int64_t d = 0; d < c.head_dim_v; ++d) {
      const double gradient = dout.row(b, i, h)[d];
      dp += keep * gradient * v.row(b, j, kv)[d];
      dp_magnitude += std::abs(keep * gradient * v.row(b, j, kv)[d]);
      delta += gradient * result.out.row(b, i, h)[d];
      delta_magnitude += std::abs(gradient) / (1 - c.dropout.p);  // out errs relative to the largest v
      g.dv.row(b, j, kv)[d] += p * keep * gradient;
      g.dv_magnitude.row(b, j, kv)[d] += std::abs(p * keep * gradient);
    }
    const double dscore = slope * p * (dp - delta);
    const double magnitude = std::abs(c.scale.value_or(1 / std::sqrt(static_cast<double>(c.head_dim)))) * p *
                             (dp_magnitude + delta_magnitude);
    if (!g.dbias.empty()) {
      g.dbias[c.bias_index(b, h, i, j)] += p * (dp - delta);
      g.dbias_magnitude[c.bias_index(b, h, i, j)] += p * (dp_magnitude + delta_magnitude);
    }
    for (int64_t d = 0; d < c.head_dim; ++d) {
      g.dq.row(b, i, h)[d] += dscore * k.row(b, j, kv)[d];
      g.dk.row(b, j, kv)[d] += dscore * q.row(b, i, h)[d];
      g.dq_magnitude.row(b, i, h)[d] += magnitude * std::abs(k.row(b, j, kv)[d]);
      g.dk_magnitude.row(b, j, kv)[d] += magnitude * std::abs(q.row(b, i, h)[d]);
    }
  });
  return g;
}

// A tensor [B, S, H, D] of any dtype in a layout, and its numbers in fp64.
struct LaidOut {
  std::vector<char> memory;
  MutableTensorView view;

  LaidOut(DType dtype, Layout layout, int64_t batch, int64_t seqlen, int64_t heads, int64_t dim) {
    memory.resize(batch * seqlen * heads * dim * size_of(dtype) + 1);
    view = attention_view(static_cast<void*>(memory.data()), dtype, layout, batch, seqlen, heads, dim);
  }
  int64_t index(int64_t b, int64_t s, int64_t h, int64_t d) const {
    return b * view.strides[0] + s * view.strides[1] + h * view.strides[2] + d;
  }
  double get(int64_t b, int64_t s, int64_t h, int64_t d) const {
    return load_as_double(memory.data(), view.dtype, index(b, s, h, d));
  }
  void set(int64_t b, int64_t s, int64_t h, int64_t d, double x) {
    store_from_double(memory.data(), view.dtype, index(b, s, h, d), x);
  }
  template <class F>
  void for_each(F visit) const {
    for (int64_t b = 0; b < view.sizes[0]; ++b)
      for (int64_t s = 0; s < view.sizes[1]; ++s)
        for (int64_t h = 0; h < view.sizes[2]; ++h)
          for (int64_t d = 0; d < view.sizes[3]; ++d) visit(b, s, h, d);
  }
  void fill(double x) {
    for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) { set(b, s, h, d, x); });
  }
  void fill_wave(double a, double phase) {
    int64_t i = 0;
    for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      set(b, s, h, d, std::sin(a * static_cast<double>(i++) + phase));
    });
  }
  Dense4 dense() const {
    Dense4 x(view.sizes[0], view.sizes[1], view.sizes[2], view.sizes[3]);
    for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) { x.row(b, s, h)[d] = get(b, s, h, d); });
    return x;
  }
};

// Cases that both directions go through. Sizes: segments that do not divide the length, rates that do not divide the
// segment, segments beyond the length (clipped), ragged ends, one to several batches, blocks of 16 inside dilated
// segments of up to some blocks, decode-sized ones (up to 16 rows) and longer ones.
inline std::vector<DilatedCase> dilated_cases() {
  std::vector<DilatedCase> cases;
  const auto add = [&](DilatedCase c) { cases.push_back(std::move(c)); };
  add({.name = "ragged segments, rates that do not divide",
       .seqlen = 100,
       .heads = 4,
       .kv_heads = 4,
       .segment_lengths = {32, 48, 200},
       .dilation_rates = {1, 3, 5}});
  add({.name = "causal",
       .seqlen = 100,
       .heads = 4,
       .kv_heads = 4,
       .segment_lengths = {40, 64},
       .dilation_rates = {2, 3},
       .causal = true});
  add({.name = "LongNet: doubling, causal",
       .batch = 2,
       .seqlen = 128,
       .heads = 4,
       .kv_heads = 2,
       .segment_lengths = {32, 64, 128},
       .dilation_rates = {1, 2, 4},
       .causal = true});
  add({.name = "one head: most is uncovered",
       .seqlen = 61,
       .heads = 1,
       .kv_heads = 1,
       .segment_lengths = {20, 45},
       .dilation_rates = {3, 4}});
  add({.name = "one (w, r) of rate 1",
       .batch = 2,
       .seqlen = 70,
       .heads = 3,
       .kv_heads = 3,
       .segment_lengths = {33},
       .dilation_rates = {1}});
  add({.name = "one (w, r) with gaps",
       .batch = 2,
       .seqlen = 75,
       .heads = 2,
       .kv_heads = 1,
       .segment_lengths = {30},
       .dilation_rates = {4},
       .layout = Layout::bhsd});
  add({.name = "kv heads shared unevenly",
       .batch = 2,
       .seqlen = 90,
       .heads = 12,
       .kv_heads = 2,
       .segment_lengths = {45, 60, 90, 50},
       .dilation_rates = {4, 6, 3, 12},
       .layout = Layout::bhsd,
       .causal = true});
  add({.name = "rates beyond the heads and beyond the segment",
       .seqlen = 50,
       .heads = 5,
       .kv_heads = 5,
       .segment_lengths = {3, 25, 50},
       .dilation_rates = {7, 8, 2}});
  add({.name = "tiny segments in batches",
       .batch = 3,
       .seqlen = 24,
       .heads = 2,
       .kv_heads = 2,
       .segment_lengths = {1, 4, 8},
       .dilation_rates = {1, 2, 1}});
  add({.name = "the same (w, r) twice",
       .seqlen = 40,
       .heads = 2,
       .kv_heads = 2,
       .segment_lengths = {20, 20},
       .dilation_rates = {2, 2}});
  add({.name = "wide values",
       .seqlen = 64,
       .heads = 2,
       .kv_heads = 2,
       .head_dim = 20,
       .head_dim_v = 36,
       .segment_lengths = {32, 64},
       .dilation_rates = {1, 2}});
  add({.name = "window",
       .seqlen = 120,
       .heads = 4,
       .kv_heads = 4,
       .segment_lengths = {60, 120},
       .dilation_rates = {2, 3},
       .window_left = 10,
       .window_right = 7});
  add({.name = "window, causal",
       .seqlen = 120,
       .heads = 3,
       .kv_heads = 3,
       .segment_lengths = {60, 120},
       .dilation_rates = {1, 3},
       .causal = true,
       .window_left = 11});
  add({.name = "softcap and scale",
       .seqlen = 64,
       .heads = 2,
       .kv_heads = 2,
       .segment_lengths = {40},
       .dilation_rates = {2},
       .scale = 0.7,
       .softcap = 2.5});
  add({.name = "key lengths",
       .batch = 3,
       .seqlen = 96,
       .heads = 4,
       .kv_heads = 2,
       .segment_lengths = {32, 48, 96},
       .dilation_rates = {1, 2, 3},
       .key_lengths = {96, 37, 0}});
  add({.name = "ALiBi",
       .batch = 2,
       .seqlen = 96,
       .heads = 3,
       .kv_heads = 3,
       .segment_lengths = {32, 96},
       .dilation_rates = {1, 2},
       .causal = true,
       .slopes = {0.5f, 0.25f, 0.125f}});
  add({.name = "ALiBi by batch",
       .batch = 2,
       .seqlen = 96,
       .heads = 3,
       .kv_heads = 3,
       .segment_lengths = {32, 48, 96},
       .dilation_rates = {1, 2, 2},
       .slopes = {0.5f, 0.25f, 0.125f, 0.0625f, 0.1f, 0.2f}});
  DilatedCase bias{.name = "attn_bias of keys",
                   .batch = 2,
                   .seqlen = 48,
                   .heads = 2,
                   .kv_heads = 2,
                   .segment_lengths = {24, 48},
                   .dilation_rates = {1, 2}};
  add(bias.with_bias({1, 2, 1, 48}));
  bias.name = "attn_bias of pairs";
  add(bias.with_bias({2, 1, 48, 48}));
  add({.name = "dropout",
       .batch = 2,
       .seqlen = 80,
       .heads = 4,
       .kv_heads = 2,
       .segment_lengths = {20, 40, 80},
       .dilation_rates = {1, 2, 3},
       .dropout = {.p = 0.3, .seed = 7, .offset = 11}});
  PatternSpec sparse;
  sparse.kind = PatternKind::dilated_sparse;
  sparse.density = 0.4;
  sparse.dilation_rates = {1, 2};
  sparse.block_q = sparse.block_k = 16;
  add({.name = "sparse inside",
       .batch = 2,
       .seqlen = 200,
       .heads = 2,
       .kv_heads = 2,
       .segment_lengths = {100, 200},
       .dilation_rates = {1, 2},
       .pattern = sparse});
  sparse.block_k = 32;
  add({.name = "sparse inside, causal",
       .seqlen = 190,
       .heads = 3,
       .kv_heads = 3,
       .segment_lengths = {100, 190},
       .dilation_rates = {1, 2},
       .pattern = sparse,
       .causal = true});
  sparse.kind = PatternKind::random;
  sparse.dilation_rates.clear();
  sparse.heads = 4;
  sparse.seed = 3;
  add({.name = "a random pattern a head",
       .seqlen = 200,
       .heads = 4,
       .kv_heads = 2,
       .segment_lengths = {100, 200},
       .dilation_rates = {1, 3},
       .pattern = sparse});
  DilatedCase own{.name = "a pattern of one's own, with bitmaps by head",
                  .seqlen = 90,
                  .heads = 2,
                  .kv_heads = 2,
                  .segment_lengths = {45, 90},
                  .dilation_rates = {1, 2}};
  own.make = [](const PatternSpec& spec) {
    PatternShape shape{spec.seqlen_q, spec.seqlen_k, 16, 16, 2};
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices, bitmap_index;
    for (int64_t i = 0; i < 2 * shape.rows(); ++i) {
      for (int64_t j = 0; j < shape.cols(); ++j) {
        indices.push_back(static_cast<int32_t>(j));
        bitmap_index.push_back(static_cast<int32_t>((i + j) % 3) - 1);
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
    std::vector<uint64_t> bitmaps;
    for (uint64_t i = 0; i < 32; ++i) bitmaps.push_back((i < 16 ? 0xa5c3u : 0x137fu) ^ (i * 0x1111u & 0xffffu));
    return BlockPattern::from_csr(shape, indptr, indices, bitmap_index, bitmaps);
  };
  add(own);
  return cases;
}

}  // namespace tessera
