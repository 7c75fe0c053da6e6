#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "analysis/scan.h"
#include "analysis/top_mass.h"
#include "tessera/analysis.h"
#include "tessera/error.h"

namespace tessera {

namespace {

using analysis::Input;
using analysis::RowBlock;
using analysis::ScanPlan;
using analysis::TopMass;

constexpr float kUnseen = -1;  // coverage of a row that sees no key: it is not counted

// Sums over rows of blocks.
struct Sums {
  double coverage = 0, best = 0, nearest = 0, squared_error = 0, squared_norm = 0;
  int64_t blocks = 0;  // kept, of the rows judged

  Sums& operator+=(const Sums& o) {
    coverage += o.coverage, best += o.best, nearest += o.nearest, blocks += o.blocks;
    squared_error += o.squared_error, squared_norm += o.squared_norm;
    return *this;
  }
};

struct Counts {
  int64_t kept = 0, admissible = 0;  // block pairs
};

// What the pass finds for one pattern; rows of blocks write their own places, so the order of threads leaves no trace.
struct Findings {
  std::vector<float> coverage;  // [B * H, tokens]
  std::vector<Sums> sums;       // [B * H, rows]
};

void record(const RowBlock& row, int64_t head, size_t first_token, int64_t rows, size_t pattern, Findings* findings,
            size_t tokens) {
  const RowBlock::Kept& kept = row.kept[pattern];
  float* coverage = findings->coverage.data() + static_cast<size_t>(head) * tokens + first_token;
  Sums& sums = findings->sums[static_cast<size_t>(head * rows + row.i)];
  for (size_t r = 0; r < row.tokens.size(); ++r) {
    coverage[r] = row.total[r] > 0 ? static_cast<float>(kept.share[r]) : kUnseen;
    sums.coverage += kept.share[r];
  }
  sums.blocks = kept.blocks;
  sums.best = row.best[static_cast<size_t>(kept.blocks)];
  sums.nearest = row.nearest[static_cast<size_t>(kept.blocks)];
  sums.squared_error = kept.squared_error;
  sums.squared_norm = row.squared_norm;
}

Counts count_blocks(const Problem& problem, const BlockPatternView& pattern, int64_t b, int64_t h) {
  Counts counts;
  for (int64_t i = 0; i < pattern.shape.rows(); ++i) {
    const Interval columns = analysis::admissible_columns(problem, b, i, pattern.shape);
    counts.admissible += columns.size();
    counts.kept += analysis::kept_blocks(pattern, pattern.row_id(b, h, i), columns);
  }
  return counts;
}

// `coverage` loses its rows that see no key and its order.
QualityFigures figures_of(std::vector<float>& coverage, const Sums& sums, const Counts& counts, const TopMass& masses,
                          bool has_v) {
  QualityFigures f;
  coverage.erase(std::remove(coverage.begin(), coverage.end(), kUnseen), coverage.end());
  f.rows = static_cast<int64_t>(coverage.size());
  if (counts.admissible > 0) f.density = static_cast<double>(counts.kept) / static_cast<double>(counts.admissible);
  if (f.rows > 0) {
    const double rows = static_cast<double>(f.rows);
    f.coverage = sums.coverage / rows;
    f.locality = sums.nearest / rows;
    f.oracle_coverage = sums.best / rows;
    f.bound_coverage = std::min(1.0, masses.largest(sums.blocks) / rows);
    const int64_t rank = std::max<int64_t>(0, (f.rows + 19) / 20 - 1);  // nearest rank: ceil(5 % of the rows)
    std::nth_element(coverage.begin(), coverage.begin() + rank, coverage.end());
    f.coverage_p5 = coverage[static_cast<size_t>(rank)];
    f.coverage_min = *std::min_element(coverage.begin(), coverage.begin() + rank + 1);
  }
  if (f.density > 0) f.efficiency = f.coverage / f.density;
  if (f.oracle_coverage > 0) f.oracle_ratio = f.coverage / f.oracle_coverage;
  if (has_v) f.output_error = sums.squared_norm == 0 ? 0.0 : std::sqrt(sums.squared_error / sums.squared_norm);
  return f;
}

Quality summarise(const Problem& problem, const BlockPatternView& pattern, const Findings& findings,
                  const std::vector<TopMass>& masses, const TopMass& all_masses, size_t tokens, bool has_v) {
  const int64_t rows = pattern.shape.rows();
  Sums all_sums;
  Counts all_counts;
  std::vector<float> all_coverage = findings.coverage, head_coverage;
  Quality result;
  for (int64_t head = 0; head < problem.batch * problem.heads; ++head) {
    Sums sums;
    for (int64_t i = 0; i < rows; ++i) sums += findings.sums[static_cast<size_t>(head * rows + i)];
    const Counts counts = count_blocks(problem, pattern, head / problem.heads, head % problem.heads);
    const float* first = findings.coverage.data() + static_cast<size_t>(head) * tokens;
    head_coverage.assign(first, first + tokens);
    result.heads.push_back(figures_of(head_coverage, sums, counts, masses[static_cast<size_t>(head)], has_v));
    all_sums += sums;
    all_counts.kept += counts.kept;
    all_counts.admissible += counts.admissible;
  }
  static_cast<QualityFigures&>(result) = figures_of(all_coverage, all_sums, all_counts, all_masses, has_v);
  if (has_v && !std::isfinite(*result.output_error)) {
    fail<NotFinite>("v", "an admitted value that is NaN or infinite", "finite values, or none");
  }
  return result;
}

// All patterns here have the same block sizes and causality and stand at the same place.
void judge(const AnalysisInput& input, std::span<const BlockPattern> patterns, std::span<const size_t> which,
           const std::vector<int64_t>& tokens, Executor& executor, std::vector<Quality>* results) {
  const Input resolved(input, patterns[which[0]]);
  const Problem& problem = resolved.problem();
  std::vector<BlockPatternView> views;
  for (size_t p : which) views.push_back(patterns[p].view());
  const PatternShape& shape = views[0].shape;
  const size_t heads = static_cast<size_t>(problem.batch * problem.heads);

  std::vector<Findings> findings(which.size());
  for (Findings& f : findings) {
    f.coverage.assign(heads * tokens.size(), kUnseen);
    f.sums.resize(heads * static_cast<size_t>(shape.rows()));
  }
  const ScanPlan plan{
      .problem = &problem, .outputs = resolved.has_v(), .grid = shape, .patterns = views, .tokens = tokens};
  std::vector<TopMass> masses(heads);
  analysis::scan(plan, executor, [&](const RowBlock& row) {
    for (const double mass : row.mass) masses[static_cast<size_t>(row.b * problem.heads + row.h)].add(mass);
    const size_t first_token = static_cast<size_t>(row.tokens.data() - plan.tokens.data());
    for (size_t p = 0; p < views.size(); ++p) {
      record(row, row.b * problem.heads + row.h, first_token, shape.rows(), p, &findings[p], tokens.size());
    }
  });
  TopMass all_masses;
  for (const TopMass& head : masses) all_masses += head;
  for (size_t p = 0; p < which.size(); ++p) {
    (*results)[which[p]] =
        summarise(problem, views[p], findings[p], masses, all_masses, tokens.size(), resolved.has_v());
  }
}

}  // namespace

std::vector<Quality> quality(const AnalysisInput& input, std::span<const BlockPattern> patterns, Executor& executor,
                             const QualityOptions& options) {
  if (options.sample_rows < 0) fail("sample_rows", std::to_string(options.sample_rows), "at least 0 (0: all rows)");
  std::vector<Quality> results(patterns.size());
  std::map<std::tuple<int, int, int, bool, int64_t>, std::vector<size_t>> alike;
  for (size_t p = 0; p < patterns.size(); ++p) {
    const Input validated(input, patterns[p]);
    const PatternShape& s = patterns[p].shape();
    const Problem& problem = validated.problem();
    const int64_t diagonal = problem.batch > 0 ? problem.diagonal(0) : 0;
    alike[{s.block_q, s.block_k, s.q_skip, problem.causal, diagonal}].push_back(p);
  }
  if (patterns.empty()) return results;
  const std::vector<int64_t> tokens =
      analysis::sample_tokens(patterns[0].shape().seqlen_q, options.sample_rows, options.seed);
  for (const auto& [what, which] : alike) judge(input, patterns, which, tokens, executor, &results);
  return results;
}

Quality quality(const AnalysisInput& input, const BlockPattern& pattern, Executor& executor,
                const QualityOptions& options) {
  return quality(input, std::span(&pattern, 1), executor, options)[0];
}

std::vector<std::pair<std::string, double>> named(const QualityFigures& f) {
  return {{"coverage", f.coverage},
          {"coverage_p5", f.coverage_p5},
          {"coverage_min", f.coverage_min},
          {"density", f.density},
          {"efficiency", f.efficiency},
          {"locality", f.locality},
          {"oracle_coverage", f.oracle_coverage},
          {"oracle_ratio", f.oracle_ratio},
          {"bound_coverage", f.bound_coverage},
          {"output_error", f.output_error.value_or(std::numeric_limits<double>::quiet_NaN())},
          {"rows", static_cast<double>(f.rows)}};
}

}  // namespace tessera
