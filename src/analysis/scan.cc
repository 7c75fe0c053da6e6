#include "analysis/scan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "analysis/tile.h"
#include "call/pair_mask.h"
#include "call/rows.h"
#include "call/scores.h"
#include "core/float_mode.h"
#include "core/work.h"
#include "tessera/error.h"

namespace tessera::analysis {

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

ForwardArgs forward_args(const AnalysisInput& input, const BlockPattern& pattern) {
  if (input.options.block_bias.defined()) {
    fail("block_bias", "a tensor", "none: analysis judges against the attention that has no pattern");
  }
  if (input.options.dropout.p != 0) {
    fail("dropout", std::to_string(input.options.dropout.p), "0: analysis judges the attention without dropout");
  }
  ForwardArgs args;
  args.q = input.q;
  args.k = input.k;
  args.v = input.v.defined() ? input.v : input.k;
  args.pattern = pattern;
  args.options = input.options;
  return args;
}

// Everything one thread needs, allocated before the threads start, as workers must not throw.
class RowScanner {
 public:
  RowScanner(const ScanPlan& plan, int64_t max_columns)
      : plan_(plan), problem_(*plan.problem), value_dim_(round_up(problem_.head_dim_v, kTileColumns)) {
    const size_t rows = static_cast<size_t>(plan.grid.block_q), keys = static_cast<size_t>(plan.grid.block_k);
    const size_t head_dim = static_cast<size_t>(problem_.head_dim), patterns = plan.patterns.size();
    const size_t outputs = plan.outputs ? rows * static_cast<size_t>(value_dim_) : 0;
    q_.resize(rows * head_dim);
    keys_.resize(head_dim * keys);
    scores_.resize(rows * keys);
    begin_.resize(rows);
    end_.resize(rows);
    max_.resize(rows);
    rescale_.resize(rows);
    sum_.resize(rows);
    total_.resize(rows);
    tile_sum_.resize(rows * static_cast<size_t>(max_columns));
    tile_max_.resize(rows * static_cast<size_t>(max_columns));
    mass_.resize(static_cast<size_t>(max_columns));
    best_.resize(static_cast<size_t>(max_columns) + 1);
    nearest_.resize(static_cast<size_t>(max_columns) + 1);
    share_.resize(patterns * rows);
    kept_.resize(patterns);
    next_entry_.resize(patterns);
    if (plan.outputs) {
      values_.resize(keys * static_cast<size_t>(value_dim_));
      product_.resize(outputs);
      dense_.resize(outputs);
      sparse_.resize(patterns * outputs);
    }
    for (const BlockPatternView& p : plan.patterns) {
      if (p.bitmap_index == nullptr) continue;
      masked_.resize(rows * keys);
      masked_product_.resize(outputs);
    }
  }

  // False if a score is not finite.
  bool scan(int64_t b, int64_t h, int64_t i, std::span<const int64_t> tokens, RowBlock* result) {
    b_ = b, h_ = h, i_ = i;
    tokens_ = tokens;
    mask_ = problem_.mask(b);
    columns_ = admissible_columns(problem_, b, i, plan_.grid);
    start();
    bool finite = true;
    for (int64_t j = columns_.begin; j < columns_.end; ++j) finite = scan_tile(j) && finite;
    if (!finite) return false;
    finish(result);
    return true;
  }

 private:
  int64_t rows() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t row_values() const { return rows() * value_dim_; }
  float* sparse(size_t pattern) { return sparse_.data() + pattern * (sparse_.size() / plan_.patterns.size()); }
  double* share(size_t pattern) { return share_.data() + pattern * static_cast<size_t>(plan_.grid.block_q); }

  void start() {
    const int64_t d = problem_.head_dim;
    for (int64_t r = 0; r < rows(); ++r) {
      float* q = q_.data() + r * d;
      load_row(problem_.q.at(b_, tokens_[r], h_, size_of(problem_.dtype)), problem_.dtype, d, q);
      for (int64_t x = 0; x < d; ++x) q[x] *= static_cast<float>(problem_.scale);
    }
    std::fill(max_.begin(), max_.end(), -std::numeric_limits<float>::infinity());
    std::fill(total_.begin(), total_.end(), 0.0);
    std::fill(share_.begin(), share_.end(), 0.0);
    std::fill(dense_.begin(), dense_.end(), 0.0f);
    std::fill(sparse_.begin(), sparse_.end(), 0.0f);
    for (size_t p = 0; p < plan_.patterns.size(); ++p) {
      const BlockPatternView& pattern = plan_.patterns[p];
      const int64_t row = pattern.row_id(b_, h_, i_);
      next_entry_[p] = pattern.indptr[row];
      kept_[p] = {};
      kept_[p].blocks = kept_blocks(pattern, row, columns_);
    }
  }

  // Only keys that some row of this row of blocks admits are read: the rest becomes zero, whatever lies in memory.
  void load_tile(int64_t j, Interval admitted) {
    const int64_t h = h_ / problem_.group();
    const int64_t first = j * plan_.grid.block_k;
    const size_t size = size_of(problem_.dtype);
    std::fill(keys_.begin(), keys_.end(), 0.0f);
    for (int64_t k = admitted.begin; k < admitted.end; ++k) {
      load_row(problem_.k.at(b_, k, h, size), problem_.dtype, problem_.head_dim, keys_.data() + (k - first),
               plan_.grid.block_k);
    }
    if (!plan_.outputs) return;
    std::fill(values_.begin(), values_.end(), 0.0f);
    for (int64_t k = admitted.begin; k < admitted.end; ++k) {
      load_row(problem_.v.at(b_, k, h, size), problem_.dtype, problem_.head_dim_v,
               values_.data() + (k - first) * value_dim_);
    }
  }

  bool scan_tile(int64_t j) {
    const int64_t first = j * plan_.grid.block_k;
    const int64_t last = std::min(first + plan_.grid.block_k, problem_.seqlen_k);
    Interval admitted{last, first};
    for (int64_t r = 0; r < rows(); ++r) {
      const Interval keys = mask_.keys_of(tokens_[r], problem_.seqlen_k);
      const int64_t begin = std::clamp(keys.begin, first, last), end = std::clamp(keys.end, begin, last);
      begin_[r] = static_cast<int32_t>(begin - first);
      end_[r] = static_cast<int32_t>(end - first);
      if (begin < end) admitted = {std::min(admitted.begin, begin), std::max(admitted.end, end)};
    }
    const int64_t slot = (j - columns_.begin) * plan_.grid.block_q;
    if (admitted.empty()) {  // with sampled rows a block that the row of blocks admits may be out of their reach
      std::fill_n(tile_sum_.begin() + slot, rows(), 0.0f);
      std::fill_n(tile_max_.begin() + slot, rows(), 0.0f);
      return true;
    }
    load_tile(j, admitted);
    multiply(q_.data(), keys_.data(), scores_.data(), rows(), problem_.head_dim, plan_.grid.block_k);
    if (ScoreTerms::any(problem_)) adjust_tile(first);
    if (!softmax_numerators(scores_.data(), rows(), plan_.grid.block_k, begin_.data(), end_.data(), max_.data(),
                            rescale_.data(), sum_.data())) {
      return false;
    }
    for (int64_t r = 0; r < rows(); ++r) {
      if (rescale_[r] != 1) rescale_row(r);
      total_[r] += sum_[r];
      tile_sum_[slot + r] = sum_[r];
      tile_max_[slot + r] = max_[r];
    }
    if (plan_.outputs) {
      multiply(scores_.data(), values_.data(), product_.data(), rows(), plan_.grid.block_k, value_dim_);
      add_to(dense_.data(), product_.data(), row_values());
    }
    for (size_t p = 0; p < plan_.patterns.size(); ++p) keep_tile(p, j);
    return true;
  }

  void adjust_tile(int64_t first) {
    for (int64_t r = 0; r < rows(); ++r) {
      const RowScores<double> scores(problem_, b_, h_, tokens_[r]);
      float* row = scores_.data() + r * plan_.grid.block_k;
      for (int32_t c = begin_[r]; c < end_[r]; ++c) {
        row[c] = static_cast<float>(scores.of_scaled(row[c], kNoEntry, first + c));
      }
    }
  }

  void rescale_row(int64_t r) {
    total_[r] *= rescale_[r];
    if (plan_.outputs) scale_by(dense_.data() + r * value_dim_, rescale_[r], value_dim_);
    for (size_t p = 0; p < plan_.patterns.size(); ++p) {
      share(p)[r] *= rescale_[r];
      if (plan_.outputs) scale_by(sparse(p) + r * value_dim_, rescale_[r], value_dim_);
    }
  }

  void keep_tile(size_t p, int64_t j) {
    const BlockPatternView& pattern = plan_.patterns[p];
    const int64_t row_end = pattern.indptr[pattern.row_id(b_, h_, i_) + 1];
    int64_t& entry = next_entry_[p];
    while (entry < row_end && pattern.indices[entry] < j) ++entry;
    if (entry == row_end || pattern.indices[entry] != j) return;
    if (pattern.bitmap(entry) == nullptr) {
      for (int64_t r = 0; r < rows(); ++r) share(p)[r] += sum_[r];
      if (plan_.outputs) add_to(sparse(p), product_.data(), row_values());
      return;
    }
    const PairMask mask(pattern, mask_, problem_.seqlen_k, b_);
    std::fill(masked_.begin(), masked_.end(), 0.0f);
    for (int64_t r = 0; r < rows(); ++r) {
      double sum = 0;
      mask.for_each_key(entry, tokens_[r], [&](int64_t k) {
        const int64_t at = r * plan_.grid.block_k + k - j * plan_.grid.block_k;
        masked_[at] = scores_[at];
        sum += scores_[at];
      });
      share(p)[r] += sum;
    }
    if (!plan_.outputs) return;
    // Its own buffer: other patterns still need the whole block's product.
    multiply(masked_.data(), values_.data(), masked_product_.data(), rows(), plan_.grid.block_k, value_dim_);
    add_to(sparse(p), masked_product_.data(), row_values());
  }

  void finish(RowBlock* result) {
    std::fill(mass_.begin(), mass_.end(), 0.0);
    for (int64_t c = 0; c < columns_.size(); ++c) {
      for (int64_t r = 0; r < rows(); ++r) {
        const size_t slot = static_cast<size_t>(c * plan_.grid.block_q + r);
        if (tile_sum_[slot] == 0) continue;
        const double factor = tile_max_[slot] == max_[r] ? 1.0 : std::exp(double{tile_max_[slot]} - double{max_[r]});
        mass_[c] += tile_sum_[slot] * factor / total_[r];
      }
    }
    result->b = b_, result->h = h_, result->i = i_;
    result->tokens = tokens_;
    result->columns = columns_;
    result->total = {total_.data(), tokens_.size()};
    result->mass = {mass_.data(), static_cast<size_t>(columns_.size())};
    rank_columns();
    result->best = {best_.data(), result->mass.size() + 1};
    result->nearest = {nearest_.data(), result->mass.size() + 1};
    result->squared_norm = 0;
    if (plan_.outputs) {
      for (int64_t r = 0; r < rows(); ++r) result->squared_norm += normalise_and_measure(r);
    }
    for (size_t p = 0; p < plan_.patterns.size(); ++p) {
      // Under a bitmap the numerators are added in another order: rounding may pass 1.
      for (int64_t r = 0; r < rows(); ++r) {
        share(p)[r] = total_[r] > 0 ? std::min(1.0, share(p)[r] / total_[r]) : 0.0;
      }
      kept_[p].share = {share(p), tokens_.size()};
    }
    result->kept = kept_;
  }

  void rank_columns() {
    const int64_t n = columns_.size();
    best_[0] = nearest_[0] = 0;
    std::copy_n(mass_.begin(), n, best_.begin() + 1);
    std::sort(best_.begin() + 1, best_.begin() + 1 + n, std::greater<>());
    for (int64_t c = 1; c <= n; ++c) best_[c] += best_[c - 1];
    // patterns.h: by |j - d|, the past first among equals; d holds the position of the row's last query.
    const int64_t last_query = plan_.grid.query_end(i_) - 1;
    const int64_t position = std::max<int64_t>(0, last_query + mask_.diagonal);
    const int64_t d = std::clamp(position / plan_.grid.block_k, columns_.begin, columns_.end - (n > 0 ? 1 : 0));
    int64_t past = d, future = d + 1;
    for (int64_t c = 1; c <= n; ++c) {
      const bool take_past = past >= columns_.begin && (future >= columns_.end || d - past <= future - d);
      nearest_[c] = nearest_[c - 1] + mass_[(take_past ? past-- : future++) - columns_.begin];
    }
  }

  // Denominator of a row over the keys whose numerators sum to `sum`; the sink's logit joins where a key is seen.
  double denominator(int64_t r, double sum) const {
    if (!problem_.sinks || sum == 0) return sum;
    return sum + std::exp(double{*problem_.sinks.at(0, h_)} - double{max_[r]});
  }

  // Adds each pattern's squared error of row r to kept_ and returns the squared norm of the dense row.
  double normalise_and_measure(int64_t r) {
    const double dense_sum = denominator(r, total_[r]);
    if (dense_sum == 0) return 0;
    const float* dense = dense_.data() + r * value_dim_;
    double norm = 0;
    for (int64_t x = 0; x < problem_.head_dim_v; ++x) norm += dense[x] / dense_sum * (dense[x] / dense_sum);
    for (size_t p = 0; p < plan_.patterns.size(); ++p) {
      const double kept_sum = denominator(r, share(p)[r]);
      const float* kept = sparse(p) + r * value_dim_;
      double error = 0;
      for (int64_t x = 0; x < problem_.head_dim_v; ++x) {
        const double difference = (kept_sum > 0 ? kept[x] / kept_sum : 0.0) - dense[x] / dense_sum;
        error += difference * difference;
      }
      kept_[p].squared_error += error;
    }
    return norm;
  }

  const ScanPlan& plan_;
  const Problem& problem_;
  int64_t value_dim_;
  int64_t b_ = 0, h_ = 0, i_ = 0;
  std::span<const int64_t> tokens_;
  MaskGeometry mask_;
  Interval columns_;

  std::vector<float> q_;                    // [rows, head_dim], scaled
  std::vector<float> keys_;                 // [head_dim, block_k]
  std::vector<float> values_;               // [block_k, value_dim]
  std::vector<float> scores_;               // [rows, block_k], then the numerators
  std::vector<float> masked_;               // [rows, block_k], numerators under a bitmap
  std::vector<int32_t> begin_, end_;        // [rows] admitted columns of the tile
  std::vector<float> max_, rescale_, sum_;  // [rows]
  std::vector<double> total_;               // [rows]
  std::vector<float> tile_sum_, tile_max_;  // [columns, block_q]: sum of a tile's numerators and their maximum
  std::vector<double> mass_;                // [columns]
  std::vector<double> best_, nearest_;      // [columns + 1]
  std::vector<double> share_;               // [patterns, block_q]: kept numerators, at the end their share
  std::vector<RowBlock::Kept> kept_;        // [patterns]
  std::vector<int64_t> next_entry_;         // [patterns]
  std::vector<float> product_;              // [rows, value_dim] numerators times values of a tile
  std::vector<float> masked_product_;
  std::vector<float> dense_, sparse_;  // [rows, value_dim], [patterns, block_q, value_dim]
};

}  // namespace

Input::Input(const AnalysisInput& input, const BlockPattern& pattern)
    : args_(forward_args(input, pattern)), has_v_(input.v.defined()), problem_(resolve(args_, Purpose::weights)) {}

Interval admissible_columns(const Problem& problem, int64_t b, int64_t i, const PatternShape& grid) {
  const MaskGeometry mask = problem.mask(b);
  const int64_t first = grid.query_begin(i), last = grid.query_end(i) - 1;
  // Both ends of a query's keys grow with the query, and the intervals of neighbours touch: their union is one.
  const Interval keys{mask.keys_of(first, problem.seqlen_k).begin, mask.keys_of(last, problem.seqlen_k).end};
  if (keys.empty()) return {0, 0};
  return {keys.begin / grid.block_k, (keys.end - 1) / grid.block_k + 1};
}

int64_t kept_blocks(const BlockPatternView& pattern, int64_t row, Interval columns) {
  const int32_t* begin = pattern.indices + pattern.indptr[row];
  const int32_t* end = pattern.indices + pattern.indptr[row + 1];
  return std::lower_bound(begin, end, columns.end) - std::lower_bound(begin, end, columns.begin);
}

std::vector<int64_t> sample_tokens(int64_t seqlen, int64_t sample, uint64_t seed) {
  const int64_t n = sample <= 0 || sample >= seqlen ? seqlen : sample;
  std::vector<int64_t> tokens(static_cast<size_t>(n));
  uint64_t state = seed;
  for (int64_t s = 0; s < n; ++s) {
    // SplitMix64 (Steele et al. 2014): the same sample on every platform, which <random>'s distributions are not.
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const int64_t begin = seqlen / n * s + seqlen % n * s / n;
    const int64_t end = seqlen / n * (s + 1) + seqlen % n * (s + 1) / n;
    tokens[s] = begin + static_cast<int64_t>(z % static_cast<uint64_t>(end - begin));
  }
  return tokens;
}

void scan(const ScanPlan& plan, Executor& executor, const std::function<void(const RowBlock&)>& consume) {
  const Problem& problem = *plan.problem;
  struct Row {
    int64_t i;
    std::span<const int64_t> tokens;
  };
  std::vector<Row> rows;  // descending: under causality the longest first
  for (size_t end = plan.tokens.size(), begin = end; end > 0; end = begin) {
    const int64_t i = plan.grid.row_of(plan.tokens[end - 1]);
    while (begin > 0 && plan.grid.row_of(plan.tokens[begin - 1]) == i) --begin;
    rows.push_back({i, std::span(plan.tokens).subspan(begin, end - begin)});
  }
  int64_t max_columns = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (const Row& row : rows) {
      const Interval columns = admissible_columns(problem, b, row.i, plan.grid);
      max_columns = std::max(max_columns, columns.size());
    }
  }
  const int64_t heads = problem.batch * problem.heads;
  const int64_t units = heads * static_cast<int64_t>(rows.size());
  parallel_for(
      executor, units, [&](int) { return RowScanner(plan, max_columns); },
      [&](RowScanner& scanner, int64_t unit) {
        const FlushSubnormals flush;
        const Row& row = rows[static_cast<size_t>(unit / heads)];
        const int64_t head = unit % heads;
        RowBlock result;
        if (!scanner.scan(head / problem.heads, head % problem.heads, row.i, row.tokens, &result)) {
          fail<NotFinite>("q, k", "an admitted score that is NaN or +infinite in fp32", "finite scores (or -infinite)");
        }
        consume(result);
      });
}

}  // namespace tessera::analysis
