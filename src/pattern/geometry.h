// Sizes, limits and mixing functions that the pattern sources share.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>

#include "tessera/block_pattern.h"

namespace tessera {

// Tokens a sequence may have: sums and products of a few positions stay far from the end of int64.
inline constexpr int64_t kMaxSeqlen = int64_t{1} << 40;
// Kept blocks that make_pattern will build (16 GiB of indices).
inline constexpr int64_t kMaxKeptBlocks = int64_t{1} << 32;

// The shape that both broadcast to (heads and batches may be 1). Throws Error naming the field that does not agree.
PatternShape common_shape(const PatternShape& a, const PatternShape& b);

// What a call that may say `causal` means with a pattern: nothing said is the pattern's own. Error where it says that a
// causal pattern is not.
bool resolve_causal(const PatternShape& shape, const std::optional<bool>& causal);

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The query rows [first, last) of a block that exist, and the keys of a block column that exist.
struct RowsInBlock {
  int first = 0, last = 0;
};
inline RowsInBlock queries_in(const PatternShape& s, int64_t row) {
  const int first = row == 0 ? s.q_skip : 0;
  return {first, static_cast<int>(std::min<int64_t>(s.block_q, s.q_skip + s.seqlen_q - row * s.block_q))};
}
inline bool is_whole_row(const PatternShape& s, int64_t row) {
  const RowsInBlock rows = queries_in(s, row);
  return rows.first == 0 && rows.last == s.block_q;
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
