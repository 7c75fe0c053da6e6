// Block-sparse attention: out = softmax(scale * q k^T + biases, over the admitted keys of a row) v.
//
// One softmax over all keys that a row's pattern, causality, window, key length and bitmaps admit. A row that sees no
// key has output 0 and lse -inf. Whatever bytes lie in skipped blocks, masked positions or past the end never reach a
// result. Online softmax after Milakov & Gimelshein 2018, tiled as FlashAttention (Dao et al. 2022, algorithm 1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "tessera/block_pattern.h"
#include "tessera/executor.h"
#include "tessera/tensor_view.h"

namespace tessera {

// Instruction sets of the CPU kernels. `automatic` takes the fastest one this CPU has (automatic_isa); any other forces
// it and is an Error where the CPU or the build lacks it. avx512_bf16 differs from avx512 in the native bf16 dot only,
// which Intel's cores run at half the rate of FMA: there `automatic` is avx512 but for decode.
enum class Isa : uint8_t { automatic, sse4, avx2, avx512, avx512_bf16, neon };

std::string_view name_of(Isa isa);     // "auto", "sse4", "avx2", "avx512", "avx512_bf16", "neon"
Isa isa_of(std::string_view name);     // Error for an unknown name
std::span<const Isa> compiled_isas();  // worst first
std::span<const Isa> usable_isas();    // those that this CPU has, worst first
// What Isa::automatic is on this CPU, for decode (which waits for memory) or for everything else. The first call
// measures the bf16 dot against FMA (.03 ms).
Isa automatic_isa(bool decode = false);

// Dropout on the normalised weights. The decision for (b, h, q, k) depends on seed, offset and the four positions
// only (Philox 4x32-10, Salmon et al. 2011), never on threads, tiles or blocks.
struct Dropout {
  double p = 0;  // in [0, 1): probability of dropping
  uint64_t seed = 0;
  uint64_t offset = 0;
};

struct AttentionOptions {
  std::optional<double> scale;  // softmax scale: 0, or 1e-30 to 1e30 in magnitude; default 1 / sqrt(D)
  // Position of query i is i + q_offset, of key j is j + k_offset. Default q_offset: where the pattern stands, else
  // Sk - Sq (bottom-right alignment). A pattern that is causal, or rows of a longer one, was made for one distance
  // between query 0 and key 0: with another one the call is an Error, unless every pair that is admitted there is kept.
  // So is any pattern that depends on positions where key_lengths move the queries (align_to_key_lengths).
  std::optional<int64_t> q_offset;
  int64_t k_offset = 0;
  // Admits keys at positions <= the query's. Default: the pattern's own causality; false for a causal pattern is an
  // Error
  std::optional<bool> causal;
  std::optional<int64_t> window_left;   // tokens, >= 0: admits keys at most this far before the query
  std::optional<int64_t> window_right;  // tokens, >= 0: ... after the query (causal: none after it anyway)
  // [B] number of valid keys, each in 0..Sk. Empty: all Sk. Does not move the alignment, unless
  // align_to_key_lengths: then the default q_offset of batch b is key_lengths[b] - Sq (decode with a cache).
  std::span<const int64_t> key_lengths;
  bool align_to_key_lengths = false;
  double softcap = 0;       // 1e-30 to 1e30: scores become softcap * tanh(score / softcap), before biases. 0: off
  TensorView alibi_slopes;  // fp32 [H] or [B, H]: adds -slope * |query position - key position| (Press et al. 2022)
  // fp32 [B or 1, H or 1, entries]: added to all scores of the kept block at that entry of the pattern. Where the
  // pattern differs by head or batch, entries are those of all of them, and each uses its own.
  TensorView block_bias;
  // Floating, [B or 1, H or 1, Sq or 1, Sk or 1]: added to the scores. -inf, also as the sum of both biases: not a key;
  // finite ones below -2.35e38 count as that number (either bias), so that a row of nothing else still has weights. Its
  // gradients are not those weights': beside a bias beyond -1e6 or so lse has no room for the logarithm of a sum.
  TensorView attn_bias;
  TensorView sinks;  // fp32 [H]: a logit that joins the denominator (and lse) of each row that sees a key
  Dropout dropout;
  bool deterministic = true;  // bit-equal from run to run and for any number of threads
};

// K and V in pages: key j of batch b lies in page page_table[b, j / block_k], slot j % block_k.
struct PageTable {
  const int32_t* data = nullptr;  // [B, ceil(Sk / block_k)] row-major, each in 0..pages - 1 (checked where a kept
                                  // block uses it)
  int64_t batch = 0;              // B
  int64_t pages_per_batch = 0;    // ceil(Sk / block_k)
};

struct ForwardArgs {
  TensorView q;           // [B, Sq, H, D]; last stride 1
  TensorView k;           // [B, Sk, Hkv, D], H % Hkv == 0; with page_table [pages, block_k, Hkv, D]
  TensorView v;           // [B, Sk, Hkv, Dv]; with page_table [pages, block_k, Hkv, Dv]
  BlockPattern pattern;   // of (Sq, Sk)
  MutableTensorView out;  // [B, Sq, H, Dv], dtype of q; must not overlap an input
  MutableTensorView lse;  // fp32 [B, H, Sq] (fp64 inputs: or fp64), natural log; may be undefined
  std::optional<PageTable> page_table;
  AttentionOptions options;
  Isa isa = Isa::automatic;
};

struct ForwardInfo {
  // The one that ran (of a call with sequences of both kinds: not decode's); automatic for the fp64 reference.
  Isa isa = Isa::automatic;
  size_t scratch_bytes = 0;  // allocated by the call, all threads together
};

// dtype of q, k, v, out: fp32, bf16, fp16 (fp32 accumulation), or fp64 (the plain reference kernel, slow).
// Few queries take the decode schedule, split over keys: Sq <= 5; Sq <= 8 on more than 16 keys; Sq <= 16 on more than
// 512. The same numbers within rounding.
ForwardInfo forward(const ForwardArgs& args, Executor& executor);

// Packed sequences: sequence i is rows cu_seqlens_q[i] .. cu_seqlens_q[i + 1] of q and out, likewise k and v.
struct VarlenForwardArgs {
  TensorView q;                            // [total_q, H, D]
  TensorView k;                            // [total_k, Hkv, D]
  TensorView v;                            // [total_k, Hkv, Dv]
  MutableTensorView out;                   // [total_q, H, Dv]
  MutableTensorView lse;                   // fp32 [H, total_q]; may be undefined
  std::span<const int64_t> cu_seqlens_q;   // [N + 1] from 0, non-decreasing, last total_q
  std::span<const int64_t> cu_seqlens_k;   // [N + 1]
  std::span<const BlockPattern> patterns;  // [N]: pattern i is of sequence i's lengths; heads 1 or H, batches 1
  AttentionOptions options;                // key_lengths, q_offset, attn_bias must not be given; block_bias neither
  Isa isa = Isa::automatic;
};
ForwardInfo forward_varlen(const VarlenForwardArgs& args, Executor& executor);

// The same attention in fp64 throughout, by the plainest code there is: the oracle of the tests. `out` and `lse` of
// args may be fp64 here whatever the inputs are. out_bound [B, Sq, H, Dv] and lse_bound [B, H, Sq] (contiguous), if not
// null, receive a bound on the error that forward() may have there: rounding alone, from epsilon and sum lengths.
void reference_forward(const ForwardArgs& args, Executor& executor, float* out_bound = nullptr,
                       float* lse_bound = nullptr);

// Joins partial results over disjoint sets of keys: out [B, S, H, Dv], lse fp32 [B, H, S]. out may be out_a (in
// place). A side with lse -inf contributes nothing; both -inf gives 0 and -inf.
void merge(TensorView out_a, TensorView lse_a, TensorView out_b, TensorView lse_b, MutableTensorView out,
           MutableTensorView lse, Executor& executor);

// Normalised weights of the kept blocks only.
struct BlockWeights {
  struct Index {
    int64_t batch, head, row, col;  // block row and column
  };
  int block_q = 0, block_k = 0;
  std::vector<Index> indices;      // [blocks], ordered by batch, head, row, column
  std::vector<float> values;       // [blocks, block_q, block_k]; masked positions and positions past the end are 0
  std::array<int64_t, 4> shape{};  // B, H, Sq, Sk
};
// Weights before dropout, from scores kept in fp32 whatever the inputs. `out` and `lse` of args are not used and may be
// undefined. Error if the result would need more than max_bytes.
BlockWeights attention_weights(const ForwardArgs& args, Executor& executor, size_t max_bytes = size_t{1} << 34);

// Number of (q, k) pairs that pattern and options admit, over B and H: what "effective" FLOP counts are made of.
int64_t admitted_pairs(const BlockPattern& pattern, const AttentionOptions& options, int64_t batch, int64_t heads);

}  // namespace tessera
