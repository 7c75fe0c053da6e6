#include <algorithm>
#include <functional>
#include <set>
#include <string>

#include "analysis/scan.h"
#include "tessera/analysis.h"
#include "tessera/error.h"
#include "tessera/pattern_statistics.h"

namespace tessera {

namespace {

using Candidate = OptimizeResult::Candidate;

constexpr int64_t kDensitySteps = 1000;  // densities are tried in steps of 0.1 %
constexpr int64_t kSegmentLevels = 4;    // dilated_segments: at most so many (w, r), each a factor above the last
constexpr int64_t kStrideNeighbours = 32;

constexpr PatternKind kDefaultKinds[] = {
    PatternKind::local_window, PatternKind::dilated_sparse, PatternKind::global_local,    PatternKind::strided,
    PatternKind::random,       PatternKind::bigbird,        PatternKind::dilated_segments};

bool better(const Candidate& a, const Candidate& b) {
  if (a.reached != b.reached) return a.reached;
  if (!a.reached) return a.coverage != b.coverage ? a.coverage > b.coverage : a.density < b.density;
  return a.density != b.density ? a.density < b.density : a.coverage > b.coverage;
}

class Search {
 public:
  Search(const MassMap& mass, bool causal, const OptimizeOptions& options)
      : mass_(mass), causal_(causal), options_(options), cols_(mass.shape.cols()), block_(mass.shape.block_k) {}

  Candidate best_of(PatternKind kind) {
    best_.reset();
    switch (kind) {
      case PatternKind::dense:
      case PatternKind::causal: judge(spec(kind)); break;
      case PatternKind::local_window:
        by_density(spec(kind));
        by_window(spec(kind));
        break;
      case PatternKind::dilated_sparse:
        for (const std::vector<int64_t>& rates :
             {std::vector<int64_t>{}, {1, 2}, {1, 2, 4}, {1, 2, 4, 8}, {1, 4, 16}}) {
          PatternSpec s = spec(kind);
          s.dilation_rates = rates;
          by_density(s);
        }
        break;
      case PatternKind::global_local:
        for (int64_t blocks = 1; blocks == 1 || blocks <= cols_ / 4; blocks *= 2) {
          PatternSpec s = spec(kind);
          s.global_tokens = blocks * block_;
          by_density(s);
          by_window(s);
        }
        break;
      case PatternKind::strided: by_stride(spec(kind)); break;
      case PatternKind::random: by_density(spec(kind)); break;
      case PatternKind::bigbird:
        for (const int64_t blocks : {1, 2}) {
          PatternSpec s = spec(kind);
          s.global_tokens = blocks * block_;
          by_density(s);
        }
        break;
      case PatternKind::dilated_segments: by_segments(spec(kind)); break;
      case PatternKind::hierarchical: {
        PatternSpec s = spec(kind);
        s.ranks = std::min<int64_t>(8, std::max<int64_t>(1, mass_.shape.rows()));
        s.ranks_per_node = std::max<int64_t>(1, s.ranks / 2);
        by_density(s);
        break;
      }
    }
    return *best_;
  }

  int64_t evaluated() const { return evaluated_; }

 private:
  PatternSpec spec(PatternKind kind) const {
    PatternSpec s;
    s.kind = kind;
    s.seqlen_q = mass_.shape.seqlen_q;
    s.seqlen_k = mass_.shape.seqlen_k;
    s.block_q = mass_.shape.block_q;
    s.block_k = mass_.shape.block_k;
    s.causal = causal_;
    s.seed = options_.seed;
    return s;
  }

  bool judge(const PatternSpec& s) {
    const Coverage c = coverage_of(mass_, make_pattern(s));
    ++evaluated_;
    const bool reached = analysis::reaches(c.coverage, options_.target_coverage);
    const Candidate candidate{s, c.coverage, c.density, reached};
    if (!best_ || better(candidate, *best_)) best_ = candidate;
    return reached;
  }

  // Judges set(n) for n in 1..last by bisection for the smallest that reaches the target. Where coverage does not
  // grow with n everywhere the answer is still a pattern that was judged, if not the very cheapest.
  int64_t bisect(int64_t last, const std::function<PatternSpec(int64_t)>& set) {
    int64_t low = 0, high = last;  // low does not reach; high is taken to
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (judge(set(middle)) ? high : low) = middle;
    }
    judge(set(high));
    return high;
  }

  void by_density(const PatternSpec& s) {
    bisect(kDensitySteps, [&s](int64_t n) {
      PatternSpec next = s;
      next.density = static_cast<double>(n) / kDensitySteps;
      return next;
    });
  }

  void by_window(const PatternSpec& s) {
    // A window that is half on either side must be twice the sequence to reach its far end.
    bisect(std::max<int64_t>(1, causal_ ? cols_ : 2 * cols_), [&](int64_t n) {
      PatternSpec next = s;
      next.window = n * block_;
      return next;
    });
  }

  void by_stride(const PatternSpec& s) {
    const int64_t last = std::max<int64_t>(1, cols_);
    const auto with_stride = [&](int64_t n) {
      PatternSpec next = s;
      next.stride = last + 1 - n;
      return next;
    };
    // Coverage is not monotone in the stride: a few larger ones may still reach the target.
    const int64_t found = bisect(last, with_stride);
    for (int64_t n = std::max<int64_t>(1, found - kStrideNeighbours); n < found; ++n) judge(with_stride(n));
  }

  // LongNet's geometric series: segments w, w f, w f^2, ... with rates 1, f, f^2, ... (Ding et al. 2023, section 2.2).
  void by_segments(const PatternSpec& s) {
    const int64_t length = std::max({s.seqlen_q, s.seqlen_k, block_});
    for (int64_t w = block_; w < 2 * length; w *= 2) {
      for (const int64_t factor : {2, 4}) {
        PatternSpec next = s;
        int64_t segment = std::min(w, length), rate = 1;
        for (int64_t level = 0; level < kSegmentLevels; ++level) {
          next.segment_lengths.push_back(segment);
          next.dilation_rates.push_back(rate);
          judge(next);
          if (segment == length) break;
          segment = std::min(segment * factor, length);
          rate *= factor;
        }
      }
    }
  }

  const MassMap& mass_;
  const bool causal_;
  const OptimizeOptions& options_;
  const int64_t cols_, block_;
  std::optional<Candidate> best_;
  int64_t evaluated_ = 0;
};

}  // namespace

OptimizeResult optimize(const MassMap& mass, bool causal, const OptimizeOptions& options) {
  if (!(options.target_coverage > 0 && options.target_coverage <= 1)) {
    fail("target_coverage", std::to_string(options.target_coverage), "a number in (0, 1]");
  }
  if (mass.shape.seqlen_q == 0 || mass.shape.seqlen_k == 0) fail("q, k", "length 0", "at least one query and one key");
  const std::span<const PatternKind> kinds =
      options.kinds.empty() ? std::span<const PatternKind>(kDefaultKinds) : std::span(options.kinds);
  OptimizeResult result;
  Search search(mass, causal, options);
  for (const PatternKind kind : kinds) result.candidates.push_back(search.best_of(kind));
  result.best = result.candidates[0];
  for (const Candidate& candidate : result.candidates) {
    if (better(candidate, result.best)) result.best = candidate;
  }
  result.oracle_density = oracle_density(mass, options.target_coverage);
  result.bound_density = bound_density(mass, options.target_coverage);
  result.evaluated = search.evaluated();
  return result;
}

OptimizeResult optimize(const AnalysisInput& input, int block_q, int block_k, const OptimizeOptions& options,
                        Executor& executor) {
  return optimize(attention_mass(input, block_q, block_k, executor), input.options.causal.value_or(false), options);
}

std::vector<QualityCurve> quality_curves(const AnalysisInput& input, std::span<const PatternSpec> specs,
                                         std::span<const double> densities, int block_q, int block_k,
                                         Executor& executor) {
  const MassMap mass = attention_mass(input, block_q, block_k, executor);
  std::vector<QualityCurve> curves;
  std::vector<BlockPattern> patterns;
  for (PatternSpec spec : specs) {
    curves.push_back({std::string(name_of(spec.kind)), {}});
    spec.seqlen_q = mass.shape.seqlen_q;
    spec.seqlen_k = mass.shape.seqlen_k;
    spec.block_q = block_q;
    spec.block_k = block_k;
    spec.causal = input.options.causal.value_or(false);
    for (const double density : densities) {
      spec.density = density;
      patterns.push_back(make_pattern(spec));
    }
  }
  // The bound also where the patterns came out, so that no line between two of its points runs below one of them.
  std::set<double> bounds(densities.begin(), densities.end());
  for (const BlockPattern& pattern : patterns) bounds.insert(statistics(pattern).density);
  curves.push_back({"best possible", {}});
  for (const double density : bounds) patterns.push_back(bound_pattern(mass, density));
  const std::vector<Quality> judged = quality(input, patterns, executor);
  size_t next = 0;
  const auto fill = [&](QualityCurve& curve, const auto& wanted) {
    for (const double density : wanted) {
      const Quality& q = judged[next++];
      curve.points.push_back({density, q.density, q.coverage, q.output_error});
    }
  };
  for (size_t c = 0; c + 1 < curves.size(); ++c) fill(curves[c], densities);
  fill(curves.back(), bounds);
  return curves;
}

}  // namespace tessera
