// What the cases are: shapes around tile edges, patterns, options.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "check/cases.h"

namespace tessera::check {

namespace {

// Products of one case in the fp64 reference: a few milliseconds.
constexpr int64_t kMaxProducts = 3'000'000;

int64_t random_length(Random& r) {
  if (r.chance(0.05)) return r.pick<int64_t>({512, 600, 640, 641});
  if (r.chance(0.2)) return r.between(0, 300);
  return r.pick<int64_t>({0,  1,  2,  15,  16,  17,  31,  32,  33,  47,  48,  63,  64,  65,  79, 80,
                          95, 96, 97, 111, 127, 128, 129, 143, 191, 192, 193, 255, 256, 257, 300});
}

int64_t random_head_dim(Random& r) {
  if (r.chance(0.1)) return r.between(1, 100);
  return r.pick<int64_t>({1,  3,  8,  16,  24,  31,  32,  33,  40,  48,  64,  64,  64, 65,
                          72, 80, 96, 112, 127, 128, 128, 129, 160, 192, 255, 256, 260});
}

void choose_pattern(Random& r, CaseConfig& c) {
  c.block_q = static_cast<int>(16 * r.pick<int64_t>({1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 16}));
  c.block_k = r.chance(0.5) ? c.block_q : static_cast<int>(16 * r.pick<int64_t>({1, 2, 3, 4, 5, 6, 8, 9, 12, 16}));
  c.source = r.pick(
      {PatternSource::random_csr, PatternSource::random_csr, PatternSource::random_bitmaps, PatternSource::named});
  c.kind = r.pick({PatternKind::dense, PatternKind::causal, PatternKind::local_window, PatternKind::dilated_sparse,
                   PatternKind::global_local, PatternKind::strided, PatternKind::random, PatternKind::bigbird});
  c.density = r.pick({0.05, 0.2, 0.5, 0.8, 1.0});
  c.pattern_causal = r.chance(0.4);
  c.pattern_placed = r.chance(0.3);
  c.pattern_per_head = r.chance(0.3);
  c.pattern_per_batch =
      r.chance(0.2) && c.source != PatternSource::named && c.path != CheckPath::varlen && c.path != CheckPath::dilated;
}

void choose_options(Random& r, CaseConfig& c) {
  const bool dilated = c.path == CheckPath::dilated, varlen = c.path == CheckPath::varlen;
  // A third of the cases is plain, a third has one or two options, a third many.
  const double p = r.pick({0.0, 0.08, 0.3});
  if (r.chance(p)) c.scale = r.pick({0.0, -0.3, 0.05, 0.5, 1.0});
  c.causal = c.pattern_causal ? r.chance(0.5) : r.chance(0.3);
  if (r.chance(p)) c.window_left = r.pick<int64_t>({0, 1, 15, 16, 40, 64, 100, 1000000000000});
  if (r.chance(p)) c.window_right = r.pick<int64_t>({0, 1, 15, 16, 40, 64, 100});
  if (!dilated && r.chance(p)) c.k_offset = r.pick<int64_t>({-1000, -7, 3, 64, 5000000000});
  if (!varlen && !dilated && r.chance(p)) c.q_offset = c.k_offset + r.between(-40, 40 + c.seqlen_k);
  c.key_lengths = !varlen && r.chance(p);
  c.align_to_key_lengths = c.key_lengths && !dilated && r.chance(0.5);
  if (r.chance(p)) c.softcap = r.pick({0.5, 5.0, 30.0});
  c.alibi = r.chance(p);
  c.alibi_per_batch = r.chance(0.5);
  c.block_bias = !varlen && !dilated && r.chance(p);
  c.attn_bias = !varlen && r.chance(p);
  c.attn_bias_dtype = r.pick({DType::f32, DType::f32, c.dtype, DType::f64, DType::bf16, DType::f16});
  c.bias_minus_infinity = r.chance(0.4);
  c.sinks = !dilated && r.chance(p);
  if (r.chance(p)) c.dropout = r.pick({0.01, 0.3, 0.5, 0.9});
}

void choose_backward(Random& r, CaseConfig& c) {
  const bool varlen = c.path == CheckPath::varlen;
  c.gradient_dtype = r.chance(0.5) ? c.dtype : DType::f32;
  c.accumulate = !varlen && c.gradient_dtype == DType::f32 && r.chance(0.3);
  c.dlse = r.chance(0.4);
  if (r.chance(0.25)) c.dq = r.chance(0.5), c.dk = r.chance(0.5), c.dv = r.chance(0.5);
  c.dblock_bias = r.chance(0.8);
  c.dattn_bias = r.chance(0.8);
  c.dsinks = r.chance(0.8);
  c.dattn_bias_fp32 = r.chance(0.5);
  c.nan_in_dout = c.visible_nan && c.path != CheckPath::paged && r.chance(0.3);
}

// Segments that do and do not divide the length, or reach beyond it, rates that do and do not divide the segment, up to
// more than it has tokens and more than there are heads.
void choose_dilation(Random& r, CaseConfig& c) {
  c.seqlen_k = c.seqlen_q;
  const int64_t groups = r.pick<int64_t>({1, 2, 2, 3});
  for (int64_t g = 0; g < groups; ++g) {
    c.segment_lengths.push_back(r.chance(0.5) ? r.between(1, c.seqlen_q + 40) : r.pick<int64_t>({16, 32, 64, 128}));
    c.dilation_rates.push_back(r.chance(0.2) ? r.between(1, 20) : r.pick<int64_t>({1, 1, 2, 2, 3, 4, 5, 8}));
  }
}

// The case taken apart by the definition must stay small: longer segments, until they are few.
void limit_segments(CaseConfig& c) {
  constexpr int64_t kMostSegments = 150;  // of one (w, r), over heads and batches
  for (int64_t& w : c.segment_lengths) {
    while (c.batch * c.heads * ((c.seqlen_q + w - 1) / w) > kMostSegments && w < c.seqlen_q) w *= 2;
  }
}

}  // namespace

CaseConfig random_config(uint64_t seed, int64_t number) {
  Random r(seed, static_cast<uint64_t>(number));
  CaseConfig c;
  c.seed = r.next();
  c.path = r.pick({CheckPath::panel, CheckPath::panel, CheckPath::panel, CheckPath::decode, CheckPath::decode,
                   CheckPath::varlen, CheckPath::paged, CheckPath::dilated});
  c.dtype = r.pick({DType::f32, DType::f32, DType::bf16, DType::f16});
  c.batch = r.pick<int64_t>({1, 1, 1, 2, 2, 3, 0});
  c.kv_heads = r.pick<int64_t>({1, 1, 2, 3});
  c.heads = c.kv_heads * r.pick<int64_t>({1, 1, 2, 3, 4, 8});
  c.seqlen_q = random_length(r);
  c.seqlen_k = r.chance(0.6) ? c.seqlen_q : random_length(r);
  c.head_dim = random_head_dim(r);
  c.head_dim_v = r.chance(0.7) ? c.head_dim : random_head_dim(r);
  if (c.path == CheckPath::decode || (c.path == CheckPath::paged && r.chance(0.6))) {
    c.seqlen_q = r.pick<int64_t>({1, 1, 1, 2, 3, 5, 7, 8, 12, 15, 16});
    c.seqlen_k = r.chance(0.6) ? r.between(1, 1500) : random_length(r);
  } else if (c.path == CheckPath::panel) {
    c.seqlen_q = c.seqlen_q == 0 || r.chance(0.02) ? c.seqlen_q : std::max<int64_t>(17, c.seqlen_q);
  } else if (c.path == CheckPath::dilated) {
    choose_dilation(r, c);
  }
  // Fewer heads and batches, then narrower heads, until the case is cheap.
  const auto products = [&] { return c.batch * c.heads * c.seqlen_q * c.seqlen_k * (c.head_dim + c.head_dim_v); };
  while (products() > kMaxProducts && (c.batch > 1 || c.heads > 1)) {
    if (c.batch > 1) --c.batch;
    else if (c.kv_heads > 1) c.heads = c.heads / c.kv_heads * (c.kv_heads - 1), --c.kv_heads;
    else --c.heads;
  }
  while (products() > 2 * kMaxProducts && c.head_dim + c.head_dim_v > 64) {
    c.head_dim = (c.head_dim + 1) / 2;
    c.head_dim_v = (c.head_dim_v + 1) / 2;
  }
  if (c.path == CheckPath::varlen) {
    c.batch = r.between(0, 4);
    const bool decode = r.chance(0.2);
    for (int64_t i = 0; i < c.batch; ++i) {
      const int64_t limit = std::max<int64_t>(1, 400 / c.batch);
      c.seqlens_k.push_back(std::min(limit, random_length(r)));
      c.seqlens_q.push_back(decode ? r.between(0, 3) : r.chance(0.6) ? c.seqlens_k.back() : r.between(0, limit));
    }
  }
  limit_segments(c);
  choose_pattern(r, c);
  choose_options(r, c);
  if (r.chance(0.25)) c.values = r.pick({Values::large, Values::max_last, Values::denormal});
  c.plain_layout = r.chance(0.3);
  // A key of weight 0 leaves open whether its value takes part (0 * NaN): dropped, -inf by a bias, or so far below the
  // maximum that exp gives 0 in fp32.
  const bool zero_weights = c.dropout > 0 || (c.attn_bias && c.bias_minus_infinity) || c.alibi || c.scale.has_value();
  c.visible_nan = c.values == Values::normal && !zero_weights && r.chance(0.15);
  choose_backward(r, c);
  return c;
}

std::string describe(const CaseConfig& c) {
  std::string text = fmt::format("{} {}", name_of(c.path), name_of(c.dtype));
  if (c.path == CheckPath::varlen) {
    text += fmt::format(" seqlens_q=[{}] seqlens_k=[{}]", fmt::join(c.seqlens_q, ","), fmt::join(c.seqlens_k, ","));
  } else {
    text += fmt::format(" B={} Sq={} Sk={}", c.batch, c.seqlen_q, c.seqlen_k);
  }
  text += fmt::format(" H={} Hkv={} D={} Dv={} block={}x{}", c.heads, c.kv_heads, c.head_dim, c.head_dim_v, c.block_q,
                      c.block_k);
  if (c.path == CheckPath::dilated) {
    text +=
        fmt::format(" segments=[{}] rates=[{}]", fmt::join(c.segment_lengths, ","), fmt::join(c.dilation_rates, ","));
  }
  const char* source = c.source == PatternSource::random_csr ? "csr" : "bitmaps";
  text += fmt::format(" pattern={} density={}", c.source == PatternSource::named ? name_of(c.kind) : source, c.density);
  if (c.pattern_causal) text += " pattern_causal";
  if (c.pattern_placed) text += " placed";
  if (c.pattern_per_head) text += " per_head";
  if (c.pattern_per_batch) text += " per_batch";
  if (c.scale) text += fmt::format(" scale={}", *c.scale);
  if (c.causal) text += " causal";
  if (c.window_left) text += fmt::format(" window_left={}", *c.window_left);
  if (c.window_right) text += fmt::format(" window_right={}", *c.window_right);
  if (c.q_offset) text += fmt::format(" q_offset={}", *c.q_offset);
  if (c.k_offset != 0) text += fmt::format(" k_offset={}", c.k_offset);
  if (c.key_lengths) text += c.align_to_key_lengths ? " key_lengths(aligned)" : " key_lengths";
  if (c.softcap > 0) text += fmt::format(" softcap={}", c.softcap);
  if (c.alibi) text += c.alibi_per_batch ? " alibi[B,H]" : " alibi[H]";
  if (c.block_bias) text += " block_bias";
  if (c.attn_bias) {
    text += fmt::format(" attn_bias={}{}", name_of(c.attn_bias_dtype), c.bias_minus_infinity ? "(-inf)" : "");
  }
  if (c.sinks) text += " sinks";
  if (c.dropout > 0) text += fmt::format(" dropout={}", c.dropout);
  constexpr const char* kValues[] = {"", " values=large", " values=max_last", " values=denormal"};
  text += kValues[static_cast<int>(c.values)];
  text += c.plain_layout ? " contiguous" : " strided";
  if (c.visible_nan) text += c.nan_in_dout ? " visible_nan(dout)" : " visible_nan";
  if (c.path == CheckPath::paged) return text;
  text += fmt::format(" gradients={}", name_of(c.gradient_dtype));
  if (c.accumulate) text += " accumulate";
  if (c.dlse) text += " dlse";
  if (!c.dq) text += " no_dq";
  if (!c.dk) text += " no_dk";
  if (!c.dv) text += " no_dv";
  if (c.block_bias && !c.dblock_bias) text += " no_dblock_bias";
  if (c.attn_bias && !c.dattn_bias) text += " no_dattn_bias";
  if (c.attn_bias && c.dattn_bias && c.dattn_bias_fp32) text += " dattn_bias=fp32";
  if (c.sinks && !c.dsinks) text += " no_dsinks";
  return text;
}

}  // namespace tessera::check
