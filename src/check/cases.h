// Random attention calls with hostile surroundings: the cases of `tessera check` and of the tests.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "check/random.h"
#include "tessera/check.h"
#include "tessera/patterns.h"

namespace tessera::check {

enum class Values : uint8_t {
  normal,     // standard normal
  large,      // logits up to +-1e4
  max_last,   // scores grow with the key: the maximum is in the last block
  denormal,   // below the smallest normal number of the dtype
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

  PatternSource source = PatternSource::random_csr;
  PatternKind kind = PatternKind::dense;
  int block_q = 64, block_k = 64;
  bool pattern_per_head = false, pattern_per_batch = false;
  double density = 0.5;
  bool pattern_causal = false;

  std::optional<double> scale;
  bool causal = false;
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
  bool plain_layout = false;    // contiguous [B, S, H, D]; otherwise strides and bases by the seed
  bool visible_nan = false;     // NaN in a row of K or V that some queries see: the others must stay clean
};

// Case `number` of a seed.
CaseConfig random_config(uint64_t seed, int64_t number);
std::string describe(const CaseConfig& config);

// Memory with a view inside. What belongs to no element holds NaN bits, before, between and after the elements.
struct Tensor {
  std::vector<std::byte> memory;
  MutableTensorView view;
};

// A case with its memory. Whatever no query admits is NaN or Inf: rows of K and V, of Q without keys, biases of
// masked pairs, unused pages and page numbers, padding.
class Case {
 public:
  explicit Case(const CaseConfig& config);
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  const CaseConfig& config() const { return config_; }
  // The call(s) resolved: one, or one a sequence. Valid as long as the case.
  const std::vector<Problem>& problems() const { return problems_; }
  const ForwardArgs& args() const { return args_; }  // not for varlen

  // Refills the outputs with NaN and runs forward() or forward_varlen().
  ForwardInfo run(Isa isa, Executor& executor);
  // Bytes of out and lse that belong to no element are as they were.
  bool surroundings_intact() const;
  const std::vector<std::byte>& out_memory() const { return out_.memory; }
  const std::vector<std::byte>& lse_memory() const { return lse_.memory; }

 private:
  Tensor tensor(DType dtype, std::initializer_list<int64_t> sizes, bool output, bool broadcast_heads);
  BlockPattern pattern(int64_t seqlen_q, int64_t seqlen_k, int64_t heads, int64_t batches);
  void make_options();
  void make_page_table();
  void fill_inputs();
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
};

// The attention of a plain implementation in the dtype of the inputs: scores, each term of them, weights and output
// are rounded to it, sums are exact. out: fp64 [B, Sq, H, Dv]. What FlashAttention's tolerance is measured with.
void plain_attention(const Problem& problem, double* out);

}  // namespace tessera::check
