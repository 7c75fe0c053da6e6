// Block-sparse attention for C++ on libtorch, with gradients: what the modules of modules.h compute.
//
//   auto pattern = tessera::nn::functional::pattern_tensors(tessera::make_pattern({...}));
//   auto [out, lse] = tessera::nn::functional::block_sparse_attention(q, k, v, pattern, {.causal = true});
//
// These call the operators (torch.ops.tessera), whose gradients are theirs (autograd.cc). Errors of the caller are
// c10::ValueError with the core's words.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "convert.h"
#include "tessera/dilated.h"

namespace tessera::nn::functional {

// A pattern as the tensors in which it goes to the operators. Make it once, use it in many calls.
ops::PatternTensors pattern_tensors(const BlockPattern& pattern);

// q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] with any strides whose last is 1 (a [B, H, S, D] tensor is
// given as its .transpose(1, 2)) -> out [B, Sq, H, Dv] in the dtype of q, lse [B, H, Sq] fp32 (fp64 for fp64).
// Differentiable: q, k, v, options.block_bias, options.attn_bias, options.sinks, through out and lse. ValueError where
// another tensor of the options requires a gradient. dropout_p > 0 without rng draws seed and offset from torch's
// default generator: torch::manual_seed decides.
std::tuple<at::Tensor, at::Tensor> block_sparse_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const ops::PatternTensors& pattern,
                                                          const ops::OptionArguments& options = {});

// LongNet: q [B, S, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] -> out and lse as above. What tessera/dilated.h says of
// Dilation and of the options holds, but: the pattern inside has square blocks and one head and is causal where
// options.causal is; no hierarchical or dilated_segments pattern; dilation.make must be empty. ValueError otherwise.
// Differentiable: q, k, v, options.attn_bias.
std::tuple<at::Tensor, at::Tensor> dilated_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const Dilation& dilation,
                                                     const ops::OptionArguments& options = {});

// Packed sequences: q [total_q, H, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv], offsets int32 or int64 [N + 1], one
// pattern a sequence -> out [total_q, H, Dv], lse [H, total_q]. Options: scale, causal, window_left, window_right,
// softcap, alibi_slopes, sinks, dropout_p and rng; ValueError for others. Differentiable: q, k, v, options.sinks.
std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                    const std::vector<ops::PatternTensors>& patterns,
                                                    const ops::OptionArguments& options = {});

// New queries q [B, Sq, H, D] over a cache, without gradient. Cache: k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], or pages
// [pages, block_k, Hkv, D] and Dv with page_table int32 [B, ceil(Sk / block_k)]; the pattern is of (Sq, Sk), Sk the
// capacity. With options.key_lengths (valid keys, the new ones included) the queries stand at the end of those.
std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const ops::PatternTensors& pattern, const ops::OptionArguments& options = {},
                                          const at::Tensor& page_table = {});

// Joins partial results over disjoint keys: out [B, S, H, Dv], lse [B, H, S]; -inf contributes nothing. Differentiable.
std::tuple<at::Tensor, at::Tensor> merge(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                                         const at::Tensor& lse_b);

// Normalised weights, before dropout and without gradient, spread out to [B, H, Sq, Sk]: for looking at short
// sequences. The operator tessera::weights gives the kept blocks only.
at::Tensor attention_weights(const at::Tensor& q, const at::Tensor& k, const ops::PatternTensors& pattern,
                             const ops::OptionArguments& options = {});

// What multi-head attention knows beside its input. Weights as torch::nn::MultiheadAttention names them; absent ones
// are undefined.
struct MultiheadArguments {
  int64_t num_heads = 1;
  at::Tensor in_proj_weight;                               // [3 E, E], or
  at::Tensor q_proj_weight, k_proj_weight, v_proj_weight;  // [E, E], [E, kdim], [E, vdim]
  at::Tensor in_proj_bias;                                 // [3 E]
  at::Tensor bias_k, bias_v;                               // [1, 1, E]: one more key that all rows see
  bool add_zero_attn = false;                              // and one of zeros
  at::Tensor out_proj_weight, out_proj_bias;               // [E, E], [E]
  double dropout_p = 0;                                    // 0..1, applied as it stands: 0 outside training
  at::Tensor key_padding_mask;  // [N, S]; bool: true is hidden; floating: added to the scores
  at::Tensor attn_mask;         // [L, S] or [N * num_heads, L, S]; bool: true is hidden; floating: added
  bool causal = false;
  bool need_weights = false;
  bool average_attn_weights = true;
};

// query [L, N, E], key [S, N, kdim], value [S, N, vdim], pattern of (L, S) -> output [L, N, E] and, if wanted, weights
// [N, L, S + extra keys] (or [N, num_heads, L, ...] when not averaged), before dropout and without gradient.
std::tuple<at::Tensor, at::Tensor> multi_head_attention(const at::Tensor& query, const at::Tensor& key,
                                                        const at::Tensor& value, const ops::PatternTensors& pattern,
                                                        const MultiheadArguments& arguments);

// The same over LongNet segments; L = S. ValueError for need_weights and add_zero_attn.
std::tuple<at::Tensor, at::Tensor> multi_head_attention(const at::Tensor& query, const at::Tensor& key,
                                                        const at::Tensor& value, const Dilation& dilation,
                                                        const MultiheadArguments& arguments);

}  // namespace tessera::nn::functional
