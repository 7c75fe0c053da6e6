// Which pairs of a call count: the one place where the intervals of MaskGeometry (causality, window, key length, ragged
// ends) and the bitmaps of partial blocks meet. Kernels ask it for a block, a run of keys or a row of bits at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "call/problem.h"

namespace tessera {

// Bits low .. high - 1, of 64; none where high <= low.
inline uint64_t bits_between(int64_t low, int64_t high) {
  return high <= low ? 0 : (~uint64_t{0} >> (64 - (high - low))) << low;
}

// Of one batch. "Keys of an entry" are those of its block. The pattern must outlive it.
class PairMask {
 public:
  PairMask() = default;
  PairMask(const Problem& p, int64_t b) : PairMask(p.pattern, p.mask(b), p.seqlen_k, b) {}
  PairMask(const BlockPatternView& pattern, const MaskGeometry& geometry, int64_t seqlen_k, int64_t b)
      : pattern_(&pattern), geometry_(geometry), seqlen_k_(seqlen_k), b_(b) {}

  const MaskGeometry& geometry() const { return geometry_; }

  // Keys of an entry that queries [q_begin, q_end) may admit: no other is, bitmaps aside.
  Interval keys(int64_t entry, int64_t q_begin, int64_t q_end) const {
    const int64_t begin = pattern_->key_begin(entry);
    return {std::max(begin, geometry_.keys_of(q_begin, seqlen_k_).begin),
            std::min(begin + pattern_->shape.block_k, geometry_.keys_of(q_end - 1, seqlen_k_).end)};
  }
  // Every one of these keys of an entry is admitted by every one of the queries.
  bool full(int64_t entry, int64_t q_begin, int64_t q_end, Interval keys) const {
    return pattern_->bitmap(entry) == nullptr &&
           geometry_.classify(q_begin, q_end, keys.begin, keys.end) == TileKind::full;
  }

  // Which of the keys [first, first + n) of an entry query q admits, n <= 64: bit i is key first + i.
  uint64_t bits(int64_t entry, int64_t q, int64_t first, int64_t n) const {
    const Interval keys = geometry_.keys_of(q, seqlen_k_);
    const uint64_t inside = bits_between(std::max<int64_t>(keys.begin - first, 0), std::min(keys.end - first, n));
    const uint64_t* words = pattern_->bitmap_row(entry, q);
    return inside == 0 || words == nullptr ? inside : inside & bits_from(words, first - pattern_->key_begin(entry));
  }
  // The same with a query a bit: bit r of to[i] is the pair of query q + r and key first + i; rows <= 64, any n.
  void bits_by_key(int64_t entry, int64_t q, int64_t rows, int64_t first, int64_t n, uint64_t* to) const {
    for (int64_t i = 0; i < n; ++i) {
      const Interval queries = geometry_.queries_of(first + i, q, q + rows);
      to[i] = bits_between(queries.begin - q, queries.end - q);
    }
    if (pattern_->bitmap(entry) == nullptr) return;
    for (int64_t done = 0; done < n; done += 64) {
      uint64_t square[64] = {};
      for (int64_t r = 0; r < rows; ++r) {
        square[r] = bits_from(pattern_->bitmap_row(entry, q + r), first + done - pattern_->key_begin(entry));
      }
      transpose(square);
      for (int64_t i = 0; i < std::min<int64_t>(64, n - done); ++i) to[done + i] &= square[i];
    }
  }

  // Calls visit(first, bits) for query q and all keys of an entry, 64 or less at a time, ascending.
  template <class Visit>
  void for_each_word(int64_t entry, int64_t q, Visit visit) const {
    const int64_t begin = pattern_->key_begin(entry), block_k = pattern_->shape.block_k;
    for (int64_t i = 0; i < block_k; i += 64) {
      visit(begin + i, bits(entry, q, begin + i, std::min<int64_t>(64, block_k - i)));
    }
  }
  // Calls visit(k) for the keys of an entry that query q admits, ascending.
  template <class Visit>
  void for_each_key(int64_t entry, int64_t q, Visit visit) const {
    for_each_word(entry, q, [&](int64_t first, uint64_t word) {
      for (; word != 0; word &= word - 1) visit(first + std::countr_zero(word));
    });
  }
  // Calls visit(entry, k) for all keys that query q of head h admits, ascending.
  template <class Visit>
  void for_each_pair(int64_t h, int64_t q, Visit visit) const {
    const int64_t row = pattern_->row_id(b_, h, pattern_->shape.row_of(q));
    for (int64_t e = pattern_->indptr[row]; e < pattern_->indptr[row + 1]; ++e) {
      for_each_key(e, q, [&](int64_t k) { visit(e, k); });
    }
  }
  bool any(int64_t entry, int64_t q) const {
    uint64_t all = 0;
    for_each_word(entry, q, [&](int64_t, uint64_t word) { all |= word; });
    return all != 0;
  }

 private:
  // 64 bits of a row of a bitmap from bit `at` on; 0 past its end.
  uint64_t bits_from(const uint64_t* words, int64_t at) const {
    const int64_t word = at / 64, skip = at % 64;
    uint64_t bits = words[word] >> skip;
    if (skip != 0 && word + 1 < pattern_->shape.bitmap_words()) bits |= words[word + 1] << (64 - skip);
    return bits;
  }
  // Bit c of row r becomes bit r of row c, by halves (Warren, Hacker's Delight, 7-3).
  static void transpose(uint64_t* rows) {
    uint64_t mask = 0xffffffff;
    for (int half = 32; half != 0; half >>= 1, mask ^= mask << half) {
      for (int r = 0; r < 64; r = ((r | half) + 1) & ~half) {
        const uint64_t swapped = ((rows[r] >> half) ^ rows[r | half]) & mask;
        rows[r] ^= swapped << half;
        rows[r | half] ^= swapped;
      }
    }
  }

  const BlockPatternView* pattern_ = nullptr;
  MaskGeometry geometry_;
  int64_t seqlen_k_ = 0, b_ = 0;
};

}  // namespace tessera
