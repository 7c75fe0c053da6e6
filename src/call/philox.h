// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011): a keyed
// bijection of 128-bit counters, so that every pair's random number is a pure function of its position.
#pragma once

#include <array>
#include <cstdint>

#include "tessera/attention.h"

namespace tessera {

struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  static constexpr int kRounds = 10;
  using Counter = std::array<uint32_t, 4>;
  using Key = std::array<uint32_t, 2>;

  static constexpr Counter words(Counter c, Key key) {
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t p0 = uint64_t{kMultiplier0} * c[0], p1 = uint64_t{kMultiplier1} * c[2];
      c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(p1),
           static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p0)};
      key = {key[0] + kWeyl0, key[1] + kWeyl1};
    }
    return c;
  }
};

// Key and counter of a pair. The counter's words are 32 bits wide: the offset's upper half is hashed into the key
// (Steele, Lea and Flood's mixer), so that all 64 bits of it count. (Joined by XOR, seeds and offsets that differ could
// agree.)
constexpr Philox::Key dropout_key(const Dropout& d) {
  uint64_t key = d.seed;
  if (const uint64_t upper = d.offset >> 32; upper != 0) {
    key += upper * 0x9e3779b97f4a7c15u;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
    key = (key ^ (key >> 27)) * 0x94d049bb133111ebu;
    key ^= key >> 31;
  }
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}
constexpr Philox::Counter dropout_counter(const Dropout& d, uint64_t batch_head, int64_t q_position,
                                          int64_t k_position) {
  return {static_cast<uint32_t>(k_position >> 2), static_cast<uint32_t>(q_position), static_cast<uint32_t>(batch_head),
          static_cast<uint32_t>(d.offset)};
}

}  // namespace tessera
