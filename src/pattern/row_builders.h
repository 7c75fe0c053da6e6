// The rules of the named patterns, one row at a time. make_pattern checks the options, picks a rule and walks it over
// heads and rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "tessera/patterns.h"

namespace tessera {

// A block row with at least one admissible pair.
struct Row {
  int64_t index = 0;
  int64_t admissible = 0;  // columns 0 .. admissible - 1
  int64_t diagonal = 0;
  int64_t first_key = 0, last_key = 0;  // key positions of its first and last query; may lie outside the keys
};

// What one row may keep: `least` is kept whatever the budget says (1 <= least <= admissible, or both 0).
struct RowRoom {
  int64_t least = 0, admissible = 0;
};

// Budgets of the rows that share a density.
class RowBudget {
 public:
  RowBudget(Budget budget, double density, std::span<const RowRoom> rows);
  int64_t of(int64_t admissible) const {
    return budget_ == Budget::even ? std::min(each_, admissible) : row_budget(density_, admissible);
  }

 private:
  Budget budget_;
  double density_;
  int64_t each_ = 0;  // even
};

// Of spec.density over the rows of `whole`, where nothing but the diagonal is kept anyway.
RowBudget density_budget(const PatternSpec& spec, const PatternShape& whole);

class RowBuilder {
 public:
  virtual ~RowBuilder() = default;
  // Appends the kept columns of the row, ascending.
  virtual void append(int64_t head, const Row& row, std::vector<int32_t>& columns) = 0;
  // Whether heads differ (else head 0 is copied).
  virtual bool by_head() const { return false; }
};

// `spec` has been checked and outlives the builder.
std::unique_ptr<RowBuilder> make_row_builder(const PatternSpec& spec, const PatternShape& shape);

// Throws Error for an invalid value, a missing or a foreign option.
void check_spec(const PatternSpec& spec);

// Column range [first, last] of the token window, clipped to the keys; empty if first > last.
struct ColumnRange {
  int64_t first = 0, last = -1;
};
ColumnRange window_columns(const PatternShape& shape, bool causal, int64_t window, const Row& row);

Row row_of(const PatternShape& shape, bool causal, int64_t index);

// The stride of a density: see patterns.h.
int64_t stride_for_density(const PatternShape& shape, bool causal, double density, Budget budget);

// Defaults that the header documents.
inline constexpr int64_t kDefaultGlobalTokens = 64;
inline constexpr int64_t kDefaultDilationRates[] = {1, 2, 4, 8, 16};

}  // namespace tessera
