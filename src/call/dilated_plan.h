// Dilated attention as ordinary problems on strided views: which rows, heads, segments and batches go together.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "call/backward_problem.h"
#include "call/problem.h"
#include "tessera/dilated.h"

namespace tessera {

// One (w, r) over a sequence: w clipped to it.
struct DilatedGroup {
  int64_t segment = 0;   // w, tokens
  int64_t rate = 1;      // r
  int64_t segments = 0;  // the last one may be ragged
  int64_t rows = 0;      // of offset 0 in a whole segment: the most there are

  // The one offset that covers a token, and its index among the dilated rows of all segments (`rows` each).
  struct Place {
    int64_t offset = 0, index = 0;
  };
  Place place(int64_t token) const {
    const int64_t inside = token % segment;
    return {inside % rate, token / segment * rows + inside / rate};
  }
};

// One problem of a group: rows offset, offset + rate, ... of some segments of some batches, for some heads with that
// offset. Its batch i is segment `segment + i % segments` of batch `batch + i / segments`.
struct DilatedPart {
  int64_t group = 0;
  int64_t offset = 0, rows = 0;
  int64_t batch = 0, batches = 0;
  int64_t segment = 0, segments = 0;
  int64_t head = 0, head_step = 1, heads = 0;
  int64_t kv_head = 0, kv_step = 1, kv_heads = 0;
  BlockPattern pattern;
  const int64_t* key_lengths = nullptr;  // [batches * segments] dilated rows that are keys, or nullptr
};

class DilatedPlan {
 public:
  // `whole`: the call as one problem over the sequence, whatever its pattern. Heads that meet in a row of k and v are
  // in one part, so no two parts of a group write to one place of anything shaped like q, k or v.
  // `merge`: segments of several batches may be one part, as evenly_spaced() holds for every tensor of the call.
  DilatedPlan(const Problem& whole, const Dilation& dilation, const AttentionOptions& options, bool merge);

  bool causal() const { return whole_.causal; }
  const std::vector<DilatedGroup>& groups() const { return groups_; }
  const std::vector<DilatedPart>& parts() const { return parts_; }  // by group
  std::pair<size_t, size_t> parts_of(size_t group) const;           // first, last + 1

  // The part as a problem on the rows of q, k, v, out and lse of `whole`. The plan must outlive it.
  Problem problem(const DilatedPart& part) const;
  // The same of a backward call: its rows of dout, dlse and the gradients of `whole`, whose other fields are kept.
  BackwardProblem problem(const DilatedPart& part, const BackwardProblem& whole) const;

  // The part's rows of a tensor [B, S, H, ..] or (kv) [B, S, Hkv, ..].
  Strided rows(const DilatedPart& part, const Strided& t, size_t element_size, bool kv = false) const;

  // The part's rows of a buffer of its group's rows alone: [H, B, segments, rows, width], `elements` in all.
  Strided compact(const DilatedPart& part, char* base, int64_t width, size_t element_size) const;
  int64_t elements(const DilatedGroup& group, int64_t width) const {
    return whole_.heads * whole_.batch * group.segments * group.rows * width;
  }

 private:
  void add_group(int64_t index, bool merge);
  void add_segments(DilatedPart part, int64_t tokens, bool merge);
  void finish(DilatedPart part);
  const BlockPattern& pattern_of(int64_t rows);
  int64_t batch_stride(const DilatedPart& part, int64_t of_batch, int64_t of_segment) const {
    return part.segments > 1 ? of_segment : of_batch;
  }

  Problem whole_;
  const Dilation& dilation_;
  const AttentionOptions& options_;
  std::vector<DilatedGroup> groups_;
  std::vector<DilatedPart> parts_;
  std::map<int64_t, BlockPattern> patterns_;               // by rows
  std::map<std::array<int64_t, 4>, BlockPattern> picked_;  // by rows and heads, where heads have patterns of their own
  std::deque<std::vector<int64_t>> key_lengths_;           // of parts
};

// Error for what dilated attention has no meaning for.
void check_dilated(const TensorView& q, const TensorView& k, const Dilation& dilation, const AttentionOptions& options);

// The strides of batches and tokens put all segments of all batches at one distance from each other (if w divides S).
inline bool evenly_spaced(int64_t batch, int64_t seq, int64_t seqlen) { return batch == seq * seqlen; }
bool evenly_spaced(const Problem& whole);  // q, k, v, out, lse and biases

// The call as one problem over the sequence, without a pattern: q may be a view of stride 0, longer than any memory.
Problem resolve_dilated(const DilatedForwardArgs& args, Purpose purpose);
BackwardProblem resolve_dilated(const DilatedBackwardArgs& args, Purpose purpose);

// A call that is only looked at: masks, one kv head for each head.
Problem sequence_without_tensors(int64_t seqlen, const Dilation& dilation, const AttentionOptions& options,
                                 int64_t batch, int64_t heads);

void set_lse(Problem& p, const Strided& lse, DType dtype);

// Dropout of one (w, r): a seed of its own; that of the first is the caller's, so that one (w, r) of rate 1 over the
// whole sequence is the ordinary call.
Dropout dropout_of(const Dropout& dropout, int64_t group);

}  // namespace tessera
