// The memory of a case.
#include "check/cases.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "call/pair_mask.h"

namespace tessera::check {

namespace {

enum Role { kQuery, kKey, kValue };

}  // namespace

Tensor Case::tensor(DType dtype, std::initializer_list<int64_t> sizes, bool output, bool broadcast_heads) {
  Random& r = random_;
  Tensor t;
  MutableTensorView& v = t.view;
  v.dtype = dtype;
  for (const int64_t size : sizes) v.sizes[v.rank++] = size;
  // Dimensions from the innermost: contiguous, or heads and rows swapped ([B, H, S, D]), with gaps.
  std::array<int, 4> order{};
  for (int i = 0; i < v.rank; ++i) order[i] = v.rank - 1 - i;
  const bool contiguous = config_.plain_layout;
  if (!contiguous && v.rank >= 3 && r.chance(0.5)) std::swap(order[v.rank - 3], order[v.rank - 2]);
  const int64_t lead = contiguous ? 0 : r.below(9);
  int64_t extent = 1, base = lead;
  for (int i = 0; i < v.rank; ++i) {
    const int dim = order[i];
    const bool head = v.rank == 4 && dim == 2, batch = v.rank == 4 && dim == 0;
    if (!contiguous && !output && ((batch && r.chance(0.1)) || (head && broadcast_heads && r.chance(0.1)))) {
      v.strides[dim] = 0;
      continue;
    }
    v.strides[dim] = extent;
    extent *= std::max<int64_t>(1, v.sizes[dim]);
    if (!contiguous && r.chance(0.4)) extent += r.between(1, 5);
    if (!contiguous && i > 0 && v.sizes[dim] > 0 && r.chance(0.1)) {
      base += (v.sizes[dim] - 1) * v.strides[dim];
      v.strides[dim] = -v.strides[dim];
    }
  }
  const int64_t element = static_cast<int64_t>(size_of(dtype));
  t.memory.assign((lead + extent + (contiguous ? 0 : 9)) * element, kCanary);
  v.data = t.memory.data() + base * element;
  return t;
}

// Of no length yet.
PatternSpec Case::named_pattern(Random& r, int64_t heads) const {
  const CaseConfig& c = config_;
  PatternSpec spec;
  spec.kind = c.kind;
  spec.block_q = c.block_q;
  spec.block_k = c.block_k;
  spec.heads = std::max<int64_t>(1, heads);
  spec.causal = c.pattern_causal;
  const auto is = [&](PatternKind kind) { return c.kind == kind; };
  if (!is(PatternKind::dense) && !is(PatternKind::causal)) spec.density = c.density;
  if (is(PatternKind::global_local) || is(PatternKind::bigbird)) {
    spec.global_tokens = 20;
    spec.window = 50;
  }
  if (is(PatternKind::strided)) spec.stride = 3;
  spec.seed = r.next();
  return spec;
}

BlockPattern Case::pattern(Random& r, int64_t seqlen_q, int64_t seqlen_k, int64_t heads, int64_t batches) const {
  const CaseConfig& c = config_;
  if (c.source == PatternSource::named) {
    PatternSpec spec = named_pattern(r, heads);
    spec.seqlen_q = seqlen_q;
    spec.seqlen_k = seqlen_k;
    if (c.pattern_placed && c.path != CheckPath::dilated && seqlen_q <= seqlen_k) {
      spec.q_offset = r.between(0, seqlen_k - seqlen_q);
      spec.seqlen_total = seqlen_k + (spec.causal || c.kind == PatternKind::causal ? r.between(0, 200) : 0);
    }
    return make_pattern(spec);
  }
  PatternShape shape{
      seqlen_q, seqlen_k, c.block_q, c.block_k, std::max<int64_t>(1, heads), std::max<int64_t>(1, batches)};
  shape.causal = c.pattern_causal;
  if (c.pattern_placed) {
    shape.q_skip = static_cast<int>(r.between(0, shape.block_q - 1));
    if (c.path != CheckPath::dilated && r.chance(0.7)) shape.q_offset = r.between(-40, 40 + seqlen_k);
  }
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, bitmap_index;
  std::vector<uint64_t> bitmaps;
  int32_t count = 0;
  for (int64_t row = 0; row < shape.total_rows(); ++row) {
    const double density = r.chance(0.1) ? 0 : c.density;  // some rows are empty
    for (int64_t j = 0; j < shape.cols(); ++j) {
      if (!r.chance(density)) continue;
      indices.push_back(static_cast<int32_t>(j));
      if (c.source != PatternSource::random_bitmaps) continue;
      if (r.chance(0.4)) {
        bitmap_index.push_back(-1);
      } else if (count > 0 && r.chance(0.3)) {
        bitmap_index.push_back(static_cast<int32_t>(r.below(count)));  // shared
      } else {
        bitmap_index.push_back(count++);
        const int shifts = static_cast<int>(r.below(4));  // density 1, 1/2, 1/4, 1/8
        for (int q = 0; q < shape.block_q; ++q) {
          const bool empty = r.chance(0.1);
          for (int w = 0; w < shape.bitmap_words(); ++w) {
            uint64_t word = ~uint64_t{0};
            for (int i = 0; i < shifts; ++i) word &= r.next();
            const int bits = std::min(64, shape.block_k - 64 * w);
            bitmaps.push_back(empty ? 0 : word & (~uint64_t{0} >> (64 - bits)));
          }
        }
      }
    }
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  return BlockPattern::from_csr(shape, std::move(indptr), std::move(indices), std::move(bitmap_index),
                                std::move(bitmaps));
}

void Case::make_options() {
  Random& r = random_;
  const CaseConfig& c = config_;
  AttentionOptions& o = options_;
  o.scale = c.scale;
  if (c.causal || (!c.pattern_causal && c.kind != PatternKind::causal && r.chance(0.5))) o.causal = c.causal;
  o.window_left = c.window_left;
  o.window_right = c.window_right;
  o.q_offset = c.q_offset;
  o.k_offset = c.k_offset;
  o.softcap = c.softcap;
  o.dropout = {c.dropout, r.next(), r.next()};
  if (c.key_lengths) {
    for (int64_t b = 0; b < c.batch; ++b) key_lengths_.push_back(r.between(0, c.seqlen_k));
    o.key_lengths = key_lengths_;
    o.align_to_key_lengths = c.align_to_key_lengths && !key_lengths_.empty();
  }
  if (c.alibi) {
    alibi_ = c.alibi_per_batch ? tensor(DType::f32, {c.batch, c.heads}, false, false)
                               : tensor(DType::f32, {c.heads}, false, false);
    fill(alibi_, [&] { return r.uniform() * 0.3; });
    o.alibi_slopes = alibi_.view;
  }
  if (c.sinks) {
    sinks_ = tensor(DType::f32, {c.heads}, false, false);
    fill(sinks_, [&] { return 2 * r.normal(); });
    o.sinks = sinks_.view;
  }
  if (c.block_bias) {
    block_bias_ =
        tensor(DType::f32, {r.chance(0.5) ? c.batch : 1, r.chance(0.5) ? c.heads : 1, patterns_[0].num_blocks()}, false,
               false);
    o.block_bias = block_bias_.view;
  }
  if (c.attn_bias) {
    const auto size = [&](int64_t n) { return r.chance(0.6) ? n : 1; };
    attn_bias_ =
        tensor(c.attn_bias_dtype, {size(c.batch), size(c.heads), size(c.seqlen_q), size(c.seqlen_k)}, false, false);
    o.attn_bias = attn_bias_.view;
  }
}

void Case::make_page_table() {
  Random& r = random_;
  const CaseConfig& c = config_;
  const BlockPatternView pattern = args_.pattern.view();
  const int64_t cols = pattern.shape.cols(), total = c.batch * cols + 2;
  std::vector<int32_t> shuffled(total);
  std::iota(shuffled.begin(), shuffled.end(), 0);
  for (int64_t i = total - 1; i > 0; --i) std::swap(shuffled[i], shuffled[r.below(i + 1)]);
  pages_.assign(c.batch * cols, 0);
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t keys = c.key_lengths ? key_lengths_[b] : c.seqlen_k;
    std::vector<char> used(cols, 0);
    for (int64_t h = 0; h < pattern.shape.heads; ++h) {
      for (int64_t i = 0; i < pattern.shape.rows(); ++i) {
        const int64_t row = pattern.row_id(b, h, i);
        for (int64_t e = pattern.indptr[row]; e < pattern.indptr[row + 1]; ++e) used[pattern.indices[e]] = 1;
      }
    }
    for (int64_t j = 0; j < cols; ++j) {
      // Numbers that no kept block uses may be anything.
      const bool needed = used[j] && j * pattern.shape.block_k < keys;
      const int32_t garbage = r.chance(0.5) ? -1 : std::numeric_limits<int32_t>::max();
      pages_[b * cols + j] = needed ? shuffled[b * cols + j] : garbage;
    }
    // Two batches with a common first page.
    if (b > 0 && cols > 0 && pages_[b * cols] >= 0 && pages_[0] >= 0 && pages_[0] < total && r.chance(0.3)) {
      if (pages_[b * cols] != std::numeric_limits<int32_t>::max()) pages_[b * cols] = pages_[0];
    }
  }
  args_.page_table = PageTable{pages_.data(), c.batch, cols};
}

Case::Case(const CaseConfig& config) : config_(config), random_(config.seed, 1) {
  const CaseConfig& c = config_;
  const int64_t pattern_heads = c.pattern_per_head ? c.heads : 1;
  if (c.path == CheckPath::varlen) {
    cu_seqlens_q_ = cu_seqlens_k_ = {0};
    for (int64_t i = 0; i < c.batch; ++i) {
      cu_seqlens_q_.push_back(cu_seqlens_q_.back() + c.seqlens_q[i]);
      cu_seqlens_k_.push_back(cu_seqlens_k_.back() + c.seqlens_k[i]);
      patterns_.push_back(pattern(random_, c.seqlens_q[i], c.seqlens_k[i], pattern_heads, 1));
    }
    const int64_t total_q = cu_seqlens_q_.back(), total_k = cu_seqlens_k_.back();
    make_options();
    if (std::ranges::any_of(patterns_, [](const BlockPattern& p) { return p.shape().placed(); })) options_.k_offset = 0;
    q_ = tensor(c.dtype, {1, total_q, c.heads, c.head_dim}, false, true);
    k_ = tensor(c.dtype, {1, total_k, c.kv_heads, c.head_dim}, false, true);
    v_ = tensor(c.dtype, {1, total_k, c.kv_heads, c.head_dim_v}, false, true);
    out_ = tensor(c.dtype, {1, total_q, c.heads, c.head_dim_v}, true, false);
    lse_ = tensor(DType::f32, {1, c.heads, total_q}, true, false);
    varlen_.q = squeeze_batch<TensorView>(q_.view);
    varlen_.k = squeeze_batch<TensorView>(k_.view);
    varlen_.v = squeeze_batch<TensorView>(v_.view);
    varlen_.out = squeeze_batch(out_.view);
    varlen_.lse = squeeze_batch(lse_.view);
    varlen_.cu_seqlens_q = cu_seqlens_q_;
    varlen_.cu_seqlens_k = cu_seqlens_k_;
    varlen_.patterns = patterns_;
    varlen_.options = options_;
    problems_ = resolve_varlen(varlen_);
  } else if (c.path == CheckPath::dilated) {
    make_dilated();
  } else {
    patterns_.push_back(pattern(random_, c.seqlen_q, c.seqlen_k, pattern_heads, c.pattern_per_batch ? c.batch : 1));
    args_.pattern = patterns_[0];
    make_options();
    // What the call says must agree with where the pattern stands.
    if (const PatternShape& s = patterns_[0].shape(); s.placed()) {
      if (options_.q_offset || options_.k_offset != 0) options_.q_offset = s.diagonal() + options_.k_offset;
      options_.align_to_key_lengths = false;
    }
    const int64_t pages = c.batch * patterns_[0].shape().cols() + 2;
    const bool paged = c.path == CheckPath::paged;
    const int64_t kv_batch = paged ? pages : c.batch, kv_rows = paged ? c.block_k : c.seqlen_k;
    q_ = tensor(c.dtype, {c.batch, c.seqlen_q, c.heads, c.head_dim}, false, true);
    k_ = tensor(c.dtype, {kv_batch, kv_rows, c.kv_heads, c.head_dim}, false, true);
    v_ = tensor(c.dtype, {kv_batch, kv_rows, c.kv_heads, c.head_dim_v}, false, true);
    out_ = tensor(c.dtype, {c.batch, c.seqlen_q, c.heads, c.head_dim_v}, true, false);
    lse_ = tensor(DType::f32, {c.batch, c.heads, c.seqlen_q}, true, false);
    args_.q = q_.view;
    args_.k = k_.view;
    args_.v = v_.view;
    args_.out = out_.view;
    args_.lse = lse_.view;
    args_.options = options_;
    if (paged) make_page_table();
    problems_.push_back(resolve(args_));
  }
  fill_inputs();
  if (has_backward()) make_backward();
}

void Case::put_row(const Strided& rows, int64_t b, int64_t s, int64_t h, int64_t dim, int64_t position, int64_t length,
                   int role) {
  const DType dtype = config_.dtype;
  char* row = rows.at(b, s, h, size_of(dtype));
  const double scale = std::abs(config_.scale.value_or(1 / std::sqrt(static_cast<double>(config_.head_dim))));
  const double root = std::sqrt(static_cast<double>(config_.head_dim));
  // Standard deviation of a score: amplitude^2 * scale * sqrt(D); a third of 1e4.
  const double amplitude = std::sqrt(std::min(3600.0, 3300 / std::max(scale * root, 1e-3)));
  for (int64_t i = 0; i < dim; ++i) {
    double x = random_.normal();
    switch (config_.values) {
      case Values::normal: break;
      case Values::large:
        if (role != kValue) x *= amplitude;
        break;
      case Values::max_last:
        if (role == kQuery) x = 0.5 + random_.uniform();
        if (role == kKey) x += 60 / root * static_cast<double>(position + 1) / static_cast<double>(length);
        break;
      case Values::denormal:
        if (role != kQuery) x *= dtype == DType::f16 ? 0x1p-18 : 0x1p-130;
        break;
    }
    store_from_double(row, dtype, i, x);
  }
}

void Case::fill_inputs() {
  Random& r = random_;
  const bool bias = options_.attn_bias.defined();
  struct Row {
    const Strided* tensor;
    int64_t b, s, h, dim;
  };
  std::vector<Row> seen_rows[3];  // of each role
  for (const Problem& p : config_.path == CheckPath::dilated ? segment_problems_ : problems_) {
    const int64_t block_k = p.pattern.shape.block_k;
    std::vector<char> seen(p.batch * p.kv_heads * p.seqlen_k, 0);
    for (int64_t b = 0; b < p.batch; ++b) {
      const PairMask mask(p, b);
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t q = 0; q < p.seqlen_q; ++q) {
          const int64_t row = p.pattern.row_id(b, h, p.pattern.shape.row_of(q));
          bool any = false;
          for (int64_t e = p.pattern.indptr[row]; e < p.pattern.indptr[row + 1]; ++e) {
            bool used = false;
            mask.for_each_key(e, q, [&](int64_t k) {
              used = any = true;
              seen[(b * p.kv_heads + h / p.group()) * p.seqlen_k + k] = 1;
              if (!bias) return;
              const int64_t at = b * p.attn_bias_stride[0] + h * p.attn_bias_stride[1] + q * p.attn_bias_stride[2] +
                                 k * p.attn_bias_stride[3];
              const bool hidden = config_.bias_minus_infinity && (q % 7 == 3 || r.chance(0.1));
              const double value = hidden ? -std::numeric_limits<double>::infinity() : 2 * r.normal();
              store_from_double(const_cast<char*>(p.attn_bias), p.attn_bias_dtype, at, value);
            });
            if (used && p.block_bias) {
              const_cast<float*>(p.block_bias)[b * p.bias_batch + h * p.bias_head + e * p.bias_entry] =
                  static_cast<float>(2 * r.normal());
            }
          }
          if (!any) continue;
          put_row(p.q, b, q, h, p.head_dim, q, p.seqlen_q, kQuery);
          seen_rows[kQuery].push_back({&p.q, b, q, h, p.head_dim});
        }
      }
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        for (int64_t k = 0; k < p.seqlen_k; ++k) {
          if (!seen[(b * p.kv_heads + h) * p.seqlen_k + k]) continue;
          const bool paged = p.page_table != nullptr;
          const int64_t at = paged ? p.page_table[b * p.pages_per_batch + k / block_k] : b;
          const int64_t slot = paged ? k % block_k : k;
          put_row(p.k, at, slot, h, p.head_dim, k, p.seqlen_k, kKey);
          put_row(p.v, at, slot, h, p.head_dim_v, k, p.seqlen_k, kValue);
          seen_rows[kKey].push_back({&p.k, at, slot, h, p.head_dim});
          seen_rows[kValue].push_back({&p.v, at, slot, h, p.head_dim_v});
        }
      }
    }
  }
  if (!config_.visible_nan || config_.nan_in_dout || seen_rows[kKey].empty()) return;
  const Role role = r.pick({kQuery, kKey, kValue, kValue});
  const Row& row = seen_rows[role][r.below(static_cast<int64_t>(seen_rows[role].size()))];
  const double poison = role != kValue || r.chance(0.5) ? std::numeric_limits<double>::quiet_NaN()
                                                        : std::numeric_limits<double>::infinity();
  store_from_double(row.tensor->at(row.b, row.s, row.h, size_of(config_.dtype)), config_.dtype, r.below(row.dim),
                    poison);
}

ForwardInfo Case::run(Isa isa, Executor& executor) {
  reset(out_);
  reset(lse_);
  if (config_.path == CheckPath::varlen) {
    varlen_.isa = isa;
    return forward_varlen(varlen_, executor);
  }
  if (config_.path == CheckPath::dilated) {
    dilated_.isa = isa;
    return dilated_forward(dilated_, executor);
  }
  args_.isa = isa;
  return forward(args_, executor);
}

bool Case::surroundings_intact() const { return intact(out_) && intact(lse_); }

}  // namespace tessera::check
