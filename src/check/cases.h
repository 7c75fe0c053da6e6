// Random attention calls with hostile surroundings: the cases of `tessera check` and of the tests.
#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "call/backward_problem.h"
#include "check/random.h"
#include "check/tensor.h"
#include "tessera/check.h"
#include "tessera/dilated.h"
#include "tessera/patterns.h"

namespace tessera::check {

enum class Values : uint8_t {
  normal,    // standard normal
  large,     // logits up to +-1e4
  max_last,  // scores grow with the key: the maximum is in the last block
  denormal,  // below the smallest normal number of the dtype
};

enum class PatternSource : uint8_t { random_csr, random_bitmaps, named };

// Everything that defines a case except its numbers, which follow from the seed.
struct CaseConfig {
  uint64_t seed = 0;
  CheckPath path = CheckPath::panel;
  DType dtype = DType::f32;
  int64_t batch = 1, heads = 1, kv_heads = 1, seqlen_q = 64, seqlen_k = 64, head_dim = 64, head_dim_v = 64;
  // varlen: lengths of the sequences (batch of them); seqlen_q and seqlen_k are then not used.
  std::vector<int64_t> seqlens_q, seqlens_k;
  // dilated: the (w, r). The pattern is the one inside dilated segments: a template if named, else made by callback.
  std::vector<int64_t> segment_lengths, dilation_rates;

  PatternSource source = PatternSource::random_csr;
  PatternKind kind = PatternKind::dense;
  int block_q = 64, block_k = 64;
  bool pattern_per_head = false, pattern_per_batch = false;
  double density = 0.5;
  bool pattern_causal = false;
  bool pattern_placed = false;  // stands somewhere: rows of a longer sequence, an offset, a first row inside a block

  std::optional<double> scale;
  bool causal = false;  // said in the call; a causal pattern needs no saying
  std::optional<int64_t> window_left, window_right, q_offset;
  int64_t k_offset = 0;
  bool key_lengths = false, align_to_key_lengths = false;
  double softcap = 0;
  bool alibi = false, alibi_per_batch = false;
  bool block_bias = false;
  bool attn_bias = false;
  DType attn_bias_dtype = DType::f32;
  bool bias_minus_infinity = false;  // some elements of attn_bias, and whole rows of it
  bool sinks = false;
  double dropout = 0;

  Values values = Values::normal;
  bool plain_layout = false;  // contiguous [B, S, H, D]; otherwise strides and bases by the seed
  bool visible_nan = false;   // NaN in a row of Q, K or V that takes part: the others must stay clean

  // The backward call; a paged case has none.
  DType gradient_dtype = DType::f32;  // of dq, dk, dv
  bool accumulate = false, dlse = false;
  bool dq = true, dk = true, dv = true;  // wanted; the others where the option is given
  bool dblock_bias = true, dattn_bias = true, dsinks = true;
  bool dattn_bias_fp32 = true;  // or the dtype of attn_bias
  bool nan_in_dout = false;     // visible_nan is in dout
};

// Case `number` of a seed.
CaseConfig random_config(uint64_t seed, int64_t number);
std::string describe(const CaseConfig& config);

enum Gradient { kDq, kDk, kDv, kDBlockBias, kDAttnBias, kDSinks, kGradients };
constexpr std::array<const char*, kGradients> kGradientNames{"dq", "dk", "dv", "dblock_bias", "dattn_bias", "dsinks"};

// Strides of a contiguous tensor of these sizes; 0 where the size is 1, so that sums of a broadcast dimension meet.
std::array<int64_t, 4> summed_strides(const TensorView& t);

// Rows first, first + rate, ... of one dilated segment, for one head of one batch.
struct Segment {
  int64_t group, batch, head;  // group: which (w, r)
  int64_t first, rate;
};

// A case with its memory. Whatever no query admits is NaN or Inf: rows of K and V, of Q, dout and dlse without keys,
// biases of masked pairs, unused pages and page numbers, padding.
class Case {
 public:
  explicit Case(const CaseConfig& config);
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  const CaseConfig& config() const { return config_; }
  // The call(s) resolved: one, or one a sequence; of a dilated case only tensors count. Valid as long as the case.
  const std::vector<Problem>& problems() const { return problems_; }
  const ForwardArgs& args() const { return args_; }  // not for varlen or dilated
  const DilatedForwardArgs& dilated_args() const { return dilated_; }

  // A dilated case taken apart by the definition: each segment of each (w, r), batch and head as a problem of its own
  // on the rows of the call. Independent of how the library plans it.
  const std::vector<Segment>& segments() const { return segments_; }
  const std::vector<Problem>& segment_problems() const { return segment_problems_; }

  // Refills the outputs with NaN and runs forward() or forward_varlen().
  ForwardInfo run(Isa isa, Executor& executor);
  // Bytes of out and lse that belong to no element are as they were.
  bool surroundings_intact() const;
  const std::vector<std::byte>& out_memory() const { return out_.memory; }
  const std::vector<std::byte>& lse_memory() const { return lse_.memory; }

  // The backward call. Its out and lse are what the last run() left; dq, dk and dv of a case that does not accumulate,
  // and the gradients of options, are refilled with NaN.
  bool has_backward() const { return config_.path != CheckPath::paged; }
  BackwardInfo run_backward(Isa isa, Executor& executor);
  const std::vector<BackwardProblem>& backward_problems() const { return backward_problems_; }  // dilated: of segments
  const BackwardArgs& backward_args() const { return backward_; }  // not for varlen or dilated
  const DilatedBackwardArgs& dilated_backward_args() const { return dilated_backward_; }
  // Packed sequences have one tensor for all: [1, total, H, D]. Undefined: not wanted.
  const Tensor& gradient(int g) const { return gradients_[g]; }
  // What a gradient held before the call at this byte of its memory; 0 where the call does not accumulate.
  double before(int g, int64_t offset) const;
  // First row of problem n in packed q and k; 0 if nothing is packed.
  int64_t first_q(size_t n) const { return cu_seqlens_q_.empty() ? 0 : cu_seqlens_q_[n]; }
  int64_t first_k(size_t n) const { return cu_seqlens_k_.empty() ? 0 : cu_seqlens_k_[n]; }
  bool gradient_surroundings_intact() const;
  std::vector<std::byte> gradient_memory() const;  // of all

 private:
  Tensor tensor(DType dtype, std::initializer_list<int64_t> sizes, bool output, bool broadcast_heads);
  PatternSpec named_pattern(Random& random, int64_t heads) const;
  BlockPattern pattern(Random& random, int64_t seqlen_q, int64_t seqlen_k, int64_t heads, int64_t batches) const;
  void make_options();
  void make_page_table();
  void fill_inputs();
  void make_dilated();
  void make_segments();
  const BlockPattern& segment_pattern(int64_t rows);
  void make_backward();
  void make_dilated_backward();
  void fill_backward();
  void put_row(const Strided& rows, int64_t b, int64_t s, int64_t h, int64_t dim, int64_t position, int64_t length,
               int role);

  CaseConfig config_;
  Random random_;
  Tensor q_, k_, v_, out_, lse_, alibi_, block_bias_, attn_bias_, sinks_;
  std::vector<int64_t> key_lengths_, cu_seqlens_q_, cu_seqlens_k_;
  std::vector<int32_t> pages_;
  std::vector<BlockPattern> patterns_;
  AttentionOptions options_;
  ForwardArgs args_;
  VarlenForwardArgs varlen_;
  std::vector<Problem> problems_;

  DilatedForwardArgs dilated_;
  std::map<int64_t, BlockPattern> segment_patterns_;  // by rows
  std::vector<Segment> segments_;
  std::vector<Problem> segment_problems_;
  std::deque<int64_t> segment_keys_;  // what key_lengths of segment_problems_ point to

  Tensor dout_, dlse_;
  std::array<Tensor, kGradients> gradients_;
  std::array<std::vector<std::byte>, kGradients> before_;  // their memory before the call
  BackwardArgs backward_;
  VarlenBackwardArgs varlen_backward_;
  DilatedBackwardArgs dilated_backward_;
  std::vector<BackwardProblem> backward_problems_;
};

// attn_bias is not -inf there.
bool admits_by_bias(const Problem& p, int64_t b, int64_t h, int64_t q, int64_t k);

// The attention of a plain implementation in the dtype of the inputs: scores, each term of them, weights and output
// are rounded to it, sums are exact. out: fp64 [B, Sq, H, Dv]; lse [B, H, Sq], of the rounded scores, or nullptr. What
// FlashAttention's tolerance is measured with.
void plain_attention(const Problem& problem, double* out, double* lse = nullptr);

// Contiguous fp64 gradients of the sizes of the call's; each may be null.
struct PlainGradients {
  double *dq = nullptr, *dk = nullptr, *dv = nullptr, *dblock_bias = nullptr, *dattn_bias = nullptr, *dsinks = nullptr;
};

// The gradients of a plain implementation in the dtype of the inputs, as autograd chains its steps: scores, each term
// of them, weights, out, delta, dP, dS, dq, dk and dv are rounded to it, sums are exact. Writes dq, dk and dv, adds to
// the others.
void plain_gradients(const BackwardProblem& problem, const PlainGradients& to);

// Both for a dilated case, as LongNet's own chain: a plain attention for each segment, weights of the join from their
// lse, rounded as well, and autograd back through that. out [B, S, H, Dv]; dq, dk and dv are wanted or null.
void plain_dilated(const Case& test, double* out);
void plain_dilated_gradients(const Case& test, const PlainGradients& to);

}  // namespace tessera::check
