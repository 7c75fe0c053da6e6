// Random numbers that depend on (seed, head, row) only.
#pragma once

#include <cstdint>

#include "pattern/geometry.h"

namespace tessera {

// SplitMix64 (Steele, Lea & Flood 2014).
class RandomStream {
 public:
  RandomStream(uint64_t seed, int64_t head, int64_t row)
      : state_(hash_finish(
            hash_word(hash_word(hash_word(0, seed), static_cast<uint64_t>(head)), static_cast<uint64_t>(row)))) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // Uniform in 0..bound - 1, without bias (Lemire 2019). bound in 1..2^32 - 1.
  int64_t below(int64_t bound) {
    const uint64_t n = static_cast<uint64_t>(bound);
    uint64_t product = (next() >> 32) * n;
    if (static_cast<uint32_t>(product) < n) {
      const uint32_t threshold = static_cast<uint32_t>((uint64_t{1} << 32) % n);
      while (static_cast<uint32_t>(product) < threshold) product = (next() >> 32) * n;
    }
    return static_cast<int64_t>(product >> 32);
  }

 private:
  uint64_t state_;
};

}  // namespace tessera
