// Dilated attention as a case: the calls, and the same by the definition, one segment at a time.
#include <algorithm>

#include "call/checks.h"
#include "call/dilated_plan.h"
#include "check/cases.h"

namespace tessera::check {

namespace {

Strided rows_of(const Strided& t, const Segment& s, int64_t head, DType dtype) {
  return {t.at(s.batch, s.first, head, size_of(dtype)), 0, s.rate * t.seq, 0};
}

}  // namespace

void Case::make_dilated() {
  const CaseConfig& c = config_;
  Dilation& dilation = dilated_.dilation;
  dilation.segment_lengths = c.segment_lengths;
  dilation.dilation_rates = c.dilation_rates;
  const int64_t pattern_heads = c.pattern_per_head ? c.heads : 1;
  if (c.source == PatternSource::named) {
    // Dense patterns also as what is computed where none is given.
    if (c.kind != PatternKind::dense || random_.chance(0.5)) dilation.pattern = named_pattern(random_, pattern_heads);
  } else {
    const uint64_t seed = random_.next();
    dilation.make = [this, seed, pattern_heads](const PatternSpec& spec) {
      Random random(seed, static_cast<uint64_t>(spec.seqlen_q));
      return pattern(random, spec.seqlen_q, spec.seqlen_k, pattern_heads, 1);
    };
  }
  make_options();
  q_ = tensor(c.dtype, {c.batch, c.seqlen_q, c.heads, c.head_dim}, false, true);
  k_ = tensor(c.dtype, {c.batch, c.seqlen_q, c.kv_heads, c.head_dim}, false, true);
  v_ = tensor(c.dtype, {c.batch, c.seqlen_q, c.kv_heads, c.head_dim_v}, false, true);
  out_ = tensor(c.dtype, {c.batch, c.seqlen_q, c.heads, c.head_dim_v}, true, false);
  lse_ = tensor(DType::f32, {c.batch, c.heads, c.seqlen_q}, true, false);
  dilated_.q = q_.view;
  dilated_.k = k_.view;
  dilated_.v = v_.view;
  dilated_.out = out_.view;
  dilated_.lse = lse_.view;
  dilated_.options = options_;
  problems_.push_back(resolve_dilated(dilated_, Purpose::forward));
  make_segments();
}

const BlockPattern& Case::segment_pattern(int64_t rows) {
  const auto known = segment_patterns_.find(rows);
  if (known != segment_patterns_.end()) return known->second;
  const Dilation& dilation = dilated_.dilation;
  PatternSpec spec = dilation.pattern.value_or(PatternSpec{});
  spec.seqlen_q = spec.seqlen_k = rows;
  spec.causal = spec.causal || options_.causal.value_or(false);
  return segment_patterns_[rows] = dilation.make ? dilation.make(spec) : make_pattern(spec);
}

void Case::make_segments() {
  const CaseConfig& c = config_;
  const Problem& whole = problems_[0];
  const int64_t n = c.seqlen_q;
  for (size_t g = 0; n > 0 && g < c.segment_lengths.size(); ++g) {
    const int64_t w = std::min(c.segment_lengths[g], n), rate = c.dilation_rates[g], count = (n + w - 1) / w;
    for (int64_t i = 0; i < c.batch * c.heads * count; ++i) {
      const int64_t b = i / count / c.heads, h = i / count % c.heads, number = i % count;
      const Segment s{static_cast<int64_t>(g), b, h, number * w + h % rate, rate};
      const int64_t end = std::min(n, (number + 1) * w);
      if (s.first >= end) continue;
      Problem p = whole;
      p.batch = p.heads = p.kv_heads = 1;
      p.seqlen_q = p.seqlen_k = (end - s.first + rate - 1) / rate;
      p.q = rows_of(whole.q, s, h, p.dtype);
      p.k = rows_of(whole.k, s, h / whole.group(), p.dtype);
      p.v = rows_of(whole.v, s, h / whole.group(), p.dtype);
      p.pattern = segment_pattern(p.seqlen_q).view();
      p.causal = p.causal || p.pattern.shape.causal;
      if (p.pattern.shape.heads > 1) p.pattern.indptr += h * p.pattern.shape.rows();
      p.pattern.shape.heads = 1;
      if (c.window_left) p.window_left = *c.window_left / rate;  // whole steps of `rate` tokens
      if (c.window_right) p.window_right = *c.window_right / rate;
      if (c.key_lengths) {
        int64_t keys = 0;
        while (keys < p.seqlen_k && s.first + keys * rate < key_lengths_[b]) ++keys;
        p.key_lengths = &segment_keys_.emplace_back(keys);
      }
      for (HeadNumbers* numbers : p.head_numbers()) *numbers = {numbers->at(b, h)};
      p.row_distance = rate;
      if (whole.attn_bias) {
        const int64_t* stride = whole.attn_bias_stride;
        p.attn_bias += (b * stride[0] + h * stride[1] + s.first * (stride[2] + stride[3])) *
                       static_cast<int64_t>(size_of(p.attn_bias_dtype));
        p.attn_bias_stride[2] = rate * stride[2];
        p.attn_bias_stride[3] = rate * stride[3];
      }
      p.dropout = dropout_of(options_.dropout, s.group);
      p.stream_first = (b * count + number) * c.heads + h;
      p.stream_batch = 0;
      p.stream_head = 1;
      segments_.push_back(s);
      segment_problems_.push_back(p);
    }
  }
}

void Case::make_dilated_backward() {
  DilatedBackwardArgs& a = dilated_backward_;
  a.q = dilated_.q;
  a.k = dilated_.k;
  a.v = dilated_.v;
  a.out = dilated_.out;
  a.lse = dilated_.lse;
  a.dout = dout_.view;
  a.dlse = dlse_.view;
  a.dq = gradients_[kDq].view;
  a.dk = gradients_[kDk].view;
  a.dv = gradients_[kDv].view;
  a.dattn_bias = gradients_[kDAttnBias].view;
  a.accumulate = config_.accumulate;
  a.dilation = dilated_.dilation;
  a.options = options_;
  for (size_t i = 0; i < segments_.size(); ++i) {
    BackwardProblem p;
    p.forward = segment_problems_[i];
    p.forward.lse_dtype = DType::f32;
    p.dout = rows_of(strided(dout_.view), segments_[i], segments_[i].head, config_.dtype);
    if (dlse_.view.defined()) {
      p.dlse = rows_of(strided_numbers(dlse_.view), segments_[i], segments_[i].head, DType::f32);
    }
    backward_problems_.push_back(p);
  }
}

}  // namespace tessera::check
