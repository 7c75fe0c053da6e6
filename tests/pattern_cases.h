// What the pattern tests share: random shapes and patterns, and a pattern as a dense matrix of tokens.
#pragma once

#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "tessera/block_pattern.h"

namespace tessera::testing {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t in(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  double unit() { return std::uniform_real_distribution<double>(0, 1)(engine_); }
  bool chance(double p) { return unit() < p; }
  uint64_t word() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

// Blocks of 1 to 2 bitmap words, a bit more or less than whole; up to ~12 block rows and columns.
inline PatternShape random_shape(Random& random, int64_t heads = 1, int64_t batches = 1) {
  PatternShape s;
  s.block_q = static_cast<int>(16 * random.in(1, 6));
  s.block_k = static_cast<int>(16 * random.in(1, 6));
  s.seqlen_q = random.in(1, 400);
  s.seqlen_k = random.chance(0.4) ? s.seqlen_q : random.in(1, 400);
  s.heads = heads;
  s.batches = batches;
  return s;
}

// Keeps each block with probability density; a third of them full, the others with random bitmaps, also empty and
// full ones, also bits past the ends.
inline BlockPattern random_pattern(Random& random, const PatternShape& shape, double density, bool partial = true) {
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, bitmap_index;
  std::vector<uint64_t> bitmaps;
  const int64_t words = int64_t{shape.block_q} * shape.bitmap_words();
  for (int64_t r = 0; r < shape.total_rows(); ++r) {
    for (int64_t j = 0; j < shape.cols(); ++j) {
      if (!random.chance(density)) continue;
      indices.push_back(static_cast<int32_t>(j));
      if (!partial) continue;
      const int64_t kind = random.in(0, 5);
      if (kind <= 1) {
        bitmap_index.push_back(-1);
        continue;
      }
      bitmap_index.push_back(static_cast<int32_t>(static_cast<int64_t>(bitmaps.size()) / words));
      const uint64_t fill = kind == 2 ? ~uint64_t{0} : 0;
      for (int64_t w = 0; w < words; ++w) bitmaps.push_back(kind <= 3 ? fill : random.word() & random.word());
    }
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  return BlockPattern::from_csr(shape, indptr, indices, bitmap_index, bitmaps);
}

// Token matrix [batches, heads, Sq, Sk] of what the pattern admits, its causality included.
inline std::vector<uint8_t> dense_tokens(const BlockPattern& pattern) {
  const BlockPatternView v = pattern.view();
  const PatternShape& s = v.shape;
  std::vector<uint8_t> out(static_cast<size_t>(s.batches * s.heads * s.seqlen_q * s.seqlen_k), 0);
  for (int64_t g = 0; g < s.batches * s.heads; ++g) {
    for (int64_t q = 0; q < s.seqlen_q; ++q) {
      const int64_t r = g * s.rows() + s.row_of(q);
      for (int64_t e = v.indptr[r]; e < v.indptr[r + 1]; ++e) {
        const uint64_t* bits = v.bitmap(e);
        if (bits != nullptr) bits += s.row_in_block(q) * s.bitmap_words();
        for (int64_t k = 0; k < s.block_k; ++k) {
          const int64_t key = v.indices[e] * int64_t{s.block_k} + k;
          const bool admitted = bits == nullptr || (bits[k / 64] >> (k % 64) & 1) != 0;
          if (s.causal && key > q + s.diagonal()) continue;
          if (key < s.seqlen_k) out[(g * s.seqlen_q + q) * s.seqlen_k + key] = admitted;
        }
      }
    }
  }
  return out;
}

inline std::set<int64_t> columns_of(const BlockPattern& pattern, int64_t head, int64_t row) {
  const BlockPatternView v = pattern.view();
  const int64_t r = v.row_id(0, head, row);
  return {v.indices + v.indptr[r], v.indices + v.indptr[r + 1]};
}

}  // namespace tessera::testing
