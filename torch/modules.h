// torch::nn modules: parameters and configuration. What they compute is in functional.h.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/options/activation.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "functional.h"
#include "tessera/patterns.h"

namespace tessera::nn {

// The pattern that a PatternSpec means for given lengths, kept from call to call: the last one. Copies share it. Safe
// from several threads.
class PatternSource {
 public:
  explicit PatternSource(const PatternSpec& spec);  // seqlen_q and seqlen_k are ignored: each call has its own
  const PatternSpec& spec() const { return spec_; }
  ops::PatternTensors get(int64_t seqlen_q, int64_t seqlen_k) const;

 private:
  struct Last {
    std::mutex mutex;
    int64_t seqlen_q = -1, seqlen_k = -1;
    ops::PatternTensors tensors;
  };
  PatternSpec spec_;
  std::shared_ptr<Last> last_;
};

struct BlockSparseAttentionOptions {
  PatternSpec pattern;          // lengths come with the call. pattern.causal: causal attention, of tokens as well
  std::optional<double> scale;  // default 1 / sqrt(D)
  std::optional<int64_t> window_left, window_right;  // tokens
  double softcap = 0;
  double dropout = 0;  // in training
  // LongNet: the pattern lies inside these dilated segments (tessera/dilated.h). Without them: over the sequence.
  std::vector<int64_t> segment_lengths, dilation_rates;
};

// Attention without projections: q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] -> [B, Sq, H, Dv]. Over
// segments Sq = Sk.
class BlockSparseAttentionImpl : public torch::nn::Cloneable<BlockSparseAttentionImpl> {
 public:
  explicit BlockSparseAttentionImpl(BlockSparseAttentionOptions options = {});
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  // key_lengths: int32 or int64 [B], valid keys; undefined: all.
  at::Tensor forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& key_lengths = {});

  BlockSparseAttentionOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(at::Tensor())})

 private:
  PatternSource pattern_;
};
TORCH_MODULE(BlockSparseAttention);

// torch::nn::MultiheadAttention over a pattern: the same options, parameters (names, shapes, initial values) and
// arguments; sequence first. The default pattern is dense. Weights come back without gradient and before dropout. With
// segments the pattern lies inside them, L = S, and need_weights must be false.
class MultiheadAttentionImpl : public torch::nn::Cloneable<MultiheadAttentionImpl> {
 public:
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads, const PatternSpec& pattern = {})
      : MultiheadAttentionImpl(torch::nn::MultiheadAttentionOptions(embed_dim, num_heads), pattern) {}
  explicit MultiheadAttentionImpl(const torch::nn::MultiheadAttentionOptions& options, const PatternSpec& pattern = {},
                                  std::vector<int64_t> segment_lengths = {}, std::vector<int64_t> dilation_rates = {});
  void reset() override;
  // query [L, N, E], key [S, N, kdim], value [S, N, vdim]; masks: functional.h. -> output [L, N, E], weights
  // [N, L, S] (undefined unless wanted; with add_bias_kv and add_zero_attn one more key each). need_weights: not given
  // is true where the pattern is dense, as in torch, and false elsewhere: dense weights of 16,384 tokens take 13 GB.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                             const at::Tensor& key_padding_mask = {},
                                             std::optional<bool> need_weights = std::nullopt,
                                             const at::Tensor& attn_mask = {}, bool average_attn_weights = true);

  torch::nn::MultiheadAttentionOptions options;
  std::vector<int64_t> segment_lengths, dilation_rates;
  at::Tensor in_proj_weight, in_proj_bias, bias_k, bias_v;
  at::Tensor q_proj_weight, k_proj_weight, v_proj_weight;
  torch::nn::Linear out_proj = nullptr;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(at::Tensor())}, {4, torch::nn::AnyValue(std::optional<bool>())},
                           {5, torch::nn::AnyValue(at::Tensor())}, {6, torch::nn::AnyValue(true)})

 private:
  PatternSource pattern_;
};
TORCH_MODULE(MultiheadAttention);

}  // namespace tessera::nn
