// Arguments that operators share: in their schemas, as parameters of their kernels, and as values of the core.
#pragma once

#include "convert.h"

// What several operators take. Tensors q, k, v, out are [B, S, H, D] with any strides (last 1); lse is [B, H, S].
#define PATTERN "Tensor indptr, Tensor indices, Tensor? bitmap_index, Tensor? bitmaps, SymInt[] pattern_shape"
// Several patterns: absent bitmaps are empty tensors.
#define PATTERN_LISTS \
  "Tensor[] indptr, Tensor[] indices, Tensor[] bitmap_index, Tensor[] bitmaps, SymInt[] pattern_shapes"
#define BACKWARD "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
#define OPTIONS                                                                                                  \
  "float? scale=None, bool? causal=None, int? window_left=None, int? window_right=None, SymInt? q_offset=None, " \
  "SymInt k_offset=0, Tensor? key_lengths=None, bool align_to_key_lengths=False, float softcap=0., "             \
  "Tensor? alibi_slopes=None, Tensor? block_bias=None, Tensor? attn_bias=None, Tensor? sinks=None, "             \
  "float dropout_p=0., Tensor? rng=None"
#define DILATION                                                                                                    \
  "SymInt[] segment_lengths, SymInt[] dilation_rates, str? pattern_kind=None, float? density=None, int block=128, " \
  "str budget='even', int? window=None, int[] pattern_rates=[], int? global_tokens=None, int? stride=None, "        \
  "int pattern_seed=0"

#define PATTERN_PARAMETERS                                                                                          \
  const at::Tensor &indptr, const at::Tensor &indices, const MaybeTensor &bitmap_index, const MaybeTensor &bitmaps, \
      at::IntArrayRef pattern_shape
#define PATTERN_VALUE \
  PatternTensors { indptr, indices, bitmap_index, bitmaps, pattern_shape.vec() }
#define PATTERN_LISTS_PARAMETERS                                                                      \
  at::TensorList indptr, at::TensorList indices, at::TensorList bitmap_index, at::TensorList bitmaps, \
      at::IntArrayRef pattern_shapes
#define PATTERN_LISTS_VALUE patterns_of(indptr, indices, bitmap_index, bitmaps, pattern_shapes)
#define BACKWARD_PARAMETERS                                                                                       \
  const at::Tensor &dout, const MaybeTensor &dlse, const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, \
      const at::Tensor &out, const at::Tensor &lse
#define BACKWARD_VALUE dout, dlse, q, k, v, out, lse
#define OPTION_PARAMETERS                                                                                         \
  std::optional<double> scale, std::optional<bool> causal, std::optional<int64_t> window_left,                    \
      std::optional<int64_t> window_right, std::optional<int64_t> q_offset, int64_t k_offset,                     \
      const MaybeTensor &key_lengths, bool align_to_key_lengths, double softcap, const MaybeTensor &alibi_slopes, \
      const MaybeTensor &block_bias, const MaybeTensor &attn_bias, const MaybeTensor &sinks, double dropout_p,    \
      const MaybeTensor &rng
#define OPTION_VALUE                                                                                          \
  OptionArguments {                                                                                           \
    scale, causal, window_left, window_right, q_offset, k_offset, key_lengths, align_to_key_lengths, softcap, \
        alibi_slopes, block_bias, attn_bias, sinks, dropout_p, rng                                            \
  }
#define DILATION_PARAMETERS                                                                                      \
  at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates, std::optional<c10::string_view> pattern_kind, \
      std::optional<double> density, int64_t block, c10::string_view budget, std::optional<int64_t> window,      \
      at::IntArrayRef pattern_rates, std::optional<int64_t> global_tokens, std::optional<int64_t> stride,        \
      int64_t pattern_seed
#define DILATION_VALUE                                                                                      \
  dilation_of(segment_lengths, dilation_rates, pattern_kind, density, block, budget, window, pattern_rates, \
              global_tokens, stride, pattern_seed)
