// The only place that validates an attention call.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "call/checks.h"
#include "call/philox.h"
#include "call/problem.h"
#include "pattern/geometry.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {

namespace {

constexpr int64_t kMaxHeadDim = 4096;               // rows of K and V panels are scratch of this width
constexpr int64_t kMaxPosition = int64_t{1} << 48;  // so that differences of positions stay below kUnlimited

void resolve_tensors(const ForwardArgs& args, Problem& p) {
  const TensorView &q = args.q, &k = args.k, &v = args.v;
  const bool paged = args.page_table.has_value();
  const std::string_view kv_dims = paged ? "[pages, block_k, Hkv, D]" : "[B, Sk, Hkv, D]";
  check_rank("q", q, 4, "[B, Sq, H, D]");
  check_rank("k", k, 4, kv_dims);
  check_rank("v", v, 4, kv_dims);
  check_memory("q", q);
  check_memory("k", k);
  check_memory("v", v);
  if (q.dtype != DType::f32 && q.dtype != DType::bf16 && q.dtype != DType::f16 && q.dtype != DType::f64) {
    fail("q", name_of(q.dtype), "fp32, bf16, fp16 or fp64");
  }
  check_dtype("k", k, q.dtype, ", the dtype of q");
  check_dtype("v", v, q.dtype, ", the dtype of q");
  p.dtype = q.dtype;
  p.batch = q.sizes[0];
  p.seqlen_q = q.sizes[1];
  p.heads = q.sizes[2];
  p.head_dim = q.sizes[3];
  p.kv_heads = k.sizes[2];
  p.head_dim_v = v.sizes[3];
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) {
    fail("q", fmt::format("head_dim {}", p.head_dim), fmt::format("1..{}", kMaxHeadDim));
  }
  if (k.sizes[3] != p.head_dim) fail("k", fmt::format("head_dim {}", k.sizes[3]), fmt::format("{}, as q", p.head_dim));
  if (p.head_dim_v < 1 || p.head_dim_v > kMaxHeadDim) {
    fail("v", fmt::format("head_dim {}", p.head_dim_v), fmt::format("1..{}", kMaxHeadDim));
  }
  const bool grouped = p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0;
  if (!grouped) {
    fail("k", fmt::format("{} kv heads for {} query heads", p.kv_heads, p.heads), "a divisor of the query heads");
  }
  if (v.sizes[2] != p.kv_heads) fail("v", fmt::format("{} heads", v.sizes[2]), fmt::format("{}, as k", p.kv_heads));
  if (!paged) {
    p.seqlen_k = k.sizes[1];
    if (k.sizes[0] != p.batch) fail("k", fmt::format("batch {}", k.sizes[0]), fmt::format("{}, as q", p.batch));
    if (v.sizes[0] != p.batch) fail("v", fmt::format("batch {}", v.sizes[0]), fmt::format("{}, as q", p.batch));
    if (v.sizes[1] != p.seqlen_k) {
      fail("v", fmt::format("{} rows", v.sizes[1]), fmt::format("{}, as k", p.seqlen_k));
    }
  } else {
    p.seqlen_k = args.pattern.shape().seqlen_k;
    if (v.sizes[0] != k.sizes[0]) fail("v", fmt::format("{} pages", v.sizes[0]), fmt::format("{}, as k", k.sizes[0]));
  }
  check_contiguous_last("q", q);
  check_contiguous_last("k", k);
  check_contiguous_last("v", v);
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
}

void resolve_pages(const ForwardArgs& args, Problem& p) {
  const PageTable& table = *args.page_table;
  const int64_t block_k = args.pattern.shape().block_k, pages = args.k.sizes[0];
  if (args.k.sizes[1] != block_k) {
    fail("k", fmt::format("pages of {} keys", args.k.sizes[1]), fmt::format("{}, the pattern's block_k", block_k));
  }
  if (args.v.sizes[1] != block_k) {
    fail("v", fmt::format("pages of {} keys", args.v.sizes[1]), fmt::format("{}, the pattern's block_k", block_k));
  }
  const int64_t cols = args.pattern.shape().cols();
  if (table.batch != p.batch || table.pages_per_batch != cols) {
    fail("page_table", fmt::format("[{}, {}]", table.batch, table.pages_per_batch),
         fmt::format("[B, ceil(Sk / block_k)] = [{}, {}]", p.batch, cols));
  }
  if (p.batch == 0 || cols == 0) return;
  if (table.data == nullptr) fail("page_table", "a null pointer", fmt::format("[{}, {}] int32", p.batch, cols));
  p.pages = std::make_shared<const std::vector<int32_t>>(table.data, table.data + p.batch * cols);
  p.page_table = p.pages->data();
  p.pages_per_batch = cols;
  // Only entries that a kept block uses: a cache fills its table as it grows.
  const BlockPatternView pattern = args.pattern.view();
  const PatternShape& s = pattern.shape;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = p.key_length(b);
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t first = pattern.indptr[pattern.row_id(b, h, 0)];
      const int64_t last = pattern.indptr[pattern.row_id(b, h, 0) + s.rows()];
      for (int64_t e = first; e < last; ++e) {
        const int64_t j = pattern.indices[e];
        const int32_t page = p.page_table[b * cols + j];
        if ((page < 0 || page >= pages) && j * block_k < keys) {
          fail("page_table", fmt::format("page {} for batch {}, block {}", page, b, j),
               fmt::format("0..{} where a kept block uses it", pages - 1));
        }
      }
    }
  }
}

void resolve_numbers(const AttentionOptions& o, Problem& p) {
  p.scale = o.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  // Kernels multiply with them, and with log2(e), in fp32: these stay normal numbers.
  constexpr double kLeast = 1e-30, kMost = 1e30;
  if (p.scale != 0 && !(std::abs(p.scale) >= kLeast && std::abs(p.scale) <= kMost)) {
    fail("scale", fmt::format("{}", p.scale), "0, or 1e-30 to 1e30 in magnitude");
  }
  if (o.softcap != 0 && !(o.softcap >= kLeast && o.softcap <= kMost)) {
    fail("softcap", fmt::format("{}", o.softcap), "1e-30 to 1e30, or 0 for off");
  }
  p.softcap = o.softcap;
  if (!(o.dropout.p >= 0 && o.dropout.p < 1)) fail("dropout", fmt::format("p = {}", o.dropout.p), "p in [0, 1)");
  p.dropout = o.dropout;
}

// A checked [H] or [B, H] view.
HeadNumbers head_numbers(const TensorView& t) {
  return {static_cast<const float*>(t.data), t.rank == 2 ? broadcast_stride(t, 0) : 0, broadcast_stride(t, t.rank - 1)};
}

void resolve_biases(const AttentionOptions& o, Problem& p) {
  if (const TensorView& t = o.alibi_slopes; t.defined()) {
    check_dtype("alibi_slopes", t, DType::f32, "");
    if (t.rank == 1) {
      check_shape("alibi_slopes", t, {p.heads}, false, "[H]");
    } else {
      check_shape("alibi_slopes", t, {p.batch, p.heads}, false, "[H] or [B, H]");
    }
    p.alibi = head_numbers(t);
  }
  if (const TensorView& t = o.block_bias; t.defined()) {
    check_dtype("block_bias", t, DType::f32, "");
    const int64_t entries = p.pattern.indptr[p.pattern.shape.total_rows()];
    check_rank("block_bias", t, 3, "[B or 1, H or 1, entries]");
    if (t.sizes[2] != entries) {
      fail("block_bias", "shape " + shape_text(t), fmt::format("{} entries, the pattern's kept blocks", entries));
    }
    check_shape("block_bias", t, {p.batch, p.heads, entries}, true, "[B, H, entries]");
    p.block_bias = static_cast<const float*>(t.data);
    p.bias_batch = broadcast_stride(t, 0);
    p.bias_head = broadcast_stride(t, 1);
    p.bias_entry = broadcast_stride(t, 2);
  }
  if (const TensorView& t = o.attn_bias; t.defined()) {
    if (!is_floating(t.dtype)) fail("attn_bias", name_of(t.dtype), "fp32, bf16, fp16 or fp64");
    check_shape("attn_bias", t, {p.batch, p.heads, p.seqlen_q, p.seqlen_k}, true, "[B, H, Sq, Sk]");
    p.attn_bias = static_cast<const char*>(t.data);
    p.attn_bias_dtype = t.dtype;
    for (int i = 0; i < 4; ++i) p.attn_bias_stride[i] = broadcast_stride(t, i);
  }
  if (const TensorView& t = o.sinks; t.defined()) {
    check_dtype("sinks", t, DType::f32, "");
    check_shape("sinks", t, {p.heads}, false, "[H]");
    p.sinks = head_numbers(t);
  }
}

void resolve_outputs(const ForwardArgs& args, Purpose purpose, Problem& p) {
  const TensorView out = args.out, lse = args.lse;
  check_shape("out", out, {p.batch, p.seqlen_q, p.heads, p.head_dim_v}, false, "[B, Sq, H, Dv]");
  const bool fp64_out = purpose == Purpose::reference && out.dtype == DType::f64;
  if (!fp64_out) check_dtype("out", out, p.dtype, ", the dtype of q");
  check_contiguous_last("out", out);
  check_output("out", out);
  p.out = strided(out);
  p.out_dtype = out.dtype;
  if (lse.defined()) {
    check_shape("lse", lse, {p.batch, p.heads, p.seqlen_q}, false, "[B, H, Sq]");
    const bool fp64_lse = lse.dtype == DType::f64 && (purpose == Purpose::reference || p.dtype == DType::f64);
    if (!fp64_lse) check_dtype("lse", lse, DType::f32, "");
    check_output("lse", lse);
    check_disjoint("lse", lse, "out", out);
    p.lse = strided_numbers(lse);
    p.lse_dtype = lse.dtype;
  }
  const PageTable table = args.page_table.value_or(PageTable{});
  std::vector<NamedView> inputs = inputs_of(args.options);
  inputs.insert(inputs.end(),
                {{"q", args.q},
                 {"k", args.k},
                 {"v", args.v},
                 {"page_table", array_view(table.data, table.batch * table.pages_per_batch, DType::i32)}});
  for (const NamedView& input : inputs) {
    check_disjoint("out", out, input.name, input.view);
    check_disjoint("lse", lse, input.name, input.view);
  }
}

void check_position(const char* name, int64_t value) {
  if (value < -kMaxPosition || value > kMaxPosition) fail(name, fmt::format("{}", value), "-2^48..2^48");
}

// What of the options concerns masks; the lengths and the batch are set.
void resolve_positions(const AttentionOptions& o, Problem& p) {
  p.causal = o.causal.value_or(false);
  if (o.window_left) {
    if (*o.window_left < 0) fail("window_left", fmt::format("{}", *o.window_left), ">= 0 tokens");
    p.window_left = std::min(*o.window_left, MaskGeometry::kUnlimited);
  }
  if (o.window_right) {
    if (*o.window_right < 0) fail("window_right", fmt::format("{}", *o.window_right), ">= 0 tokens");
    p.window_right = std::min(*o.window_right, MaskGeometry::kUnlimited);
  }
  p.q_offset_given = o.q_offset.has_value();
  p.q_offset = o.q_offset.value_or(0);
  p.k_offset = o.k_offset;
  check_position("q", p.seqlen_q);
  check_position("k", p.seqlen_k);
  check_position("q_offset", p.q_offset);
  check_position("k_offset", p.k_offset);
  if (!o.key_lengths.empty()) {
    if (static_cast<int64_t>(o.key_lengths.size()) != p.batch) {
      fail("key_lengths", fmt::format("{} numbers", o.key_lengths.size()), fmt::format("one a batch, B = {}", p.batch));
    }
    p.lengths = std::make_shared<const std::vector<int64_t>>(o.key_lengths.begin(), o.key_lengths.end());
    p.key_lengths = p.lengths->data();
    for (int64_t b = 0; b < p.batch; ++b) {
      if (p.key_lengths[b] < 0 || p.key_lengths[b] > p.seqlen_k) {
        fail("key_lengths", fmt::format("{} for batch {}", p.key_lengths[b], b), fmt::format("0..Sk = {}", p.seqlen_k));
      }
    }
  }
  p.align_to_key_lengths = o.align_to_key_lengths;
}

// Whether every pair that causality (or nothing) admits with query 0 at position `diagonal` is kept: then the pattern
// is as good there as where it was made.
bool is_dense_at(const BlockPatternView& pattern, bool causal, int64_t diagonal) {
  if (pattern.bitmap_index != nullptr) return false;
  PatternShape s = pattern.shape;
  s.q_offset = diagonal;
  for (int64_t r = 0; r < s.total_rows(); ++r) {
    const int64_t needed = admissible_cols(s, causal, r % s.rows());
    const int64_t begin = pattern.indptr[r];
    if (pattern.indptr[r + 1] - begin < needed) return false;
    if (needed > 0 && pattern.indices[begin + needed - 1] != needed - 1) return false;
  }
  return true;
}

// Causality and position of a call and its pattern: what is not said is the pattern's, what contradicts it an Error.
// Offsets and key lengths are set.
void place_pattern(const AttentionOptions& o, Problem& p) {
  const PatternShape& s = p.pattern.shape;
  p.causal = resolve_causal(s, o.causal);
  if (!s.placed()) return;
  const bool aligned = p.align_to_key_lengths && p.key_lengths != nullptr;
  if (!p.q_offset_given && !aligned && p.k_offset == 0) {
    p.q_offset_given = s.q_offset.has_value();
    if (p.q_offset_given) p.q_offset = s.diagonal();
    return;
  }
  // Without causality, at the end of the keys: whoever says another position means it.
  if (!s.causal && !aligned && s.diagonal() == s.seqlen_k - s.seqlen_q) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.diagonal(b) == s.diagonal() || is_dense_at(p.pattern, p.causal, p.diagonal(b))) continue;
    const std::string allowed = fmt::format(
        "query 0 at position {} of the keys, where the pattern was made (a pattern for other rows: "
        "for_queries(pattern, begin, end), or a spec with q_offset)",
        s.diagonal());
    if (!aligned) {
      if (!p.q_offset_given) fail("k_offset", fmt::format("{} without q_offset", p.k_offset), allowed);
      fail("q_offset", fmt::format("{} with k_offset {}", p.q_offset, p.k_offset), allowed);
    }
    fail("key_lengths",
         fmt::format("{} for batch {}, with which query 0 is at position {}", p.key_length(b), b, p.diagonal(b)),
         allowed);
  }
}

void set_pattern(const BlockPattern& pattern, Problem& p) {
  p.pattern = pattern.view();
  const PatternShape& s = p.pattern.shape;
  if (s.heads != 1 && s.heads != p.heads) {
    fail("pattern", fmt::format("{} heads", s.heads), fmt::format("1 or H = {}", p.heads));
  }
  if (s.batches != 1 && s.batches != p.batch) {
    fail("pattern", fmt::format("{} batches", s.batches), fmt::format("1 or B = {}", p.batch));
  }
}

// All but tensors and pattern, which are set.
void resolve_rest(const ForwardArgs& args, Purpose purpose, Problem& p) {
  resolve_positions(args.options, p);
  if (p.pattern.indptr != nullptr) place_pattern(args.options, p);
  if (args.page_table) resolve_pages(args, p);
  resolve_numbers(args.options, p);
  resolve_biases(args.options, p);
  if (purpose != Purpose::weights) resolve_outputs(args, purpose, p);
}

}  // namespace

std::vector<NamedView> inputs_of(const AttentionOptions& o) {
  return {{"alibi_slopes", o.alibi_slopes},
          {"block_bias", o.block_bias},
          {"attn_bias", o.attn_bias},
          {"sinks", o.sinks},
          {"key_lengths", array_view(o.key_lengths.data(), static_cast<int64_t>(o.key_lengths.size()), DType::i64)}};
}

Problem resolve_mask(int64_t seqlen_q, int64_t seqlen_k, const AttentionOptions& options, int64_t batch,
                     int64_t heads) {
  Problem p;
  p.batch = batch;
  p.heads = heads;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  resolve_positions(options, p);
  return p;
}

Problem resolve_mask(const BlockPattern& pattern, const AttentionOptions& options, int64_t batch, int64_t heads) {
  const PatternShape& s = pattern.shape();
  Problem p = resolve_mask(s.seqlen_q, s.seqlen_k, options, batch, heads);
  set_pattern(pattern, p);
  place_pattern(options, p);
  return p;
}

Problem resolve_without_pattern(const ForwardArgs& args, Purpose purpose) {
  Problem p;
  resolve_tensors(args, p);
  resolve_rest(args, purpose, p);
  return p;
}

Problem resolve(const ForwardArgs& args, Purpose purpose) {
  Problem p;
  resolve_tensors(args, p);
  const PatternShape& s = args.pattern.shape();
  if (s.seqlen_q != p.seqlen_q || s.seqlen_k != p.seqlen_k) {
    fail("pattern", fmt::format("a pattern of {} x {} tokens", s.seqlen_q, s.seqlen_k),
         fmt::format("Sq x Sk = {} x {}", p.seqlen_q, p.seqlen_k));
  }
  set_pattern(args.pattern, p);
  resolve_rest(args, purpose, p);
  return p;
}

uint32_t dropout_random(const Dropout& dropout, uint64_t batch_head, int64_t q_position, int64_t k_position) {
  const Philox::Counter counter = dropout_counter(dropout, batch_head, q_position, k_position);
  return Philox::words(counter, dropout_key(dropout))[k_position & 3];
}

}  // namespace tessera
