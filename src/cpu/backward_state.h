// What the units of a backward call share.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "call/backward_problem.h"

namespace tessera::cpu {

// Whose turn it is to add to a place that several units add to. Turns are fixed by the pattern, so sums do not depend
// on the threads. Units are taken in the order of their turns and a thread runs one at a time: whoever is waited for is
// running, so no thread waits for ever, however few of them run at once.
class Turn {
 public:
  void wait(int64_t turn) const {
    for (int spins = 0; next_.load(std::memory_order_acquire) != turn; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
  }
  void set(int64_t turn) { next_.store(turn, std::memory_order_release); }

 private:
  static constexpr int kSpins = 200;
  std::atomic<int64_t> next_{0};
};

// A row of blocks of one head: the entries whose blocks hold an admitted pair are [first, end), as masks are intervals.
struct RowOfBlocks {
  Turn turn;  // entry that adds next to dq
  int64_t first = 0, end = 0;
};

// One problem of a backward call.
struct BackwardState {
  const BackwardProblem* problem = nullptr;
  // Of query i of (b, h) at (b * H + h) * Sq + i. lse in log2 units, +inf for rows without keys (their weights are 0);
  // rowsum(dout * out) - dlse, 0 for rows without keys.
  float* lse2 = nullptr;
  float* delta = nullptr;
  RowOfBlocks* rows = nullptr;  // [B, H, rows]
  float* dq_sums = nullptr;     // fp32 [B, H, Sq, D] where dq is stored in 16 bits
  // Sums of dscore of entry e of (b, h): bias_sums[(b * H + h) * bias_entries + e - first entry of the pattern head].
  float* bias_sums = nullptr;
  int64_t bias_entries = 0;

  int64_t row_index(int64_t b, int64_t h, int64_t i) const {
    const Problem& p = problem->forward;
    return (b * p.heads + h) * p.pattern.shape.rows() + i;
  }
  int64_t query_index(int64_t b, int64_t h, int64_t q) const {
    const Problem& p = problem->forward;
    return (b * p.heads + h) * p.seqlen_q + q;
  }
  // Does block (i, j) hold a pair that the mask admits?
  bool live(const MaskGeometry& mask, int64_t i, int64_t j) const {
    const Problem& p = problem->forward;
    const PatternShape& s = p.pattern.shape;
    return mask.classify(s.query_begin(i), s.query_end(i), j * s.block_k,
                         std::min<int64_t>((j + 1) * s.block_k, p.seqlen_k)) != TileKind::empty;
  }
};

// A unit: block column `col` of a kv head against the live blocks of that column, in the order of the heads of the
// group, then rows; of these the blocks [begin, end). A long column is cut into several units ("parts").
struct ColumnUnit {
  int64_t b = 0, kv_head = 0, col = 0;
  int64_t begin = 0, end = 0;
  int part = 0, parts = 1;
  Turn* turn = nullptr;   // part that adds next to dk and dv; nullptr: only one
  float* sums = nullptr;  // fp32 [block_k, D + Dv] where several parts meet and dk, dv are stored in 16 bits
};

// A unit of the gradient of attn_bias: its elements for bias batch and head (b, h), block row i and block column j.
// Where the bias has size 1 in a dimension, the index is 0 and the unit sums over that dimension.
struct BiasUnit {
  int64_t b = 0, h = 0, i = 0, j = 0;
};

}  // namespace tessera::cpu
