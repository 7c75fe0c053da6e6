// The entry points of the forward pass, and the one switch on the device.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <string>
#include <vector>

#include "attention/device.h"
#include "attention/overlap.h"
#include "attention/philox.h"
#include "attention/reference.h"
#include "cpu/attention.h"
#include "tessera/error.h"

namespace tessera {

ForwardInfo run_forward(std::span<const Problem> problems, DType dtype, Isa isa, Executor& executor) {
  if (dtype != DType::f64) return cpu::forward(problems, isa, executor);
  if (isa != Isa::automatic) fail("isa", name_of(isa), "auto for fp64, which the reference kernel computes");
  for (const Problem& p : problems) reference_attention(p, executor);
  return {};
}

namespace {

void check_offsets(const char* name, std::span<const int64_t> offsets, int64_t sequences, const char* tensor,
                   int64_t total) {
  if (static_cast<int64_t>(offsets.size()) != sequences + 1) {
    fail(name, fmt::format("{} numbers", offsets.size()), fmt::format("N + 1 = {} (one pattern a sequence)",
                                                                      sequences + 1));
  }
  if (offsets[0] != 0) fail(name, fmt::format("{} first", offsets[0]), "0");
  for (int64_t i = 0; i < sequences; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      fail(name, fmt::format("{} after {}", offsets[i + 1], offsets[i]), "non-decreasing offsets");
    }
  }
  if (offsets[sequences] != total) {
    fail(name, fmt::format("{} last", offsets[sequences]), fmt::format("{}, the rows of {}", total, tensor));
  }
}

// Rows begin .. end of a packed [total, H, D] tensor as [1, S, H, D].
template <class View>
View sequence_of(const View& t, int64_t begin, int64_t end) {
  View s = t;
  s.rank = 4;
  s.sizes = {1, end - begin, t.sizes[1], t.sizes[2]};
  s.strides = {0, t.strides[0], t.strides[1], t.strides[2]};
  // An empty sequence touches nothing: its base stays valid even at the end of the tensor.
  if (begin < end) {
    const int64_t bytes = begin * t.strides[0] * static_cast<int64_t>(size_of(t.dtype));
    s.data = static_cast<std::conditional_t<std::is_same_v<View, TensorView>, const char*, char*>>(t.data) + bytes;
  }
  return s;
}

// A packed tensor as one sequence of all its rows.
template <class View>
View whole(const char* name, const View& t) {
  if (t.rank != 3) fail(name, t.defined() ? fmt::format("rank {}", t.rank) : "no tensor", "[total, H, D]");
  return sequence_of(t, 0, t.sizes[0]);
}

// Tensors as a batch of one sequence, so that the checks of `resolve` see the whole of them at once: sizes, dtypes,
// strides, and that no sequence's output overlaps another's input.
void check_packed(const VarlenForwardArgs& args) {
  ForwardArgs all;
  all.q = whole("q", args.q);
  all.k = whole("k", args.k);
  all.v = whole("v", args.v);
  all.out = whole("out", args.out);
  PatternShape shape;
  shape.seqlen_q = std::max<int64_t>(0, args.q.sizes[0]);
  shape.seqlen_k = std::max<int64_t>(0, args.k.sizes[0]);
  if (shape.seqlen_q > (int64_t{1} << 40) || shape.seqlen_k > (int64_t{1} << 40)) {
    fail("q", fmt::format("{} and {} rows", shape.seqlen_q, shape.seqlen_k), "at most 2^40 packed tokens");
  }
  shape.block_q = shape.block_k = 256;
  all.pattern = BlockPattern::from_csr(shape, std::vector<int64_t>(shape.rows() + 1, 0), {});
  if (args.lse.defined()) {
    if (args.lse.rank != 2) fail("lse", fmt::format("rank {}", args.lse.rank), "[H, total_q]");
    all.lse = args.lse;
    all.lse.rank = 3;
    all.lse.sizes = {1, args.lse.sizes[0], args.lse.sizes[1]};
    all.lse.strides = {0, args.lse.strides[0], args.lse.strides[1]};
  }
  all.options.sinks = args.options.sinks;
  if (args.options.alibi_slopes.rank == 1) all.options.alibi_slopes = args.options.alibi_slopes;
  resolve(all);
}

}  // namespace

ForwardInfo forward(const ForwardArgs& args, Executor& executor) {
  const Problem problem = resolve(args);
  return run_forward({&problem, 1}, problem.dtype, args.isa, executor);
}

ForwardInfo forward_varlen(const VarlenForwardArgs& args, Executor& executor) {
  return run_forward(resolve_varlen(args), args.q.dtype, args.isa, executor);
}

std::vector<Problem> resolve_varlen(const VarlenForwardArgs& args) {
  const AttentionOptions& o = args.options;
  if (!o.key_lengths.empty()) fail("key_lengths", "key lengths", "none for packed sequences");
  if (o.q_offset) fail("q_offset", fmt::format("{}", *o.q_offset), "none for packed sequences");
  if (o.attn_bias.defined()) fail("attn_bias", "a tensor", "none for packed sequences");
  if (o.block_bias.defined()) fail("block_bias", "a tensor", "none for packed sequences");
  check_packed(args);
  const int64_t sequences = static_cast<int64_t>(args.patterns.size());
  check_offsets("cu_seqlens_q", args.cu_seqlens_q, sequences, "q", args.q.sizes[0]);
  check_offsets("cu_seqlens_k", args.cu_seqlens_k, sequences, "k", args.k.sizes[0]);
  const TensorView& slopes = o.alibi_slopes;
  if (slopes.rank == 2 && slopes.sizes[0] != sequences) {
    fail("alibi_slopes", fmt::format("slopes for {} sequences", slopes.sizes[0]), fmt::format("{}", sequences));
  }
  std::vector<Problem> problems;
  problems.reserve(sequences);
  ForwardArgs one;
  one.options = o;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t q_begin = args.cu_seqlens_q[i], q_end = args.cu_seqlens_q[i + 1];
    const int64_t k_begin = args.cu_seqlens_k[i], k_end = args.cu_seqlens_k[i + 1];
    one.q = sequence_of(args.q, q_begin, q_end);
    one.k = sequence_of(args.k, k_begin, k_end);
    one.v = sequence_of(args.v, k_begin, k_end);
    one.out = sequence_of(args.out, q_begin, q_end);
    one.pattern = args.patterns[i];
    if (args.lse.defined()) {
      one.lse = args.lse;
      one.lse.rank = 3;
      one.lse.sizes = {1, args.lse.sizes[0], q_end - q_begin};
      one.lse.strides = {0, args.lse.strides[0], args.lse.strides[1]};
      if (q_begin < q_end) {
        const int64_t bytes = q_begin * args.lse.strides[1] * static_cast<int64_t>(size_of(args.lse.dtype));
        one.lse.data = static_cast<char*>(args.lse.data) + bytes;
      }
    }
    if (slopes.rank == 2 && slopes.sizes[1] > 0) {
      one.options.alibi_slopes.sizes[0] = 1;
      one.options.alibi_slopes.data = static_cast<const char*>(slopes.data) + i * slopes.strides[0] * 4;
    }
    try {
      problems.push_back(resolve(one));
    } catch (const Error& e) {
      throw Error(e.argument(), fmt::format("sequence {}: {}", i, e.what()));
    }
    problems.back().batch_base = i;
  }
  return problems;
}

int64_t admitted_pairs(const BlockPattern& pattern, const AttentionOptions& options, int64_t batch, int64_t heads) {
  if (batch < 0) fail("batch", fmt::format("{}", batch), ">= 0");
  if (heads < 0) fail("heads", fmt::format("{}", heads), ">= 0");
  const Problem p = resolve_mask(pattern, options, batch, heads);
  const PatternShape& s = p.pattern.shape;
  // Batches differ by their pattern or their key length, heads by their pattern; the rest is counted once.
  const int64_t distinct_batches = s.batches > 1 || p.key_lengths ? batch : std::min<int64_t>(batch, 1);
  const int64_t distinct_heads = s.heads > 1 ? heads : std::min<int64_t>(heads, 1);
  int64_t pairs = 0;
  for (int64_t b = 0; b < distinct_batches; ++b) {
    const MaskGeometry mask = p.mask(b);
    for (int64_t h = 0; h < distinct_heads; ++h) {
      for (int64_t i = 0; i < s.rows(); ++i) {
        const int64_t q_begin = i * s.block_q, q_end = std::min(s.seqlen_q, q_begin + s.block_q);
        const int64_t row = p.pattern.row_id(b, h, i);
        for (int64_t e = p.pattern.indptr[row]; e < p.pattern.indptr[row + 1]; ++e) {
          const int64_t k_begin = static_cast<int64_t>(p.pattern.indices[e]) * s.block_k;
          const int64_t k_end = std::min(s.seqlen_k, k_begin + s.block_k);
          const TileKind kind = mask.classify(q_begin, q_end, k_begin, k_end);
          const uint64_t* bits = p.pattern.bitmap(e);
          if (kind == TileKind::empty) continue;
          if (kind == TileKind::full && bits == nullptr) {
            pairs += (q_end - q_begin) * (k_end - k_begin);
            continue;
          }
          for (int64_t q = q_begin; q < q_end; ++q) {
            const Interval keys = mask.keys_of(q, s.seqlen_k);
            const int64_t begin = std::max(keys.begin, k_begin) - k_begin, end = std::min(keys.end, k_end) - k_begin;
            if (bits == nullptr || end <= begin) {
              pairs += std::max<int64_t>(0, end - begin);
              continue;
            }
            const uint64_t* words = bits + (q - q_begin) * s.bitmap_words();
            for (int64_t w = begin / 64; w <= (end - 1) / 64; ++w) {
              const int64_t low = std::max<int64_t>(0, begin - w * 64), high = std::min<int64_t>(64, end - w * 64);
              const uint64_t inside = (~uint64_t{0} >> (64 - (high - low))) << low;
              pairs += std::popcount(words[w] & inside);
            }
          }
        }
      }
    }
  }
  const int64_t batch_repeats = distinct_batches == 0 ? 0 : batch / distinct_batches;
  const int64_t head_repeats = distinct_heads == 0 ? 0 : heads / distinct_heads;
  return pairs * batch_repeats * head_repeats;
}

uint32_t dropout_random(const Dropout& dropout, uint64_t batch_head, int64_t q_position, int64_t k_position) {
  const Philox::Counter counter = dropout_counter(dropout, batch_head, q_position, k_position);
  return Philox::words(counter, dropout_key(dropout))[k_position & 3];
}

}  // namespace tessera
