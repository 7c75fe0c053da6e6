// The one place that knows which (query, key) pairs causality, window, offsets and key length admit. Bitmaps of the
// pattern come on top (see Problem). Everything is an interval: the admitted keys of a query, and the admitted
// queries of a key, so kernels clip loops instead of testing pairs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tessera {

struct Interval {
  int64_t begin = 0, end = 0;  // [begin, end); empty when end <= begin
  bool empty() const { return end <= begin; }
  int64_t size() const { return empty() ? 0 : end - begin; }
};

enum class TileKind : uint8_t { empty, full, partial };

// Admits (q, k) iff -right <= q + diagonal - k <= left and k < key_limit.
struct MaskGeometry {
  // Far beyond any index, and sums of two of them still fit.
  static constexpr int64_t kUnlimited = int64_t{1} << 60;

  int64_t diagonal = 0;        // position(q) - position(k) = q - k + diagonal
  int64_t left = kUnlimited;   // keys at most this far before the query
  int64_t right = kUnlimited;  // keys at most this far after the query; causal: 0
  int64_t key_limit = kUnlimited;

  bool admits(int64_t q, int64_t k) const {
    const int64_t distance = q - k + diagonal;
    return distance <= left && distance >= -right && k < key_limit;
  }
  // Keys of [0, seqlen_k) that query q admits.
  Interval keys_of(int64_t q, int64_t seqlen_k) const {
    return {std::max<int64_t>(0, q + diagonal - left),
            std::min(std::min(seqlen_k, key_limit), q + diagonal + right + 1)};
  }
  // Queries of [q_begin, q_end) that admit key k.
  Interval queries_of(int64_t k, int64_t q_begin, int64_t q_end) const {
    if (k >= key_limit) return {q_begin, q_begin};
    return {std::max(q_begin, k - diagonal - right), std::min(q_end, k - diagonal + left + 1)};
  }
  // What the tile [q_begin, q_end) x [k_begin, k_end) is: decided by its corners, as distances are monotone.
  TileKind classify(int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) const {
    const int64_t k_last = std::min(k_end, key_limit) - 1;
    if (q_begin >= q_end || k_begin > k_last) return TileKind::empty;
    const int64_t nearest = q_begin - k_last + diagonal;      // smallest q - k distance in the tile
    const int64_t farthest = q_end - 1 - k_begin + diagonal;  // largest
    if (nearest > left || farthest < -right) return TileKind::empty;
    if (farthest <= left && nearest >= -right && k_end <= key_limit) return TileKind::full;
    return TileKind::partial;
  }
};

}  // namespace tessera
