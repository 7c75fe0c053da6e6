// What a pattern looks like: numbers and a drawing in characters.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tessera/block_pattern.h"

namespace tessera {

struct Spread {
  double mean = 0, min = 0, max = 0, std = 0;  // std over the whole population
};

// Over all pattern heads and batches. A block pair is admissible as in patterns.h. Kept pairs that are not admissible
// (a pattern made without `causal`, asked about with it) do not count towards densities.
struct PatternStatistics {
  int64_t rows = 0, cols = 0;  // of one head
  int64_t kept_blocks = 0;     // all of the pattern's
  int64_t partial_blocks = 0;  // those with a bitmap
  int64_t admissible_blocks = 0;
  double density = 0;           // kept and admissible / admissible; 0 if nothing is admissible
  double sparsity = 0;          // 1 - density
  Spread row_density;           // per row (column): kept share of its admissible pairs; rows (columns) without an
  Spread column_density;        // admissible pair are left out
  double diagonal_density = 0;  // share of the rows with an admissible pair that keep their diagonal column
  int64_t empty_rows = 0;       // rows without a kept pair
  double load_imbalance = 0;    // max / mean kept blocks of a row, 1: even; 0 if nothing is kept
};
// causal: nothing said is the pattern's own; false for a causal pattern is an Error.
PatternStatistics statistics(const BlockPattern& pattern, std::optional<bool> causal = std::nullopt);

// Every figure with its name; those of a spread as "row_density.mean".
std::vector<std::pair<std::string, double>> named(const PatternStatistics& statistics);

// One head as text, a line a row, each ending in '\n'. Up to max_width columns: '#' full, '+' partial, '.' skipped.
// Wider ones: cells of n x n pairs (n the smallest that fits) shaded ".:-=+*#%@" by the kept share, '.' only where
// nothing and '@' only where everything is kept.
std::string ascii(const BlockPattern& pattern, int64_t head = 0, int64_t max_width = 80, int64_t batch = 0);

}  // namespace tessera
