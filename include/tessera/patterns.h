// The named patterns. One value, PatternSpec, says everything that defines a pattern; make_pattern builds it in
// O(kept blocks), deterministically.
//
// Admissible pairs: all, or with `causal` those that hold at least one (q, k) with k <= q + seqlen_k - seqlen_q
// (bottom-right alignment). A pattern made with `causal` carries it: calls that take it are causal to the token.
//
// Budget of a density d. Budget::even (the default): the same number b of pairs for every row, capped by what the row
// admits, b >= 1 chosen so that the kept pairs, what the kind keeps anyway included, come nearest to d times all
// admissible ones (of two equally near, the larger b). Budget::proportional: max(1, round(d * admissible in the row)).
// The diagonal pair is always kept. Explicit geometry (window, global_tokens, stride) wins over density; statistics()
// reports the density that was achieved.
//
// Where a row stands: its queries sit at key positions q + seqlen_k - seqlen_q, and its diagonal column d(i) is the
// block column that holds the position of its last query, clamped to 0 (with causal: its last admissible column; with
// seqlen_q == seqlen_k and block_q == block_k: i). "Nearest" means by |j - d(i)|, the past first among equals.
// A row without an admissible pair (causal, seqlen_q > seqlen_k) stays empty.
//
// Rows of a longer sequence (decoding, chunks of a prefill): with q_offset the queries are tokens q_offset ..
// q_offset + seqlen_q - 1 of a sequence of seqlen_total tokens, and each sees the blocks that it sees in the pattern of
// the whole: what for_queries() takes out of that pattern, made without making it. Give seqlen_total, the length that
// budgets, ranks and ends refer to, wherever steps at different lengths have to agree. Its default is the longer of
// seqlen_k and q_offset + seqlen_q.
//
// Options by kind (one that is required and missing, or given and not taken, is an Error that names it; heads, causal
// and seed are taken by all, `seed` changes random and bigbird only):
//   dense, causal     none
//   local_window      window or density (required: one; both: window wins)
//   dilated_sparse    density (required), dilation_rates. When every rate has run out the nearest pairs fill the budget
//   global_local      global_tokens, window or density (required: one; both: window wins; density alone: after the
//                     global columns the nearest pairs up to the budget)
//   strided           stride or density (required: one; both: stride wins; density alone, even: the stride whose kept
//                     pairs come nearest to d times all; proportional: the smallest stride whose kept pairs do not
//                     exceed the budgets of all rows together; neighbours are kept anyway)
//   random            density (required)
//   bigbird           density (required): random pairs up to the budget, after the global columns and the window.
//                     global_tokens, window (not given: the diagonal column and its two neighbours, as in the paper)
//   dilated_segments  segment_lengths, dilation_rates (required, equally many). Row i and column j share a segment if
//                     some token of each lies in it, row tokens taken at their key positions (clamped to the keys)
//   hierarchical      local_density, global_density, inter_node_density (`density` stands for those not given);
//                     ranks, ranks_per_node. Row i belongs to rank i * ranks / rows, column j to rank j * ranks / cols.
//                     Each part has its own budget from its own admissible pairs; the far parts one a rank, even ones
//                     the same for all ranks. Own rank: nearest pairs. Other ranks
//                     of the node, and other nodes: columns evenly spread over those that the last row of the rank
//                     admits, the same ones for all its rows
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

// How a density is shared out among rows; see above.
enum class Budget : uint8_t { even, proportional };
std::string_view name_of(Budget budget);       // "even", "proportional"
Budget budget_of_name(std::string_view name);  // Error for another name

struct PatternSpec {
  PatternKind kind = PatternKind::dense;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int block_q = 128;
  int block_k = 128;
  int64_t heads = 1;  // pattern heads: 1, or H where the pattern differs by head (random, dilated_segments)
  bool causal = false;
  std::optional<double> density;  // in (0, 1]: kept share of the admissible pairs
  Budget budget = Budget::even;
  std::optional<int64_t> q_offset;           // the queries are rows of a longer sequence: tokens from this one on
  std::optional<int64_t> seqlen_total;       // with q_offset: tokens of the longer sequence
  std::optional<int64_t> window;             // tokens, >= 1; whole on the past side if causal, else half on either side
  std::vector<int64_t> dilation_rates;       // blocks, each >= 1; dilated_sparse: default 1,2,4,8,16
  std::vector<int64_t> segment_lengths;      // dilated_segments: tokens, each >= 1
  std::optional<int64_t> global_tokens;      // global_local, bigbird: tokens, >= 0, default 64
  std::optional<int64_t> stride;             // strided: blocks, >= 1
  uint64_t seed = 0;                         // random, bigbird: every (seed, head, row) draws on its own
  int64_t ranks = 1;                         // hierarchical: equal contiguous shards of the sequence
  int64_t ranks_per_node = 1;                // hierarchical: the last node may have fewer
  std::optional<double> local_density;       // hierarchical: inside a rank, in (0, 1]
  std::optional<double> global_density;      // hierarchical: inside a node, in [0, 1]; 0 keeps none
  std::optional<double> inter_node_density;  // hierarchical: across nodes, in [0, 1]; 0 keeps none
  bool operator==(const PatternSpec&) const = default;
};

// Error for an invalid value, a missing or a foreign option, or a pattern of more than 2^32 kept blocks.
BlockPattern make_pattern(const PatternSpec& spec);

// The terms that budgets are made of. Admissible columns of block row i are 0 .. admissible_cols(...) - 1.
int64_t admissible_cols(const PatternShape& shape, bool causal, int64_t row);
int64_t diagonal_col(const PatternShape& shape, int64_t row);  // d(i); needs seqlen_q, seqlen_k > 0
int64_t row_budget(double density, int64_t admissible);        // max(1, round), halves up; 0 if none is admissible
// The even budget b of a density: rooms are the admissible pairs of each row.
int64_t even_budget(double density, std::span<const int64_t> rooms);

}  // namespace tessera
