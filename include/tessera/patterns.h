// The named patterns. One value, PatternSpec, says everything that defines a pattern; make_pattern builds it in
// O(kept blocks), deterministically.
//
// Admissible pairs: all, or with `causal` those that hold at least one (q, k) with k <= q + seqlen_k - seqlen_q
// (bottom-right alignment). Budget of a row for a density d: max(1, round(d * admissible in the row)); the diagonal
// pair is always kept. Explicit geometry (window, global_tokens, stride) wins over density; statistics() reports the
// density that was achieved.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "tessera/block_pattern.h"

namespace tessera {

enum class PatternKind : uint8_t {
  dense,             // every admissible pair
  causal,            // dense with causal = true
  local_window,      // tokens within window / 2 on either side (causal: window back); no window: nearest, to budget
  dilated_sparse,    // budget shared round-robin among dilation_rates (blocks), nearest first
  global_local,      // first global_tokens as rows and columns, and the local window
  strided,           // (i - j) % stride == 0, or neighbours (Child et al. 2019, section 4.2, on blocks)
  random,            // seeded, exactly the budget a row
  bigbird,           // global + window + random (Zaheer et al. 2020, section 2)
  dilated_segments,  // LongNet on blocks (Ding et al. 2023, section 2.2)
  hierarchical,      // by rank and node; far parts column-structured
};

// Names as the command line takes them ("dilated_sparse"); all of them; and back. Unknown name: Error.
std::string_view name_of(PatternKind kind);
std::span<const PatternKind> all_pattern_kinds();
PatternKind pattern_kind(std::string_view name);

struct PatternSpec {
  PatternKind kind = PatternKind::dense;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int block_q = 128;
  int block_k = 128;
  int64_t heads = 1;  // pattern heads: 1, or H where the pattern differs by head (random, dilated_segments)
  bool causal = false;
  std::optional<double> density;          // in (0, 1]: kept share of the admissible pairs
  std::optional<int64_t> window;          // tokens, >= 1
  std::vector<int64_t> dilation_rates;    // dilated_sparse: blocks, default 1,2,4,8,16; dilated_segments: one a segment
  std::vector<int64_t> segment_lengths;   // dilated_segments: tokens
  std::optional<int64_t> global_tokens;   // global_local, bigbird: tokens
  std::optional<int64_t> stride;          // strided: blocks, >= 1
  uint64_t seed = 0;                      // random, bigbird
  int64_t ranks = 1;                      // hierarchical: equal contiguous shards of the sequence
  int64_t ranks_per_node = 1;             // hierarchical
  std::optional<double> local_density;       // hierarchical: inside a rank
  std::optional<double> global_density;      // hierarchical: inside a node
  std::optional<double> inter_node_density;  // hierarchical: across nodes
  bool operator==(const PatternSpec&) const = default;
};

BlockPattern make_pattern(const PatternSpec& spec);

}  // namespace tessera
