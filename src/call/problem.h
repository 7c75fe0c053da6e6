// Problem: a validated, fully resolved attention call as plain numbers and pointers. Made by `resolve` (the only
// place that validates), consumed by every backend and by the fp64 reference.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "call/mask.h"
#include "tessera/attention.h"

namespace tessera {

// [B, S, H, D] with last stride 1; strides in elements.
struct Strided {
  char* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;

  char* at(int64_t b, int64_t s, int64_t h, size_t element_size) const {
    return data + (b * batch + s * seq + h * head) * static_cast<int64_t>(element_size);
  }
};

// A number for each (b, h) in fp32; data nullptr: not given.
struct HeadNumbers {
  const float* data = nullptr;
  int64_t batch = 0, head = 0;

  explicit operator bool() const { return data != nullptr; }
  const float* at(int64_t b, int64_t h) const { return data == nullptr ? nullptr : data + b * batch + h * head; }
};

struct Problem {
  DType dtype = DType::f32;  // of q, k, v
  DType out_dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, seqlen_q = 0, seqlen_k = 0, head_dim = 0, head_dim_v = 0;
  Strided q, k, v, out;  // k, v with pages: `batch` is the stride of a page, `seq` of a slot
  Strided lse;           // [B, H, Sq]; data nullptr: not wanted
  DType lse_dtype = DType::f32;
  const int32_t* page_table = nullptr;  // [B, pages_per_batch] or nullptr
  // Copies of what indexes memory: what was checked is what is used, whatever another thread writes meanwhile.
  std::shared_ptr<const std::vector<int32_t>> pages;
  std::shared_ptr<const std::vector<int64_t>> lengths;
  int64_t pages_per_batch = 0;
  BlockPatternView pattern;

  double scale = 1;
  double softcap = 0;
  bool causal = false;
  int64_t window_left = MaskGeometry::kUnlimited, window_right = MaskGeometry::kUnlimited;
  bool q_offset_given = false;
  int64_t q_offset = 0, k_offset = 0;
  const int64_t* key_lengths = nullptr;  // [B] or nullptr
  bool align_to_key_lengths = false;
  HeadNumbers alibi;                  // slopes, for distances in tokens
  int64_t row_distance = 1;           // tokens from a row of q or k to the next
  const float* block_bias = nullptr;  // of entry e: block_bias[b * bias_batch + h * bias_head + e * bias_entry]
  int64_t bias_batch = 0, bias_head = 0, bias_entry = 0;
  const char* attn_bias = nullptr;  // element (b, h, q, k) by attn_bias_stride
  DType attn_bias_dtype = DType::f32;
  int64_t attn_bias_stride[4] = {0, 0, 0, 0};
  HeadNumbers sinks;
  Dropout dropout;
  int64_t batch_base = 0;  // number of batch 0 for dropout: a packed sequence is a problem of its own
  // Dropout stream of (b, h) where heads and batches are picked from larger tensors; stream_head 0: not so.
  int64_t stream_first = 0, stream_batch = 0, stream_head = 0;

  std::array<HeadNumbers*, 2> head_numbers() { return {&alibi, &sinks}; }

  int64_t group() const { return heads / kv_heads; }  // query heads per kv head

  // Position of query 0 minus position of key 0.
  int64_t diagonal(int64_t b) const {
    const int64_t aligned = align_to_key_lengths ? key_length(b) - seqlen_q : seqlen_k - seqlen_q;
    return (q_offset_given ? q_offset : aligned) - k_offset;
  }
  int64_t key_length(int64_t b) const { return key_lengths ? key_lengths[b] : seqlen_k; }
  MaskGeometry mask(int64_t b) const {
    MaskGeometry m;
    m.diagonal = diagonal(b);
    m.left = window_left;
    m.right = causal ? 0 : window_right;
    m.key_limit = key_length(b);
    return m;
  }
  // Positions that dropout hashes: global ones where offsets are given.
  int64_t dropout_q(int64_t q) const { return q + (q_offset_given ? q_offset : 0); }
  int64_t dropout_k(int64_t k) const { return k + k_offset; }
  uint64_t dropout_stream(int64_t b, int64_t h) const {
    if (stream_head == 0) return static_cast<uint64_t>((batch_base + b) * heads + h);
    return static_cast<uint64_t>(stream_first + b * stream_batch + h * stream_head);
  }

  double load_lse(int64_t b, int64_t h, int64_t q) const {
    return load_as_double(lse.at(b, q, h, size_of(lse_dtype)), lse_dtype, 0);
  }
  void store_lse(int64_t b, int64_t h, int64_t q, double x) const {
    if (lse.data != nullptr) store_from_double(lse.at(b, q, h, size_of(lse_dtype)), lse_dtype, 0, x);
  }

  // First key of block column j, for kv head h: rows follow at k.seq / v.seq.
  const char* k_block(int64_t b, int64_t j, int64_t h) const { return kv_block(k, b, j, h); }
  const char* v_block(int64_t b, int64_t j, int64_t h) const { return kv_block(v, b, j, h); }

 private:
  const char* kv_block(const Strided& t, int64_t b, int64_t j, int64_t h) const {
    if (page_table) return t.at(page_table[b * pages_per_batch + j], 0, h, size_of(dtype));
    return t.at(b, j * pattern.shape.block_k, h, size_of(dtype));
  }
};

// What a call's out and lse must be. forward: dtype of q, and fp32. reference: these or fp64. weights: not used.
enum class Purpose : uint8_t { forward, reference, weights };

// Validates every field of a call (Error names the argument, what came, what is allowed) and resolves defaults.
// The Problem borrows all pointers, and the pattern's arrays: args must outlive it.
Problem resolve(const ForwardArgs& args, Purpose purpose = Purpose::forward);

// The same for packed sequences: one Problem each, in order.
std::vector<Problem> resolve_varlen(const VarlenForwardArgs& args);

// The part of resolve that concerns masks alone; sets seqlens, pattern, causality, window, offsets and key lengths.
Problem resolve_mask(const BlockPattern& pattern, const AttentionOptions& options, int64_t batch, int64_t heads);
Problem resolve_mask(int64_t seqlen_q, int64_t seqlen_k, const AttentionOptions& options, int64_t batch,
                     int64_t heads);  // without pattern

// A random number in [0, 2^32) for one pair; the pair is dropped iff it is < drop_threshold(p). Counter: key
// position / 4, query position, batch_head = dropout_stream(b, h), offset; word: key position % 4 (philox.h).
uint32_t dropout_random(const Dropout& dropout, uint64_t batch_head, int64_t q_position, int64_t k_position);
inline uint32_t drop_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace tessera
