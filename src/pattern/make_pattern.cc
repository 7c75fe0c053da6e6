// make_pattern: from an option value to a BlockPattern.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "pattern/geometry.h"
#include "pattern/row_builders.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {

namespace {

int64_t last_key_position(const PatternShape& s, int64_t row) { return s.query_end(row) - 1 + s.diagonal(); }

// The pattern whose rows are asked for: itself, or with q_offset the longer sequence.
PatternShape whole_of(const PatternSpec& spec, const PatternShape& shape) {
  PatternShape whole = shape;
  if (!spec.q_offset) return whole;
  whole.seqlen_q = whole.seqlen_k =
      spec.seqlen_total ? *spec.seqlen_total : std::max(shape.seqlen_k, *spec.q_offset + shape.seqlen_q);
  whole.q_skip = 0;
  whole.q_offset.reset();
  return whole;
}

void check_place(const PatternSpec& spec) {
  if (spec.seqlen_total && !spec.q_offset) {
    fail("seqlen_total", "a length without q_offset", "with q_offset: the longer sequence that the queries belong to");
  }
  if (!spec.q_offset) return;
  if (*spec.q_offset < 0 || *spec.q_offset > kMaxSeqlen) fail("q_offset", fmt::to_string(*spec.q_offset), "0..2^40");
  const int64_t end = *spec.q_offset + spec.seqlen_q;
  if (spec.causal && spec.seqlen_k < end) {
    fail("seqlen_k", fmt::format("{} for queries up to {}", spec.seqlen_k, end - 1),
         fmt::format("at least q_offset + seqlen_q = {} with causal", end));
  }
  if (!spec.seqlen_total) return;
  const int64_t least = std::max(end, spec.causal ? int64_t{0} : spec.seqlen_k);
  if (*spec.seqlen_total < least || *spec.seqlen_total > kMaxSeqlen) {
    fail("seqlen_total", fmt::to_string(*spec.seqlen_total), fmt::format("{}..2^40", least));
  }
  if (!spec.causal && *spec.seqlen_total != spec.seqlen_k) {
    fail("seqlen_k", fmt::to_string(spec.seqlen_k),
         fmt::format("seqlen_total = {}: without causality every query sees the whole sequence", *spec.seqlen_total));
  }
}

void check_kept(int64_t kept, int64_t heads) {
  if (kept > kMaxKeptBlocks / heads) {
    fail("pattern", fmt::format("more than {} kept blocks a head", kMaxKeptBlocks / heads),
         "at most 2^32 kept blocks; take larger blocks, fewer pattern heads or a lower density");
  }
}

// Kept blocks of all rows of a head, where the kind tells without building them; 0 elsewhere.
int64_t kept_in_advance(const PatternSpec& spec, const PatternShape& shape, const PatternShape& whole,
                        int64_t first_row) {
  const bool all = spec.kind == PatternKind::dense || spec.kind == PatternKind::causal;
  const bool budget = spec.kind == PatternKind::dilated_sparse || spec.kind == PatternKind::random;
  if (!all && !(budget && spec.density)) return 0;
  const RowBudget rows = all ? RowBudget(Budget::proportional, 1.0, {}) : density_budget(spec, whole);
  int64_t kept = 0;
  for (int64_t i = 0; i < shape.rows() && kept <= kMaxKeptBlocks; ++i) {
    kept += rows.of(admissible_cols(whole, spec.causal, first_row + i));
  }
  return kept;
}

}  // namespace

int64_t admissible_cols(const PatternShape& s, bool causal, int64_t row) {
  if (!causal) return s.cols();
  const int64_t key = last_key_position(s, row);
  return key < 0 ? 0 : std::min(key / s.block_k + 1, s.cols());
}

int64_t diagonal_col(const PatternShape& s, int64_t row) {
  return std::clamp<int64_t>(last_key_position(s, row), 0, std::max<int64_t>(0, s.seqlen_k - 1)) / s.block_k;
}

int64_t row_budget(double density, int64_t admissible) {
  if (admissible <= 0) return 0;
  return std::clamp<int64_t>(std::llround(density * static_cast<double>(admissible)), 1, admissible);
}

int64_t even_budget(double density, std::span<const int64_t> rooms) {
  std::vector<RowRoom> rows;
  for (int64_t room : rooms) rows.push_back({std::min<int64_t>(room, 1), room});
  return RowBudget(Budget::even, density, rows).of(std::numeric_limits<int64_t>::max());
}

RowBudget::RowBudget(Budget budget, double density, std::span<const RowRoom> rows)
    : budget_(budget), density_(density) {
  if (budget == Budget::proportional) return;
  int64_t most = 1;
  double wanted = 0;
  for (const RowRoom& r : rows) {
    most = std::max(most, r.admissible);
    wanted += static_cast<double>(r.admissible);
  }
  wanted *= density;
  const auto kept = [&](int64_t each) {  // never falls as `each` grows
    double sum = 0;
    for (const RowRoom& r : rows) sum += static_cast<double>(std::clamp(each, r.least, r.admissible));
    return sum;
  };
  int64_t low = 1, high = most;  // the smallest budget that keeps as much as is wanted
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (kept(middle) >= wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  each_ = low > 1 && wanted - kept(low - 1) < kept(low) - wanted ? low - 1 : low;
}

Row row_of(const PatternShape& s, bool causal, int64_t index) {
  Row row;
  row.index = index;
  row.admissible = admissible_cols(s, causal, index);
  row.diagonal = diagonal_col(s, index);
  row.first_key = s.query_begin(index) + s.diagonal();
  row.last_key = last_key_position(s, index);
  return row;
}

BlockPattern make_pattern(const PatternSpec& given) {
  PatternSpec spec = given;
  if (spec.kind == PatternKind::causal) spec.causal = true;
  PatternShape shape;
  shape.seqlen_q = spec.seqlen_q;
  shape.seqlen_k = spec.seqlen_k;
  shape.block_q = spec.block_q;
  shape.block_k = spec.block_k;
  shape.heads = spec.heads;
  shape.causal = spec.causal;
  check_shape(shape);
  check_spec(spec);
  check_place(spec);
  // Dense blocks without causality are right wherever the queries stand.
  if (spec.q_offset) {
    shape.q_offset = spec.q_offset;
    shape.q_skip = static_cast<int>(*spec.q_offset % shape.block_q);
  } else if (spec.kind != PatternKind::dense) {
    shape.q_offset = shape.diagonal();
  }
  const PatternShape whole = whole_of(spec, shape);
  check_shape(whole);
  const int64_t first_row = spec.q_offset ? *spec.q_offset / shape.block_q : 0;
  check_kept(shape.rows(), shape.heads);  // at least one a row, before memory is asked for
  check_kept(kept_in_advance(spec, shape, whole, first_row), shape.heads);

  const std::unique_ptr<RowBuilder> builder = make_row_builder(spec, whole);
  const int64_t rows = shape.rows(), cols = shape.cols();
  const int64_t built_heads = builder->by_head() ? shape.heads : 1;
  std::vector<int64_t> indptr{0};
  indptr.reserve(shape.total_rows() + 1);
  std::vector<int32_t> indices;
  for (int64_t h = 0; h < built_heads; ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      const Row row = cols > 0 ? row_of(whole, spec.causal, first_row + i) : Row{};
      if (row.admissible > 0) builder->append(h, row, indices);
      while (static_cast<int64_t>(indices.size()) > indptr.back() && indices.back() >= cols) indices.pop_back();
      indptr.push_back(static_cast<int64_t>(indices.size()));
      check_kept(indptr.back(), shape.heads / built_heads);
    }
  }
  const int64_t kept = indptr.back();
  if (built_heads < shape.heads) {
    indices.resize(kept * shape.heads);
    for (int64_t h = 1; h < shape.heads; ++h) {
      std::copy_n(indices.begin(), kept, indices.begin() + h * kept);
      for (int64_t i = 1; i <= rows; ++i) indptr.push_back(h * kept + indptr[i]);
    }
  }
  // Growth by doubling may have left up to as much again unused; a pattern lives long.
  if (indices.capacity() > indices.size() + indices.size() / 4) indices.shrink_to_fit();
  return BlockPattern::from_csr(shape, std::move(indptr), std::move(indices));
}

}  // namespace tessera
