// Sizes, limits and mixing functions that the pattern sources share.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "tessera/block_pattern.h"

namespace tessera {

// Tokens a sequence may have: sums and products of a few positions stay far from the end of int64.
inline constexpr int64_t kMaxSeqlen = int64_t{1} << 40;
// Kept blocks that make_pattern will build (16 GiB of indices).
inline constexpr int64_t kMaxKeptBlocks = int64_t{1} << 32;

// Throws Error naming the field. After it every product of sizes of the shape fits in int64.
void check_shape(const PatternShape& shape);

// The shape that both broadcast to (heads and batches may be 1). Throws Error naming the field that does not agree.
PatternShape common_shape(const PatternShape& a, const PatternShape& b);

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The query rows of a block row that exist, and the keys of a block column that exist.
inline int queries_in(const PatternShape& s, int64_t row) {
  return static_cast<int>(std::min<int64_t>(s.block_q, s.seqlen_q - row * s.block_q));
}
inline int keys_in(const PatternShape& s, int64_t col) {
  return static_cast<int>(std::min<int64_t>(s.block_k, s.seqlen_k - col * s.block_k));
}

// One round of MurmurHash3's 64-bit mixing (Appleby, public domain) and its final avalanche.
inline uint64_t hash_word(uint64_t h, uint64_t w) {
  w *= 0x87c37b91114253d5u;
  w = std::rotl(w, 31) * 0x4cf5ad432745937fu;
  h ^= w;
  return std::rotl(h, 27) * 5 + 0x52dce729u;
}
inline uint64_t hash_finish(uint64_t h) {
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdu;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53u;
  return h ^ (h >> 33);
}

}  // namespace tessera
