#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "pattern/geometry.h"
#include "tessera/pattern_statistics.h"
#include "tessera/patterns.h"

namespace tessera {

namespace {

// Mean and variance in one pass (Welford 1962).
class SpreadOf {
 public:
  void add(double x) {
    min_ = count_ == 0 ? x : std::min(min_, x);
    max_ = count_ == 0 ? x : std::max(max_, x);
    ++count_;
    const double delta = x - mean_;
    mean_ += delta / static_cast<double>(count_);
    squares_ += delta * (x - mean_);
  }
  Spread get() const {
    if (count_ == 0) return {};
    return {mean_, min_, max_, std::sqrt(squares_ / static_cast<double>(count_))};
  }

 private:
  int64_t count_ = 0;
  double mean_ = 0, squares_ = 0, min_ = 0, max_ = 0;
};

double share(int64_t part, int64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

PatternStatistics statistics(const BlockPattern& pattern, std::optional<bool> asked) {
  const BlockPatternView view = pattern.view();
  const bool causal = resolve_causal(view.shape, asked);
  const PatternShape& shape = view.shape;
  const int64_t groups = shape.batches * shape.heads;
  PatternStatistics out;
  out.rows = shape.rows();
  out.cols = shape.cols();
  out.kept_blocks = pattern.num_blocks();
  if (view.bitmap_index != nullptr) {
    for (int64_t e = 0; e < out.kept_blocks; ++e) out.partial_blocks += view.bitmap_index[e] >= 0;
  }

  // Rows that admit column j: admissible columns never get fewer from row to row, so they are the last ones.
  std::vector<int64_t> admissible(out.rows), admitting(out.cols, 0);
  for (int64_t i = 0, j = 0; i < out.rows; ++i) {
    admissible[i] = admissible_cols(shape, causal, i);
    for (; j < admissible[i]; ++j) admitting[j] = out.rows - i;
  }

  SpreadOf row_density, column_density;
  std::vector<int64_t> kept_in_column(out.cols);
  int64_t kept_admissible = 0, rows_with_work = 0, diagonals = 0, longest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    std::fill(kept_in_column.begin(), kept_in_column.end(), 0);
    for (int64_t i = 0; i < out.rows; ++i) {
      const int64_t r = g * out.rows + i, kept = view.indptr[r + 1] - view.indptr[r];
      longest = std::max(longest, kept);
      out.empty_rows += kept == 0;
      if (admissible[i] == 0) continue;
      const int64_t diagonal = diagonal_col(shape, i);
      int64_t inside = 0;
      for (int64_t e = view.indptr[r]; e < view.indptr[r + 1] && view.indices[e] < admissible[i]; ++e) {
        ++inside;
        ++kept_in_column[view.indices[e]];
        diagonals += view.indices[e] == diagonal;
      }
      ++rows_with_work;
      kept_admissible += inside;
      out.admissible_blocks += admissible[i];
      row_density.add(share(inside, admissible[i]));
    }
    for (int64_t j = 0; j < out.cols; ++j) {
      if (admitting[j] > 0) column_density.add(share(kept_in_column[j], admitting[j]));
    }
  }
  out.density = share(kept_admissible, out.admissible_blocks);
  out.sparsity = 1 - out.density;
  out.row_density = row_density.get();
  out.column_density = column_density.get();
  out.diagonal_density = share(diagonals, rows_with_work);
  if (out.kept_blocks > 0) {
    const double mean = static_cast<double>(out.kept_blocks) / static_cast<double>(groups * out.rows);
    out.load_imbalance = static_cast<double>(longest) / mean;
  }
  return out;
}

std::vector<std::pair<std::string, double>> named(const PatternStatistics& s) {
  std::vector<std::pair<std::string, double>> all;
  const auto count = [&](const char* name, int64_t n) { all.emplace_back(name, static_cast<double>(n)); };
  const auto spread = [&](const std::string& name, const Spread& x) {
    all.insert(all.end(),
               {{name + ".mean", x.mean}, {name + ".min", x.min}, {name + ".max", x.max}, {name + ".std", x.std}});
  };
  count("rows", s.rows);
  count("cols", s.cols);
  count("kept_blocks", s.kept_blocks);
  count("partial_blocks", s.partial_blocks);
  count("admissible_blocks", s.admissible_blocks);
  all.emplace_back("density", s.density);
  all.emplace_back("sparsity", s.sparsity);
  spread("row_density", s.row_density);
  spread("column_density", s.column_density);
  all.emplace_back("diagonal_density", s.diagonal_density);
  count("empty_rows", s.empty_rows);
  all.emplace_back("load_imbalance", s.load_imbalance);
  return all;
}

}  // namespace tessera
