// Dilated attention (LongNet: Ding et al. 2023, sections 2.2 and 2.3).
//
// For each (w, r) of segment_lengths, dilation_rates the sequence is cut into segments of w tokens; of each, head h
// keeps rows o, o + r, o + 2r, ... with o = h mod r, and attends among them. The results of all (w, r) are joined by
// their lse, which equals ONE softmax over the multiset of all keys that the (w, r) admit for a query. Segments longer
// than the sequence are clipped, the last one may be ragged. A query that no (w, r) covers has output 0, lse -inf and
// zero gradients; q, k and v rows that none reads may hold anything.
//
// Rows are read and written where they lie, by strides: nothing is gathered.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "tessera/attention.h"
#include "tessera/backward.h"
#include "tessera/patterns.h"

namespace tessera {

struct Dilation {
  std::span<const int64_t> segment_lengths;  // w: tokens, each >= 1; at least one
  std::span<const int64_t> dilation_rates;   // r: each >= 1, one a segment length
  // The pattern inside each dilated segment: its tokens are the rows that are left, row i being token o + i r of the
  // segment. A template: seqlen_q and seqlen_k (both the length of a dilated segment) are filled in for every length
  // that occurs, and causal is set where the options say so. heads: 1 or H. Not given: dense.
  std::optional<PatternSpec> pattern;
  // What makes a pattern of the filled-in template; not given: make_pattern. A cache goes here, or a pattern of one's
  // own (batches 1).
  std::function<BlockPattern(const PatternSpec&)> make;
};

// Options: scale, causal, window_left and window_right (tokens), key_lengths, softcap, alibi_slopes (distance in
// tokens), attn_bias (of token pairs), dropout (each (w, r) draws on its own: stream
// (b * segments + segment) * H + h, positions inside the dilated segment). Error for the others: positions are those of
// the sequence (q_offset, k_offset, align_to_key_lengths), a block bias has no pattern to belong to, and a sink would
// join the denominator once per (w, r).
struct DilatedForwardArgs {
  TensorView q;           // [B, S, H, D]; last stride 1
  TensorView k;           // [B, S, Hkv, D], H % Hkv == 0
  TensorView v;           // [B, S, Hkv, Dv]
  MutableTensorView out;  // [B, S, H, Dv], dtype of q; must not overlap an input
  MutableTensorView lse;  // fp32 [B, H, S] (fp64 inputs: or fp64), natural log, of the joined softmax; may be undefined
  Dilation dilation;
  AttentionOptions options;
  Isa isa = Isa::automatic;
};

// dtypes as in forward(). One (w, r) writes to out directly. Of several, each but the first with rate 1 has a partial
// result of its rows until the join, in the dtype of q: about 1 / r of out and lse, counted in scratch_bytes. Partials
// of bf16 and fp16 are rounded once more than the result: their weights in the join sum to 1, so an element is at most
// one rounding (half an epsilon of the largest partial) further away than it would be without.
ForwardInfo dilated_forward(const DilatedForwardArgs& args, Executor& executor);

// The same attention in fp64 throughout, by the plainest code there is; `out` and `lse` of args may be fp64 whatever
// the inputs are. out_bound [B, S, H, Dv] and lse_bound [B, H, S] (contiguous), if not null, receive a bound on the
// error that dilated_forward() may have there: rounding alone. Memory: out in fp64 and its bound for each (w, r).
void reference_dilated_forward(const DilatedForwardArgs& args, Executor& executor, float* out_bound = nullptr,
                               float* lse_bound = nullptr);

struct DilatedBackwardArgs {
  TensorView q;     // [B, S, H, D]; last stride 1
  TensorView k;     // [B, S, Hkv, D]
  TensorView v;     // [B, S, Hkv, Dv]
  TensorView out;   // [B, S, H, Dv]: what dilated_forward() gave
  TensorView lse;   // [B, H, S]: what dilated_forward() gave
  TensorView dout;  // [B, S, H, Dv], dtype of q; last stride 1
  TensorView dlse;  // gradient that reaches lse, as lse; may be undefined: 0
  // Each may be undefined: not wanted. dtype of q, or fp32; all that are given have the same one.
  MutableTensorView dq;     // [B, S, H, D]; last stride 1
  MutableTensorView dk;     // [B, S, Hkv, D]
  MutableTensorView dv;     // [B, S, Hkv, Dv]
  bool accumulate = false;  // adds to dq, dk and dv instead of writing them; they are then fp32 (fp64 inputs: fp64)
  MutableTensorView dattn_bias;  // fp32 or the dtype of attn_bias, the sizes of options.attn_bias; written, 0 for
                                 // pairs that no (w, r) admits. May be undefined
  Dilation dilation;             // those of the forward call
  AttentionOptions options;
  Isa isa = Isa::automatic;
};

// Gradients through attention and join together: the weight of a key in the joined softmax is exp(score - lse), so each
// (w, r) is a backward() with the joined out and lse, and their gradients add up. The (w, r) run one after the other;
// 16-bit gradients have an fp32 buffer unless there is but one (w, r), of rate 1; dattn_bias has one for
// the pairs of one (w, r), and where it has 16 bits another of its own size.
BackwardInfo dilated_backward(const DilatedBackwardArgs& args, Executor& executor);

// The same gradients in fp64 throughout: `out` and `lse` of args are not used (they are recomputed) and may be
// undefined; the gradients may be fp64 whatever the inputs are. Bounds as for reference_backward() (there are none of
// block_bias and sinks). Memory: out and the wanted gradients in fp64, a few times.
void reference_dilated_backward(const DilatedBackwardArgs& args, Executor& executor, const GradientBounds& bounds = {});

// Number of (q, k) pairs over all (w, r), B and H: what "effective" FLOP counts are made of.
int64_t dilated_pairs(int64_t seqlen, const Dilation& dilation, const AttentionOptions& options, int64_t batch,
                      int64_t heads);

// What the (w, r) keep between them, over `heads` heads of one batch. Patterns inside have one head and no
// bitmaps.
struct DilatedShare {
  int64_t pairs = 0;   // (q, k) that some (w, r) admits, each counted once
  int64_t blocks = 0;  // blocks of block x block tokens of the whole sequence in which such a pair may lie
};
// Rows that see the same keys are counted together, and one period of all segment lengths stands for all of them: no
// time is taken for a pair, as dilated_pattern() does.
DilatedShare dilated_share(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t heads,
                           int block);

// Which keys some (w, r) admits for one query of one head: [seqlen], 0 or 1.
std::vector<uint8_t> dilated_keys(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t head,
                                  int64_t query);

// The pairs of tokens that some (w, r) admits, as a pattern with token bitmaps, one head for each of `heads` (>= 1): to
// look at and to measure coverage with. It is not dilated attention itself, where a pair counts as often as it is
// admitted. Takes time and memory for every pair that is admitted. causal: as AttentionOptions has it.
BlockPattern dilated_pattern(int64_t seqlen, const Dilation& dilation, std::optional<bool> causal, int64_t heads,
                             int block_q, int block_k);

}  // namespace tessera
