// Configurations that every direction of attention must get right, one list a hostility, with the smallest sizes at
// which it meets a tile edge (tiles are up to 8 rows by 64 keys, blocks here 16 to 128).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "check/cases.h"

namespace tessera {

// A dense case of (queries, keys, head dim) and what the direction under test wants beside it.
using SmallCase = check::CaseConfig (*)(int64_t, int64_t, int64_t);
using CaseList = std::vector<check::CaseConfig>;

inline check::CaseConfig dense_case(int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim) {
  check::CaseConfig c;
  c.seed = static_cast<uint64_t>(seqlen_q * 1000003 + seqlen_k * 1009 + head_dim);
  c.seqlen_q = seqlen_q;
  c.seqlen_k = seqlen_k;
  c.head_dim = c.head_dim_v = head_dim;
  c.density = 1;
  return c;
}

inline CaseList lengths_around_a_block(SmallCase small) {
  CaseList list;
  for (const int64_t block : {16, 64, 128}) {
    for (const int64_t n : {block - 1, block, block + 1}) {
      check::CaseConfig c = small(n, n + (block < 128 ? block : 0), 24);
      c.block_q = c.block_k = static_cast<int>(block);
      list.push_back(c);
      c.causal = true;
      list.push_back(c);
    }
  }
  return list;
}

inline CaseList block_sizes_that_differ(SmallCase small) {
  CaseList list;
  for (const auto& [block_q, block_k] : {std::pair{16, 256}, {256, 16}, {48, 112}, {112, 80}}) {
    check::CaseConfig c = small(150, 170, 32);
    c.block_q = block_q;
    c.block_k = block_k;
    c.density = 0.6;
    c.causal = true;
    list.push_back(c);
    c.source = check::PatternSource::random_bitmaps;
    list.push_back(c);
  }
  return list;
}

inline CaseList head_dims(SmallCase small) {
  CaseList list;
  for (const int64_t d : {1, 2, 3, 7, 17, 31, 33, 65, 80, 96, 127, 129, 192, 256, 257, 320}) {
    check::CaseConfig c = small(19, 66, d);
    list.push_back(c);
    c.head_dim_v = d % 5 * 30 + 1;
    list.push_back(c);
  }
  return list;
}

inline CaseList groups_of_heads(SmallCase small) {
  CaseList list;
  for (const auto& [heads, kv_heads] : {std::pair{8, 1}, {8, 2}, {3, 3}, {5, 1}}) {
    check::CaseConfig c = small(40, 50, 16);
    c.batch = 2;
    c.heads = heads;
    c.kv_heads = kv_heads;
    list.push_back(c);
    c.pattern_per_head = c.pattern_per_batch = true;
    c.density = 0.5;
    list.push_back(c);
  }
  return list;
}

inline CaseList masks_of_every_kind(SmallCase small) {
  CaseList list;
  for (const auto& [left, right] : {std::pair{0, 0}, {10, 200}, {200, 10}, {70, 70}}) {
    check::CaseConfig c = small(130, 150, 32);
    c.window_left = left;
    c.window_right = right;
    list.push_back(c);
    c.key_lengths = true;
    c.batch = 3;
    list.push_back(c);
  }
  for (const int64_t offset : {-200, -60, -1, 0, 1, 77, 300}) {  // rows without keys, full tiles, everything
    check::CaseConfig c = small(130, 150, 32);
    c.causal = true;
    c.q_offset = offset;
    list.push_back(c);
  }
  return list;
}

inline CaseList each_option_alone(SmallCase small) {
  CaseList list;
  for (const int64_t q : {7, 90}) {
    for (int option = 0; option < 8; ++option) {
      check::CaseConfig c = small(q, 110, 40);
      c.batch = 2;
      c.heads = 2;
      c.density = 0.7;
      c.softcap = option == 0 ? 2.0 : 0.0;
      c.alibi = option == 1 || option == 2;
      c.alibi_per_batch = option == 2;
      c.block_bias = option == 3;
      c.attn_bias = option == 4 || option == 5;
      c.bias_minus_infinity = option == 5;
      c.sinks = option == 6;
      c.dropout = option == 7 ? 0.4 : 0.0;
      list.push_back(c);
    }
  }
  return list;
}

}  // namespace tessera
