#include "call/dilated_plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "pattern/geometry.h"
#include "tessera/error.h"

namespace tessera {

namespace {

// Rows offset, offset + rate, ... below `tokens`.
int64_t rows_of(int64_t tokens, int64_t offset, int64_t rate) {
  return tokens <= offset ? 0 : ceil_div(tokens - offset, rate);
}

// Heads first, first + step, ... of a pattern.
BlockPattern pick_heads(const BlockPattern& pattern, int64_t first, int64_t step, int64_t count) {
  const BlockPatternView from = pattern.view();
  PatternShape shape = from.shape;
  shape.heads = count;
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, bitmap_index;
  for (int64_t h = 0; h < count; ++h) {
    for (int64_t i = 0; i < shape.rows(); ++i) {
      const int64_t row = from.row_id(0, first + h * step, i);
      const int64_t begin = from.indptr[row], end = from.indptr[row + 1];
      indices.insert(indices.end(), from.indices + begin, from.indices + end);
      if (from.bitmap_index) {
        bitmap_index.insert(bitmap_index.end(), from.bitmap_index + begin, from.bitmap_index + end);
      }
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
  }
  std::vector<uint64_t> bitmaps;
  if (from.bitmap_index) {
    bitmaps.assign(from.bitmaps, from.bitmaps + pattern.num_bitmaps() * shape.block_q * shape.bitmap_words());
  }
  return BlockPattern::from_csr(shape, std::move(indptr), std::move(indices), std::move(bitmap_index),
                                std::move(bitmaps));
}

// A 64-bit mixer (SplitMix64; Steele, Lea, Flood 2014).
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

void check_dilated(const TensorView& q, const TensorView& k, const Dilation& dilation, const AttentionOptions& o) {
  if (dilation.segment_lengths.empty()) fail("segment_lengths", "none", "at least one");
  if (dilation.segment_lengths.size() != dilation.dilation_rates.size()) {
    fail("dilation_rates", fmt::format("{}", dilation.dilation_rates.size()),
         fmt::format("one a segment length: {}", dilation.segment_lengths.size()));
  }
  for (const int64_t w : dilation.segment_lengths) {
    if (w < 1) fail("segment_lengths", fmt::format("{}", w), ">= 1 token");
  }
  for (const int64_t r : dilation.dilation_rates) {
    if (r < 1) fail("dilation_rates", fmt::format("{}", r), ">= 1");
  }
  if (o.q_offset) fail("q_offset", fmt::format("{}", *o.q_offset), "none in dilated attention");
  if (o.k_offset != 0) fail("k_offset", fmt::format("{}", o.k_offset), "0 in dilated attention");
  if (dilation.pattern && dilation.pattern->q_offset) {
    fail("pattern", fmt::format("a q_offset of {}", *dilation.pattern->q_offset), "none in dilated attention");
  }
  if (o.align_to_key_lengths) fail("align_to_key_lengths", "true", "false in dilated attention");
  if (o.block_bias.defined()) fail("block_bias", "a tensor", "none in dilated attention");
  if (o.sinks.defined()) fail("sinks", "a tensor", "none in dilated attention");
  if (q.rank == 4 && k.rank == 4 && k.sizes[1] != q.sizes[1]) {
    fail("k", fmt::format("{} keys for {} queries", k.sizes[1], q.sizes[1]), "as many keys as queries");
  }
}

Problem sequence_without_tensors(int64_t seqlen, const Dilation& dilation, const AttentionOptions& options,
                                 int64_t batch, int64_t heads) {
  if (seqlen < 0) fail("seqlen", fmt::format("{}", seqlen), ">= 0");
  if (batch < 0) fail("batch", fmt::format("{}", batch), ">= 0");
  if (heads < 0) fail("heads", fmt::format("{}", heads), ">= 0");
  check_dilated({}, {}, dilation, options);
  Problem whole = resolve_mask(seqlen, seqlen, options, batch, heads);
  constexpr int64_t kMostRows = int64_t{1} << 40;  // products of these numbers then stay within 64 bits
  if (batch > kMostRows || heads > kMostRows || static_cast<__int128>(batch) * heads * seqlen > kMostRows) {
    fail("seqlen", fmt::format("{} x {} x {} rows", batch, heads, seqlen), "at most 2^40 of all batches and heads");
  }
  whole.kv_heads = heads;
  return whole;
}

bool evenly_spaced(const Problem& p) {
  const int64_t n = p.seqlen_q;
  for (const Strided* t : {&p.q, &p.k, &p.v, &p.out}) {
    if (!evenly_spaced(t->batch, t->seq, n)) return false;
  }
  const int64_t* bias = p.attn_bias_stride;
  return (p.lse.data == nullptr || evenly_spaced(p.lse.batch, p.lse.seq, n)) &&
         evenly_spaced(bias[0], bias[2] + bias[3], n) && p.alibi.batch == 0;
}

void set_lse(Problem& p, const Strided& lse, DType dtype) {
  p.lse = lse;
  p.lse_dtype = dtype;
}

Dropout dropout_of(const Dropout& dropout, int64_t group) {
  Dropout d = dropout;
  if (group > 0) d.seed ^= mix(static_cast<uint64_t>(group));
  return d;
}

DilatedPlan::DilatedPlan(const Problem& whole, const Dilation& dilation, const AttentionOptions& options, bool merge)
    : whole_(whole), dilation_(dilation), options_(options) {
  if (dilation.pattern) {
    whole_.causal = whole_.causal || dilation.pattern->causal || dilation.pattern->kind == PatternKind::causal;
  }
  const int64_t n = whole.seqlen_q;
  if (n == 0 || whole.batch == 0 || whole.heads == 0) return;
  for (size_t i = 0; i < dilation.segment_lengths.size(); ++i) {
    DilatedGroup g;
    g.segment = std::min(dilation.segment_lengths[i], n);
    // From here on a larger rate changes nothing: a segment has one row of a head at most. Products stay in 64 bits.
    g.rate = std::min(dilation.dilation_rates[i], std::max(g.segment, whole.heads));
    g.segments = ceil_div(n, g.segment);
    g.rows = ceil_div(g.segment, g.rate);
    groups_.push_back(g);
    add_group(static_cast<int64_t>(i), merge);
  }
}

std::pair<size_t, size_t> DilatedPlan::parts_of(size_t group) const {
  const auto is = [&](const DilatedPart& p, size_t g) { return static_cast<size_t>(p.group) < g; };
  const auto first = std::lower_bound(parts_.begin(), parts_.end(), group, is);
  const auto last = std::lower_bound(first, parts_.end(), group + 1, is);
  return {static_cast<size_t>(first - parts_.begin()), static_cast<size_t>(last - parts_.begin())};
}

void DilatedPlan::add_group(int64_t index, bool merge) {
  const DilatedGroup& g = groups_[index];
  const int64_t heads = whole_.heads, kv_heads = whole_.kv_heads, share = whole_.group();
  for (int64_t offset = 0; offset < std::min({g.rate, heads, g.segment}); ++offset) {
    DilatedPart part;
    part.group = index;
    part.offset = offset;
    part.head_step = g.rate;
    part.head = offset;
    part.heads = rows_of(heads, offset, g.rate);
    part.kv_head = offset / share;
    if (g.rate % share == 0) {  // the kv heads of these heads are all different and evenly spaced
      part.kv_step = g.rate / share;
      part.kv_heads = part.heads;
    } else if (share % g.rate == 0) {  // every kv head has equally many of them
      part.kv_step = 1;
      part.kv_heads = kv_heads;
    } else {  // uneven: a part for each kv head
      for (int64_t kv = 0; kv < kv_heads; ++kv) {
        part.head = kv * share + ((offset - kv * share) % g.rate + g.rate) % g.rate;
        part.heads = rows_of((kv + 1) * share, part.head, g.rate);
        part.kv_head = kv;
        part.kv_heads = 1;
        if (part.heads > 0) add_segments(part, whole_.seqlen_q, merge);
      }
      continue;
    }
    add_segments(part, whole_.seqlen_q, merge);
  }
}

// The whole segments, then the ragged one.
void DilatedPlan::add_segments(DilatedPart part, int64_t tokens, bool merge) {
  const DilatedGroup& g = groups_[part.group];
  const int64_t batch = whole_.batch, full = tokens / g.segment, tail = tokens % g.segment;
  part.rows = rows_of(g.segment, part.offset, g.rate);
  if (batch == 1 || full == 1 || (merge && tail == 0)) {
    part.batches = batch;
    part.segments = full;
    finish(part);
  } else if (batch <= full) {
    part.segments = full;
    part.batches = 1;
    for (part.batch = 0; part.batch < batch; ++part.batch) finish(part);
  } else {
    part.segments = 1;
    part.batches = batch;
    for (part.segment = 0; part.segment < full; ++part.segment) finish(part);
  }
  part.rows = rows_of(tail, part.offset, g.rate);
  if (part.rows == 0) return;
  part.batch = 0;
  part.batches = batch;
  part.segment = full;
  part.segments = 1;
  finish(part);
}

void DilatedPlan::finish(DilatedPart part) {
  const DilatedGroup& g = groups_[part.group];
  part.pattern = pattern_of(part.rows);
  if (part.pattern.shape().heads > 1) {
    BlockPattern& picked = picked_[{part.rows, part.head, part.head_step, part.heads}];
    if (picked.shape().seqlen_q == 0) {
      picked = pick_heads(part.pattern, part.head, part.head_step, part.heads);
    }
    part.pattern = picked;
  }
  if (whole_.key_lengths) {
    std::vector<int64_t>& lengths = key_lengths_.emplace_back();
    for (int64_t i = 0; i < part.batches * part.segments; ++i) {
      const int64_t tokens =
          whole_.key_lengths[part.batch + i / part.segments] - (part.segment + i % part.segments) * g.segment;
      lengths.push_back(std::min(part.rows, rows_of(tokens, part.offset, g.rate)));
    }
    part.key_lengths = lengths.data();
  }
  parts_.push_back(std::move(part));
}

const BlockPattern& DilatedPlan::pattern_of(int64_t rows) {
  const auto known = patterns_.find(rows);
  if (known != patterns_.end()) return known->second;
  PatternSpec spec = dilation_.pattern.value_or(PatternSpec{});
  spec.seqlen_q = spec.seqlen_k = rows;
  spec.causal = spec.causal || whole_.causal;
  BlockPattern pattern = dilation_.make ? dilation_.make(spec) : make_pattern(spec);
  const PatternShape& s = pattern.shape();
  if (s.seqlen_q != rows || s.seqlen_k != rows) {
    fail("pattern", fmt::format("{} x {} tokens", s.seqlen_q, s.seqlen_k),
         fmt::format("{} x {}, the rows of a dilated segment", rows, rows));
  }
  if (s.batches != 1) fail("pattern", fmt::format("{} batches", s.batches), "1 in dilated attention");
  if (s.q_offset && *s.q_offset != 0) {
    fail("pattern", fmt::format("a q_offset of {}", *s.q_offset), "none, or 0, in dilated attention");
  }
  whole_.causal = resolve_causal(s, options_.causal) || whole_.causal;
  if (s.heads != 1 && s.heads != whole_.heads) {
    fail("pattern", fmt::format("{} heads", s.heads), fmt::format("1 or H = {}", whole_.heads));
  }
  return patterns_.emplace(rows, std::move(pattern)).first->second;
}

Strided DilatedPlan::rows(const DilatedPart& part, const Strided& t, size_t element_size, bool kv) const {
  const DilatedGroup& g = groups_[part.group];
  Strided s;
  s.data = t.data == nullptr
               ? nullptr
               : t.at(part.batch, part.segment * g.segment + part.offset, kv ? part.kv_head : part.head, element_size);
  s.batch = batch_stride(part, t.batch, g.segment * t.seq);
  s.seq = g.rate * t.seq;
  s.head = (kv ? part.kv_step : part.head_step) * t.head;
  return s;
}

Strided DilatedPlan::compact(const DilatedPart& part, char* base, int64_t width, size_t element_size) const {
  const DilatedGroup& g = groups_[part.group];
  const int64_t of_segment = g.rows * width, of_batch = g.segments * of_segment, of_head = whole_.batch * of_batch;
  Strided s{base, of_batch, of_segment, of_head};
  s.data = s.at(part.batch, part.segment, part.head, element_size);
  s.batch = batch_stride(part, of_batch, of_segment);
  s.seq = width;
  s.head = part.head_step * of_head;
  return s;
}

Problem DilatedPlan::problem(const DilatedPart& part) const {
  const DilatedGroup& g = groups_[part.group];
  Problem p = whole_;
  p.batch = part.batches * part.segments;
  p.heads = part.heads;
  p.kv_heads = part.kv_heads;
  p.seqlen_q = p.seqlen_k = part.rows;
  p.q = rows(part, whole_.q, size_of(p.dtype));
  p.k = rows(part, whole_.k, size_of(p.dtype), true);
  p.v = rows(part, whole_.v, size_of(p.dtype), true);
  p.out = rows(part, whole_.out, size_of(p.out_dtype));
  p.lse = rows(part, whole_.lse, size_of(p.lse_dtype));
  p.pattern = part.pattern.view();
  // Distances between rows are rate tokens.
  if (p.window_left < MaskGeometry::kUnlimited) p.window_left /= g.rate;
  if (p.window_right < MaskGeometry::kUnlimited) p.window_right /= g.rate;
  p.key_lengths = part.key_lengths;
  p.row_distance = g.rate;
  for (HeadNumbers* n : p.head_numbers()) {
    *n = {n->at(part.batch, part.head), batch_stride(part, n->batch, 0), part.head_step * n->head};
  }
  if (p.attn_bias) {
    const int64_t* from = whole_.attn_bias_stride;
    const int64_t token = from[2] + from[3], first = part.segment * g.segment + part.offset;
    p.attn_bias +=
        (part.batch * from[0] + part.head * from[1] + first * token) * static_cast<int64_t>(size_of(p.attn_bias_dtype));
    p.attn_bias_stride[0] = batch_stride(part, from[0], g.segment * token);
    p.attn_bias_stride[1] = part.head_step * from[1];
    p.attn_bias_stride[2] = g.rate * from[2];
    p.attn_bias_stride[3] = g.rate * from[3];
  }
  p.dropout = dropout_of(whole_.dropout, part.group);
  p.stream_first = (part.batch * g.segments + part.segment) * whole_.heads + part.head;
  p.stream_batch = batch_stride(part, g.segments * whole_.heads, whole_.heads);
  p.stream_head = part.head_step;
  return p;
}

BackwardProblem DilatedPlan::problem(const DilatedPart& part, const BackwardProblem& whole) const {
  BackwardProblem p = whole;
  p.forward = problem(part);
  p.transposed = part.pattern.transposed();
  p.dout = rows(part, whole.dout, size_of(whole.forward.dtype));
  p.dlse = rows(part, whole.dlse, size_of(whole.forward.lse_dtype));
  p.dq = rows(part, whole.dq, size_of(whole.gradient_dtype));
  p.dk = rows(part, whole.dk, size_of(whole.gradient_dtype), true);
  p.dv = rows(part, whole.dv, size_of(whole.gradient_dtype), true);
  return p;
}

}  // namespace tessera
