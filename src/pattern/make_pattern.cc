// make_pattern: from an option value to a BlockPattern.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pattern/geometry.h"
#include "pattern/row_builders.h"
#include "tessera/error.h"
#include "tessera/patterns.h"

namespace tessera {

namespace {

int64_t last_key_position(const PatternShape& s, int64_t row) {
  return std::min((row + 1) * s.block_q, s.seqlen_q) - 1 + s.seqlen_k - s.seqlen_q;
}

void check_kept(int64_t kept, int64_t heads) {
  if (kept > kMaxKeptBlocks / heads) {
    fail("pattern", fmt::format("more than {} kept blocks a head", kMaxKeptBlocks / heads),
         "at most 2^32 kept blocks; take larger blocks, fewer pattern heads or a lower density");
  }
}

// Kept blocks of all rows of a head, where the kind tells without building them; 0 elsewhere.
int64_t kept_in_advance(const PatternSpec& spec, const PatternShape& shape) {
  const bool all = spec.kind == PatternKind::dense || spec.kind == PatternKind::causal;
  const bool budget = spec.kind == PatternKind::dilated_sparse || spec.kind == PatternKind::random;
  if (!all && !(budget && spec.density)) return 0;
  const double density = all ? 1.0 : *spec.density;
  int64_t kept = 0;
  for (int64_t i = 0; i < shape.rows() && kept <= kMaxKeptBlocks; ++i) {
    kept += row_budget(density, admissible_cols(shape, spec.causal, i));
  }
  return kept;
}

}  // namespace

int64_t admissible_cols(const PatternShape& s, bool causal, int64_t row) {
  if (!causal) return s.cols();
  const int64_t key = last_key_position(s, row);
  return key < 0 ? 0 : key / s.block_k + 1;
}

int64_t diagonal_col(const PatternShape& s, int64_t row) {
  return std::max<int64_t>(0, last_key_position(s, row)) / s.block_k;
}

int64_t row_budget(double density, int64_t admissible) {
  if (admissible <= 0) return 0;
  return std::clamp<int64_t>(std::llround(density * static_cast<double>(admissible)), 1, admissible);
}

Row row_of(const PatternShape& s, bool causal, int64_t index) {
  Row row;
  row.index = index;
  row.admissible = admissible_cols(s, causal, index);
  row.diagonal = diagonal_col(s, index);
  row.first_key = index * s.block_q + s.seqlen_k - s.seqlen_q;
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
  check_shape(shape);
  check_spec(spec);
  check_kept(shape.rows(), shape.heads);  // at least one a row, before memory is asked for
  check_kept(kept_in_advance(spec, shape), shape.heads);

  const std::unique_ptr<RowBuilder> builder = make_row_builder(spec, shape);
  const int64_t rows = shape.rows(), cols = shape.cols();
  const int64_t built_heads = builder->by_head() ? shape.heads : 1;
  std::vector<int64_t> indptr{0};
  indptr.reserve(shape.total_rows() + 1);
  std::vector<int32_t> indices;
  for (int64_t h = 0; h < built_heads; ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      const Row row = cols > 0 ? row_of(shape, spec.causal, i) : Row{};
      if (row.admissible > 0) builder->append(h, row, indices);
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
