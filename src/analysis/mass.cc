#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <string>

#include "analysis/scan.h"
#include "pattern/geometry.h"
#include "tessera/analysis.h"
#include "tessera/error.h"

namespace tessera {

namespace {

using analysis::Input;
using analysis::RowBlock;
using analysis::ScanPlan;

BlockPattern empty_pattern(const PatternShape& shape) {
  return BlockPattern::from_csr(shape, std::vector<int64_t>(static_cast<size_t>(shape.total_rows()) + 1), {});
}

void check_density(double density) {
  if (!(density > 0 && density <= 1)) fail("density", std::to_string(density), "a number in (0, 1]");
}

// Row r of a map: (b * H + h) * rows + i.
struct MapRow {
  const float* values;  // of the admissible columns
  Interval columns;
  double tokens;
};
MapRow row_of(const MassMap& mass, int64_t r) {
  const PatternShape& s = mass.shape;
  const int64_t admissible = r / (s.heads * s.rows()) * s.rows() + r % s.rows();
  const Interval columns{mass.first[static_cast<size_t>(admissible)], mass.last[static_cast<size_t>(admissible)]};
  return {mass.values.data() + r * s.cols() + columns.begin, columns,
          static_cast<double>(mass.row_tokens[static_cast<size_t>(r)])};
}

double total_tokens(const MassMap& mass) {
  return std::accumulate(mass.row_tokens.begin(), mass.row_tokens.end(), 0.0);
}

// For each row its admissible masses, largest first, summed up: what the oracle holds with n blocks at [n].
std::vector<std::vector<double>> best_sums(const MassMap& mass) {
  std::vector<std::vector<double>> rows(static_cast<size_t>(mass.shape.total_rows()));
  for (size_t r = 0; r < rows.size(); ++r) {
    const MapRow row = row_of(mass, static_cast<int64_t>(r));
    std::vector<double>& sums = rows[r];
    sums.resize(static_cast<size_t>(row.columns.size()) + 1);
    for (int64_t c = 0; c < row.columns.size(); ++c) sums[static_cast<size_t>(c) + 1] = row.values[c] * row.tokens;
    std::sort(sums.begin() + 1, sums.end(), std::greater<>());
    std::partial_sum(sums.begin(), sums.end(), sums.begin());
  }
  return rows;
}

// Budgets of all rows of the map.
class MapBudget {
 public:
  MapBudget(const MassMap& mass, double density, Budget budget) : density_(density), even_(budget == Budget::even) {
    std::vector<int64_t> rooms;
    for (int64_t r = 0; even_ && r < mass.shape.total_rows(); ++r) rooms.push_back(row_of(mass, r).columns.size());
    if (even_) each_ = even_budget(density, rooms);
  }
  int64_t of(int64_t admissible) const {
    return even_ ? std::min(each_, admissible) : row_budget(density_, admissible);
  }

 private:
  double density_;
  bool even_;
  int64_t each_ = 0;
};

Coverage oracle_of(const std::vector<std::vector<double>>& best, const MapBudget& budgets, double tokens) {
  double sum = 0;
  int64_t kept = 0, admissible = 0;
  for (const std::vector<double>& row : best) {
    const int64_t columns = static_cast<int64_t>(row.size()) - 1;
    const int64_t budget = budgets.of(columns);
    sum += row[static_cast<size_t>(budget)];
    kept += budget;
    admissible += columns;
  }
  return {.coverage = tokens > 0 ? sum / tokens : 0,
          .density = admissible > 0 ? static_cast<double>(kept) / static_cast<double>(admissible) : 0};
}

void check_coverage(double coverage) {
  if (!(coverage > 0 && coverage <= 1)) fail("coverage", std::to_string(coverage), "a number in (0, 1]");
}

}  // namespace

std::span<const float> MassMap::head(int64_t b, int64_t h) const {
  if (b < 0 || b >= shape.batches) fail("b", std::to_string(b), "a batch of the map");
  if (h < 0 || h >= shape.heads) fail("h", std::to_string(h), "a head of the map");
  const int64_t size = shape.rows() * shape.cols();
  return std::span(values).subspan(static_cast<size_t>((b * shape.heads + h) * size), static_cast<size_t>(size));
}

std::vector<float> MassMap::mean_over_heads(int64_t b) const {
  std::vector<double> sum(static_cast<size_t>(shape.rows() * shape.cols()));
  for (int64_t h = 0; h < shape.heads; ++h) {
    const std::span<const float> map = head(b, h);
    for (size_t n = 0; n < sum.size(); ++n) sum[n] += map[n];
  }
  std::vector<float> mean(sum.size());
  for (size_t n = 0; n < sum.size(); ++n) mean[n] = static_cast<float>(sum[n] / static_cast<double>(shape.heads));
  return mean;
}

MassMap attention_mass(const AnalysisInput& input, int block_q, int block_k, Executor& executor, size_t max_bytes) {
  if (input.q.rank != 4 || input.k.rank != 4) {
    fail("q, k", "tensors of ranks " + std::to_string(input.q.rank) + " and " + std::to_string(input.k.rank),
         "[B, Sq, H, D] and [B, Sk, Hkv, D]");
  }
  MassMap map;
  map.shape = {.seqlen_q = input.q.sizes[1],
               .seqlen_k = input.k.sizes[1],
               .block_q = block_q,
               .block_k = block_k,
               .heads = 1,
               .batches = 1};
  check_shape(map.shape);
  const BlockPattern none = empty_pattern(map.shape);
  const AnalysisInput without_v{.q = input.q, .k = input.k, .v = {}, .options = input.options};
  const Input resolved(without_v, none);
  const Problem& problem = resolved.problem();
  map.shape.heads = problem.heads;
  map.shape.batches = problem.batch;
  const int64_t rows = map.shape.rows(), cols = map.shape.cols();
  const double bytes = static_cast<double>(map.shape.total_rows()) * static_cast<double>(cols) * sizeof(float);
  if (bytes > static_cast<double>(max_bytes)) {
    fail("max_bytes", std::to_string(max_bytes),
         "at least " + std::to_string(static_cast<uint64_t>(bytes)) + " for a map of these lengths and block sizes");
  }
  map.values.resize(static_cast<size_t>(map.shape.total_rows() * cols));
  map.row_tokens.resize(static_cast<size_t>(map.shape.total_rows()));
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < rows; ++i) {
      const Interval columns = analysis::admissible_columns(problem, b, i, map.shape);
      map.first.push_back(static_cast<int32_t>(columns.begin));
      map.last.push_back(static_cast<int32_t>(columns.end));
    }
  }
  const ScanPlan plan{.problem = &problem,
                      .outputs = false,
                      .grid = map.shape,
                      .patterns = {},
                      .tokens = analysis::sample_tokens(problem.seqlen_q, 0, 0)};
  analysis::scan(plan, executor, [&](const RowBlock& row) {
    const int64_t r = (row.b * problem.heads + row.h) * rows + row.i;
    const auto seen = std::count_if(row.total.begin(), row.total.end(), [](double total) { return total > 0; });
    map.row_tokens[static_cast<size_t>(r)] = static_cast<int32_t>(seen);
    if (seen == 0) return;
    float* values = map.values.data() + r * cols + row.columns.begin;
    for (size_t c = 0; c < row.mass.size(); ++c) {
      values[c] = static_cast<float>(row.mass[c] / static_cast<double>(seen));
    }
  });
  return map;
}

Coverage coverage_of(const MassMap& mass, const BlockPattern& pattern) {
  const PatternShape& s = pattern.shape();
  const PatternShape& m = mass.shape;
  if (s.seqlen_q != m.seqlen_q || s.seqlen_k != m.seqlen_k || s.block_q != m.block_q || s.block_k != m.block_k ||
      s.q_skip != m.q_skip || (s.heads != 1 && s.heads != m.heads) || (s.batches != 1 && s.batches != m.batches)) {
    fail("pattern", "other lengths, block sizes, heads or batches", "those of the mass map (heads, batches: or 1)");
  }
  if (pattern.num_bitmaps() > 0) {
    fail("pattern", "partial bitmaps", "whole blocks only; quality() judges partial ones");
  }
  const BlockPatternView view = pattern.view();
  double sum = 0;
  int64_t kept = 0, admissible = 0;
  for (int64_t r = 0; r < m.total_rows(); ++r) {
    const MapRow row = row_of(mass, r);
    const int64_t head = r / m.rows();
    const int64_t pattern_row = view.row_id(head / m.heads, head % m.heads, r % m.rows());
    double row_sum = 0;
    for (int64_t e = view.indptr[pattern_row]; e < view.indptr[pattern_row + 1]; ++e) {
      const int64_t column = view.indices[e];
      if (column < row.columns.begin || column >= row.columns.end) continue;
      row_sum += row.values[column - row.columns.begin];
      ++kept;
    }
    sum += row_sum * row.tokens;
    admissible += row.columns.size();
  }
  const double tokens = total_tokens(mass);
  return {.coverage = tokens > 0 ? sum / tokens : 0,
          .density = admissible > 0 ? static_cast<double>(kept) / static_cast<double>(admissible) : 0};
}

BlockPattern oracle_pattern(const MassMap& mass, double density, Budget budget_kind) {
  check_density(density);
  const MapBudget budgets(mass, density, budget_kind);
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, order;
  for (int64_t r = 0; r < mass.shape.total_rows(); ++r) {
    const MapRow row = row_of(mass, r);
    const int64_t budget = budgets.of(row.columns.size());
    order.resize(static_cast<size_t>(row.columns.size()));
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + budget, order.end(), [&](int32_t a, int32_t b) {
      return row.values[a] != row.values[b] ? row.values[a] > row.values[b] : a < b;
    });
    std::sort(order.begin(), order.begin() + budget);
    for (int64_t n = 0; n < budget; ++n) {
      indices.push_back(static_cast<int32_t>(row.columns.begin) + order[static_cast<size_t>(n)]);
    }
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  return BlockPattern::from_csr(mass.shape, std::move(indptr), std::move(indices));
}

BlockPattern bound_pattern(const MassMap& mass, double density) {
  check_density(density);
  struct Block {
    float mass;  // in tokens
    int64_t row;
    int32_t column;
  };
  std::vector<Block> blocks;
  for (int64_t r = 0; r < mass.shape.total_rows(); ++r) {
    const MapRow row = row_of(mass, r);
    for (int64_t c = 0; c < row.columns.size(); ++c) {
      blocks.push_back(
          {row.values[c] * static_cast<float>(row.tokens), r, static_cast<int32_t>(row.columns.begin + c)});
    }
  }
  const int64_t kept = row_budget(density, static_cast<int64_t>(blocks.size()));
  const auto earlier = [](const Block& a, const Block& b) {
    return a.row != b.row ? a.row < b.row : a.column < b.column;
  };
  const auto better = [&](const Block& a, const Block& b) {
    return a.mass != b.mass ? a.mass > b.mass : earlier(a, b);
  };
  std::nth_element(blocks.begin(), blocks.begin() + std::max<int64_t>(0, kept - 1), blocks.end(), better);
  blocks.resize(static_cast<size_t>(kept));
  std::sort(blocks.begin(), blocks.end(), earlier);
  std::vector<int64_t> indptr(static_cast<size_t>(mass.shape.total_rows()) + 1, 0);
  std::vector<int32_t> indices;
  for (const Block& block : blocks) {
    ++indptr[static_cast<size_t>(block.row) + 1];
    indices.push_back(block.column);
  }
  std::partial_sum(indptr.begin(), indptr.end(), indptr.begin());
  return BlockPattern::from_csr(mass.shape, std::move(indptr), std::move(indices));
}

double oracle_coverage(const MassMap& mass, double density, Budget budget) {
  check_density(density);
  return oracle_of(best_sums(mass), MapBudget(mass, density, budget), total_tokens(mass)).coverage;
}

double oracle_density(const MassMap& mass, double coverage, Budget budget) {
  check_coverage(coverage);
  const std::vector<std::vector<double>> best = best_sums(mass);
  const double tokens = total_tokens(mass);
  double low = 0, high = 1;  // coverage grows with density: bisection to far below one block of the longest row
  const auto at = [&](double density) { return oracle_of(best, MapBudget(mass, density, budget), tokens); };
  const double step = 1 / (64.0 * static_cast<double>(std::max<int64_t>(1, mass.shape.cols())));
  while (high - low > step) {
    const double middle = (low + high) / 2;
    (analysis::reaches(at(middle).coverage, coverage) ? high : low) = middle;
  }
  return at(high).density;
}

double bound_density(const MassMap& mass, double coverage) {
  check_coverage(coverage);
  // Blocks at or above a mass: non-negative floats order as their bits, so bisecting the bits finds the highest
  // threshold that reaches the target, in at most 32 walks over the map and no memory.
  struct Above {
    double sum = 0;
    int64_t blocks = 0, admissible = 0;
  };
  const auto above = [&mass](uint32_t bits) {
    const float threshold = std::bit_cast<float>(bits);
    Above a;
    for (int64_t r = 0; r < mass.shape.total_rows(); ++r) {
      const MapRow row = row_of(mass, r);
      a.admissible += row.columns.size();
      for (int64_t c = 0; c < row.columns.size(); ++c) {
        const float tokens_mass = row.values[c] * static_cast<float>(row.tokens);
        if (!(tokens_mass >= threshold)) continue;
        a.sum += tokens_mass;
        ++a.blocks;
      }
    }
    return a;
  };
  const double tokens = total_tokens(mass);
  const double target = coverage * tokens;
  uint32_t low = 0, high = std::bit_cast<uint32_t>(257.0f);  // no row of blocks has more tokens than 256
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    (analysis::reaches(above(middle).sum, target) ? low : high) = middle;
  }
  const Above reached = above(low);
  if (reached.admissible == 0 || tokens == 0) return 0;
  // Of blocks exactly at the threshold only as many as it takes.
  const Above strictly = above(low + 1);
  int64_t blocks = reached.blocks;
  const double threshold = std::bit_cast<float>(low);
  if (threshold > 0) {
    const double missing = std::max(0.0, target * (1 - epsilon_of(DType::f32)) - strictly.sum);
    blocks = std::min(blocks, strictly.blocks + static_cast<int64_t>(std::ceil(missing / threshold)));
  } else {
    blocks = strictly.blocks;  // what is left holds nothing
  }
  return static_cast<double>(blocks) / static_cast<double>(reached.admissible);
}

}  // namespace tessera
