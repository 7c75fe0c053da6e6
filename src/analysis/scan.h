// One streaming pass over the true attention, a row of blocks at a time, with any number of patterns judged on the
// way. The engine of quality() and attention_mass().
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "call/problem.h"
#include "tessera/analysis.h"

namespace tessera::analysis {

// Validates an analysis call by `resolve` and what AnalysisInput excludes. Owns what the Problem borrows.
class Input {
 public:
  Input(const AnalysisInput& input, const BlockPattern& pattern);  // pattern gives the block sizes
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;
  const Problem& problem() const { return problem_; }
  bool has_v() const { return has_v_; }

 private:
  ForwardArgs args_;
  bool has_v_;
  Problem problem_;
};

// Block columns that some query of block row i admits, as [begin, end); they are contiguous.
Interval admissible_columns(const Problem& problem, int64_t b, int64_t i, const PatternShape& grid);

// Kept blocks of a pattern's row (BlockPatternView::row_id) in `columns`.
int64_t kept_blocks(const BlockPatternView& pattern, int64_t row, Interval columns);

// Whether a coverage summed from fp32 masses is `target`: a target of 1 must not fail by their rounding.
inline bool reaches(double coverage, double target) { return coverage >= target * (1 - epsilon_of(DType::f32)); }

// What the pass found for one row of blocks of one head. Spans are valid during the call only.
struct RowBlock {
  int64_t b = 0, h = 0, i = 0;
  std::span<const int64_t> tokens;  // the token rows judged
  Interval columns;                 // admissible block columns
  std::span<const double> total;    // [tokens] sum of softmax numerators; 0: the row sees no key
  std::span<const double> mass;     // [columns] share of the rows' masses in a block, summed over the rows
  std::span<const double> best;     // [columns + 1] mass of the n blocks of most mass
  std::span<const double> nearest;  // [columns + 1] mass of the n blocks nearest to the diagonal, as local_window's
  struct Kept {
    std::span<const double> share;  // [tokens] share of the row's mass that the pattern keeps
    int64_t blocks = 0;             // kept admissible blocks
    double squared_error = 0;       // |sparse - dense|^2 of the rows' outputs (with v)
  };
  std::span<const Kept> kept;  // [patterns]
  double squared_norm = 0;     // |dense|^2 of the rows' outputs (with v)
};

struct ScanPlan {
  const Problem* problem = nullptr;
  bool outputs = false;
  PatternShape grid;                           // lengths, block sizes and q_skip: where rows and columns of blocks lie
  std::span<const BlockPatternView> patterns;  // of this grid
  // Token rows judged, ascending; the same for every head.
  std::vector<int64_t> tokens;
};

// Token rows to judge: all, or one at random in each of `sample` equal strata.
std::vector<int64_t> sample_tokens(int64_t seqlen, int64_t sample, uint64_t seed);

// Calls `consume` for each (b, h, i) with tokens to judge, on any thread, each exactly once. Error if an admitted score
// is NaN or +infinite.
void scan(const ScanPlan& plan, Executor& executor, const std::function<void(const RowBlock&)>& consume);

}  // namespace tessera::analysis
