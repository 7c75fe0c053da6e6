// Packed sequences as problems, one a sequence.
#include <fmt/format.h>

#include <span>
#include <type_traits>
#include <vector>

#include "call/backward_problem.h"
#include "call/checks.h"
#include "call/problem.h"
#include "tessera/error.h"

namespace tessera {

namespace {

void check_offsets(const char* name, std::span<const int64_t> offsets, int64_t sequences, const char* tensor,
                   int64_t total) {
  if (static_cast<int64_t>(offsets.size()) != sequences + 1) {
    fail(name, fmt::format("{} numbers", offsets.size()),
         fmt::format("N + 1 = {} (one pattern a sequence)", sequences + 1));
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

// Rows of a packed [total, H, D] tensor as [1, S, H, D].
template <class View>
View sequence_of(const View& t, Interval rows) {
  if (!t.defined()) return {};
  View s = t;
  s.rank = 4;
  s.sizes = {1, rows.end - rows.begin, t.sizes[1], t.sizes[2]};
  s.strides = {0, t.strides[0], t.strides[1], t.strides[2]};
  // An empty sequence touches nothing: its base stays valid even at the end of the tensor.
  if (rows.begin < rows.end) {
    const int64_t bytes = rows.begin * t.strides[0] * static_cast<int64_t>(size_of(t.dtype));
    s.data = static_cast<std::conditional_t<std::is_same_v<View, TensorView>, const char*, char*>>(t.data) + bytes;
  }
  return s;
}

// Columns of a packed [H, total] tensor as [1, H, S].
template <class View>
View row_numbers_of(const View& t, Interval rows) {
  if (!t.defined()) return {};
  View s = t;
  s.rank = 3;
  s.sizes = {1, t.sizes[0], rows.end - rows.begin};
  s.strides = {0, t.strides[0], t.strides[1]};
  if (rows.begin < rows.end) {
    const int64_t bytes = rows.begin * t.strides[1] * static_cast<int64_t>(size_of(t.dtype));
    s.data = static_cast<std::conditional_t<std::is_same_v<View, TensorView>, const char*, char*>>(t.data) + bytes;
  }
  return s;
}

// A packed tensor as one sequence of all its rows. `optional`: may be undefined.
template <class View>
View whole(const char* name, const View& t, bool optional = false) {
  if (optional && !t.defined()) return {};
  if (t.rank != 3) fail(name, t.defined() ? fmt::format("rank {}", t.rank) : "no tensor", "[total, H, D]");
  return sequence_of(t, {0, t.sizes[0]});
}

template <class View>
View whole_numbers(const char* name, const View& t, bool optional = true) {
  if (optional && !t.defined()) return {};
  if (t.rank != 2) fail(name, t.defined() ? fmt::format("rank {}", t.rank) : "no tensor", "[H, total_q]");
  return row_numbers_of(t, {0, t.sizes[1]});
}

// The fields that calls in both directions have. Tensors as a batch of one sequence, so that the checks of `resolve`
// see the whole of them at once: sizes, dtypes, strides, and that no sequence's output overlaps another's input. There
// is no pattern of that sequence: with strides of 0 it may be longer than any memory.
template <class Args, class VarlenArgs>
Args packed(const VarlenArgs& args) {
  const AttentionOptions& o = args.options;
  if (!o.key_lengths.empty()) fail("key_lengths", "key lengths", "none for packed sequences");
  if (o.q_offset) fail("q_offset", fmt::format("{}", *o.q_offset), "none for packed sequences");
  if (o.attn_bias.defined()) fail("attn_bias", "a tensor", "none for packed sequences");
  if (o.block_bias.defined()) fail("block_bias", "a tensor", "none for packed sequences");
  Args all;
  all.q = whole("q", args.q);
  all.k = whole("k", args.k);
  all.v = whole("v", args.v);
  all.options = o;
  if (o.alibi_slopes.rank == 2) all.options.alibi_slopes = {};  // those of a sequence each
  return all;
}

// Those of sequence i: [B, H] slopes are picked, all else is common.
AttentionOptions options_of(const AttentionOptions& o, int64_t i) {
  AttentionOptions one = o;
  const TensorView& slopes = o.alibi_slopes;
  if (slopes.rank == 2 && slopes.sizes[1] > 0) {
    one.alibi_slopes.sizes[0] = 1;
    one.alibi_slopes.data = static_cast<const char*>(slopes.data) + i * slopes.strides[0] * 4;
  }
  return one;
}

// resolve_one() for each sequence, its rows and options in `one`, whose other tensors are picked by pick(one, queries,
// keys).
template <class Args, class VarlenArgs, class Pick, class Resolve>
auto resolve_each(const VarlenArgs& args, Args one, Pick pick, Resolve resolve_one) {
  const int64_t sequences = static_cast<int64_t>(args.patterns.size());
  // Copies: what was checked is what is used, whatever another thread writes meanwhile.
  const std::vector<int64_t> cu_seqlens_q(args.cu_seqlens_q.begin(), args.cu_seqlens_q.end());
  const std::vector<int64_t> cu_seqlens_k(args.cu_seqlens_k.begin(), args.cu_seqlens_k.end());
  check_offsets("cu_seqlens_q", cu_seqlens_q, sequences, "q", args.q.sizes[0]);
  check_offsets("cu_seqlens_k", cu_seqlens_k, sequences, "k", args.k.sizes[0]);
  const TensorView& slopes = args.options.alibi_slopes;
  if (slopes.rank == 2 && slopes.sizes[0] != sequences) {
    fail("alibi_slopes", fmt::format("slopes for {} sequences", slopes.sizes[0]), fmt::format("{}", sequences));
  }
  std::vector<decltype(resolve_one(one))> problems;
  problems.reserve(args.patterns.size());
  for (int64_t i = 0; i < sequences; ++i) {
    const Interval queries{cu_seqlens_q[i], cu_seqlens_q[i + 1]};
    const Interval keys{cu_seqlens_k[i], cu_seqlens_k[i + 1]};
    one.q = sequence_of(args.q, queries);
    one.k = sequence_of(args.k, keys);
    one.v = sequence_of(args.v, keys);
    one.pattern = args.patterns[i];
    one.options = options_of(args.options, i);
    pick(one, queries, keys);
    try {
      problems.push_back(resolve_one(one));
    } catch (const Error& e) {
      throw Error(e.argument(), fmt::format("sequence {}: {}", i, e.what()));
    }
  }
  return problems;
}

}  // namespace

std::vector<Problem> resolve_varlen(const VarlenForwardArgs& args) {
  ForwardArgs all = packed<ForwardArgs>(args);
  all.out = whole("out", args.out);
  all.lse = whole_numbers("lse", args.lse);
  resolve_without_pattern(all, Purpose::forward);
  const auto pick = [&](ForwardArgs& one, Interval queries, Interval) {
    one.out = sequence_of(args.out, queries);
    one.lse = row_numbers_of(args.lse, queries);
  };
  auto problems = resolve_each(args, all, pick, [](const ForwardArgs& one) { return resolve(one); });
  for (size_t i = 0; i < problems.size(); ++i) problems[i].batch_base = static_cast<int64_t>(i);
  return problems;
}

std::vector<BackwardProblem> resolve_backward_varlen(const VarlenBackwardArgs& args) {
  BackwardArgs all = packed<BackwardArgs>(args);
  all.out = whole("out", args.out);
  all.lse = whole_numbers("lse", args.lse, false);
  all.dout = whole("dout", args.dout);
  all.dlse = whole_numbers("dlse", args.dlse);
  all.dq = whole("dq", args.dq, true);
  all.dk = whole("dk", args.dk, true);
  all.dv = whole("dv", args.dv, true);
  all.dsinks = args.dsinks;
  resolve_without_pattern(all, Purpose::forward);
  const auto pick = [&](BackwardArgs& one, Interval queries, Interval keys) {
    one.out = sequence_of(args.out, queries);
    one.dout = sequence_of(args.dout, queries);
    one.lse = row_numbers_of(args.lse, queries);
    one.dlse = row_numbers_of(args.dlse, queries);
    one.dq = sequence_of(args.dq, queries);
    one.dk = sequence_of(args.dk, keys);
    one.dv = sequence_of(args.dv, keys);
  };
  auto problems = resolve_each(args, all, pick, [](const BackwardArgs& one) { return resolve_backward(one); });
  for (size_t i = 0; i < problems.size(); ++i) problems[i].forward.batch_base = static_cast<int64_t>(i);
  return problems;
}

}  // namespace tessera
