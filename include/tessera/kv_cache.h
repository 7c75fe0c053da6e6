// KvCache: keys and values of sequences that grow token by token, and attention of their newest tokens over them.
//
//   KvCache cache(batch, kv_heads, head_dim, head_dim, DType::f32);
//   cache.append(k, v, {}, pool);   // [B, S, Hkv, D]: the prompt, then each token
//   cache.attend({.q = q, .out = out, .pattern = pattern}, pool);   // q [B, Sq, H, D]: the last Sq tokens
//
// Keys lie in pages of `block` tokens. Sequences may have different lengths; beams share pages until one of them writes
// (reorder). Beside each page stands a summary of its keys: mean, least and largest, which selection reads (Quest, Tang
// et al. 2024, section 3.2). A token sees in a step what it sees in one pass over the whole sequence.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "tessera/attention.h"
#include "tessera/patterns.h"

namespace tessera {

struct CacheAttendArgs {
  TensorView q;           // [B, Sq, H, D], dtype of the cache: the last Sq tokens of each sequence; last stride 1
  MutableTensorView out;  // [B, Sq, H, Dv]. Rows before the beginning of a sequence shorter than Sq: 0
  MutableTensorView lse;  // fp32 [B, H, Sq] (fp64: or fp64); -inf in such rows; may be undefined
  // Which blocks the tokens see: a pattern of the whole sequences, at least as long as each of them, block_k that of
  // the cache, batches 1 or B; or a named one, whose lengths and position are filled in (give seqlen_total where
  // budgets are even: patterns.h). Neither: every key up to the token.
  std::optional<BlockPattern> pattern;
  std::optional<PatternSpec> spec;
  // scale, causal, window_left, window_right, softcap, alibi_slopes ([H] or [B, H]) and sinks. Error for others.
  AttentionOptions options;
  Isa isa = Isa::automatic;
};

// Not safe for calls at the same time of which one writes. Errors leave the cache as it was.
class KvCache {
 public:
  // dtype: fp32, bf16, fp16 (or fp64, for the slow reference). block: tokens of a page, a multiple of 16 in 16..256.
  KvCache(int64_t batch, int64_t kv_heads, int64_t head_dim, int64_t head_dim_v, DType dtype, int block = 64);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;

  int64_t batch() const;
  int64_t kv_heads() const;
  int64_t head_dim() const;
  int64_t head_dim_v() const;
  DType dtype() const;
  int block() const;
  std::span<const int64_t> lengths() const;  // [B] tokens

  // k [B, S, Hkv, D], v [B, S, Hkv, Dv], dtype of the cache, any strides whose last is 1. lengths: [B], how many of the
  // S tokens belong to each sequence (the first ones); empty: all.
  void append(const TensorView& k, const TensorView& v, std::span<const int64_t> lengths, Executor& executor);

  // The same for any number of threads, bit by bit.
  ForwardInfo attend(const CacheAttendArgs& args, Executor& executor) const;

  // Keeps the first lengths[b] tokens of each sequence (speculative decoding takes tokens back).
  void truncate(std::span<const int64_t> lengths);

  // Sequence i becomes what sequence index[i] was; as many sequences as numbers. Pages are shared, not copied, until
  // one of those that share a page appends to it.
  void reorder(std::span<const int64_t> index);

  // Bytes held: pages, their summaries, tables.
  size_t nbytes() const;

  // Summaries of the keys of sequence b, each fp32 [ceil(length / block), Hkv, D].
  struct Summaries {
    int64_t blocks = 0;
    std::vector<float> mean, min, max;
  };
  Summaries summaries(int64_t b) const;

  // What a paged call takes (attention.h): keys [pages, block, Hkv, D], values, and the pages of sequence b in order.
  // Valid until the next append or reorder.
  TensorView key_pages() const;
  TensorView value_pages() const;
  std::span<const int32_t> pages(int64_t b) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tessera
