#include "pattern/row_builders.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "pattern/column_set.h"
#include "pattern/geometry.h"
#include "pattern/random_stream.h"

namespace tessera {

namespace {

void append_range(int64_t begin, int64_t end, std::vector<int32_t>& columns) {
  const size_t size = columns.size();
  columns.resize(size + static_cast<size_t>(end - begin));
  for (int64_t j = begin; j < end; ++j) columns[size + static_cast<size_t>(j - begin)] = static_cast<int32_t>(j);
}

// Adds the nearest columns of [begin, end) to the set until it has `budget` members or the range is used up.
void insert_nearest(int64_t center, int64_t begin, int64_t end, int64_t budget, ColumnSet& set) {
  const auto try_insert = [&](int64_t j) {
    if (j >= begin && j < end && set.size() < budget) set.insert(j);
  };
  const int64_t reach = std::max(center - begin, end - 1 - center);
  try_insert(center);
  for (int64_t distance = 1; distance <= reach && set.size() < budget; ++distance) {
    try_insert(center - distance);
    try_insert(center + distance);
  }
}

// The `budget` columns of [begin, end) that are nearest to center, which lies in it: a run.
ColumnRange nearest_run(int64_t center, int64_t begin, int64_t end, int64_t budget) {
  const int64_t others = std::min(budget, end - begin) - 1;
  int64_t before = std::min(center - begin, (others + 1) / 2);
  const int64_t after = std::min(end - 1 - center, others - before);
  before = std::min(center - begin, others - after);
  return {center - before, center + after};
}

// fixed(row) counts what a row keeps anyway.
template <class Fixed>
RowBudget budget_of(const PatternSpec& spec, const PatternShape& shape, Fixed fixed) {
  if (!spec.density) return {Budget::proportional, 1.0, {}};  // nobody asks for it
  std::vector<RowRoom> rooms;
  if (spec.budget == Budget::even) {
    for (int64_t i = 0; i < shape.rows() && shape.cols() > 0; ++i) {
      const Row row = row_of(shape, spec.causal, i);
      if (row.admissible > 0) rooms.push_back({fixed(row), row.admissible});
    }
  }
  return {spec.budget, *spec.density, rooms};
}

class DenseRows final : public RowBuilder {
 public:
  void append(int64_t, const Row& row, std::vector<int32_t>& columns) override {
    append_range(0, row.admissible, columns);
  }
};

class LocalWindow final : public RowBuilder {
 public:
  LocalWindow(const PatternSpec& spec, const PatternShape& shape)
      : spec_(spec), shape_(shape), budget_(density_budget(spec, shape)) {}

  void append(int64_t, const Row& row, std::vector<int32_t>& columns) override {
    if (spec_.window) {
      ColumnRange range = window_columns(shape_, spec_.causal, *spec_.window, row);
      if (range.first > range.last) range = {row.diagonal, row.diagonal};  // queries far before the first key
      append_range(range.first, range.last + 1, columns);
    } else {
      const ColumnRange range = nearest_run(row.diagonal, 0, row.admissible, budget_.of(row.admissible));
      append_range(range.first, range.last + 1, columns);
    }
  }

 private:
  const PatternSpec& spec_;
  const PatternShape shape_;
  const RowBudget budget_;
};

class DilatedSparse final : public RowBuilder {
 public:
  DilatedSparse(const PatternSpec& spec, const PatternShape& shape)
      : budgets_(density_budget(spec, shape)), set_(shape.cols()) {
    rates_ = spec.dilation_rates;
    if (rates_.empty()) rates_.assign(std::begin(kDefaultDilationRates), std::end(kDefaultDilationRates));
    // Longer steps leave the matrix at once; clipping them keeps sums of steps small.
    for (int64_t& r : rates_) r = std::min(r, shape.cols() + 1);
  }

  void append(int64_t, const Row& row, std::vector<int32_t>& columns) override {
    const int64_t budget = budgets_.of(row.admissible);
    const int64_t before = row.diagonal, after = row.admissible - 1 - row.diagonal;
    // What is chosen depends on the row only through the budget and the room on either side, and on the room only if
    // it is within reach of the steps taken: most rows repeat the offsets of the row above.
    if (budget == budget_ && std::min(before, reach_) == before_ && std::min(after, reach_) == after_) {
      for (int32_t offset : offsets_) columns.push_back(static_cast<int32_t>(row.diagonal + offset));
      return;
    }
    choose(row, budget);
    const size_t begin = columns.size();
    set_.flush(columns);
    offsets_.assign(columns.begin() + static_cast<int64_t>(begin), columns.end());
    for (int32_t& offset : offsets_) offset -= static_cast<int32_t>(row.diagonal);
    budget_ = budget;
    before_ = std::min(before, reach_);
    after_ = std::min(after, reach_);
  }

 private:
  struct Cursor {
    int64_t rate = 1, distance = 0;
    bool forward = true;  // side of the last try; the next one after it is backward
  };

  void choose(const Row& row, int64_t budget) {
    const int64_t farthest = std::max(row.diagonal, row.admissible - 1 - row.diagonal);
    reach_ = 0;
    set_.insert(row.diagonal);
    cursors_.clear();
    for (int64_t r : rates_) cursors_.push_back({r, 0, true});
    while (set_.size() < budget && !cursors_.empty()) {
      size_t kept = 0;  // cursors that have not run out move to the front, in order
      for (size_t c = 0; c < cursors_.size(); ++c) {
        const bool running = set_.size() == budget || advance(cursors_[c], row, farthest);
        if (running) cursors_[kept++] = cursors_[c];
      }
      cursors_.resize(kept);
    }
    if (set_.size() < budget) {
      insert_nearest(row.diagonal, 0, row.admissible, budget, set_);
      reach_ = farthest + 1;
    }
  }

  // Adds the rate's next unused pair; false when it has run out.
  bool advance(Cursor& c, const Row& row, int64_t farthest) {
    for (;;) {
      if (c.forward) c.distance += c.rate;
      c.forward = !c.forward;
      reach_ = std::max(reach_, std::min(c.distance, farthest + 1));
      if (c.distance > farthest) return false;
      const int64_t j = c.forward ? row.diagonal + c.distance : row.diagonal - c.distance;
      if (j >= 0 && j < row.admissible && set_.insert(j)) return true;
    }
  }

  const RowBudget budgets_;
  std::vector<int64_t> rates_;
  ColumnSet set_;
  std::vector<Cursor> cursors_;
  int64_t reach_ = 0;  // farthest distance that was tried
  // The row above: its budget, its room as far as it mattered, and what came of it.
  int64_t budget_ = -1, before_ = 0, after_ = 0;
  std::vector<int32_t> offsets_;
};

// Global rows and columns of global_local and bigbird.
struct Globals {
  int64_t rows = 0, cols = 0;
  Globals(const PatternSpec& spec, const PatternShape& shape) {
    const int64_t tokens = spec.global_tokens.value_or(kDefaultGlobalTokens);
    rows = ceil_div(std::min(tokens, shape.seqlen_q), shape.block_q);
    cols = ceil_div(std::min(tokens, shape.seqlen_k), shape.block_k);
  }
};

class GlobalLocal final : public RowBuilder {
 public:
  GlobalLocal(const PatternSpec& spec, const PatternShape& shape)
      : spec_(spec),
        shape_(shape),
        globals_(spec, shape),
        budget_(budget_of(spec, shape,
                          [this](const Row& row) {
                            if (row.index < globals_.rows) return row.admissible;
                            const int64_t columns = std::min(globals_.cols, row.admissible);
                            return columns + (row.diagonal >= columns);
                          })),
        set_(shape.cols()) {}

  void append(int64_t, const Row& row, std::vector<int32_t>& columns) override {
    if (row.index < globals_.rows) return append_range(0, row.admissible, columns);
    set_.insert_range(0, std::min(globals_.cols, row.admissible));
    set_.insert(row.diagonal);
    if (spec_.window) {
      const ColumnRange range = window_columns(shape_, spec_.causal, *spec_.window, row);
      set_.insert_range(range.first, range.last + 1);
    } else {
      insert_nearest(row.diagonal, 0, row.admissible, budget_.of(row.admissible), set_);
    }
    set_.flush(columns);
  }

 private:
  const PatternSpec& spec_;
  const PatternShape shape_;
  const Globals globals_;
  const RowBudget budget_;
  ColumnSet set_;
};

class Strided final : public RowBuilder {
 public:
  Strided(const PatternSpec& spec, const PatternShape& shape)
      : stride_(spec.stride ? std::min(*spec.stride, shape.cols() + 1)
                            : stride_for_density(shape, spec.causal, *spec.density, spec.budget)) {}

  void append(int64_t, const Row& row, std::vector<int32_t>& columns) override {
    const auto push = [&](int64_t j) {
      if (j >= 0 && j < row.admissible) columns.push_back(static_cast<int32_t>(j));
    };
    for (int64_t j = row.diagonal % stride_; j < row.diagonal; j += stride_) {
      if (j != row.diagonal - 1) push(j);
    }
    push(row.diagonal - 1);
    push(row.diagonal);
    push(row.diagonal + 1);
    for (int64_t j = row.diagonal + stride_; j < row.admissible; j += stride_) {
      if (j != row.diagonal + 1) push(j);
    }
  }

 private:
  const int64_t stride_;
};

// random, and bigbird, which starts from its global and window columns: then distinct random columns up to the budget.
class RandomRows final : public RowBuilder {
 public:
  RandomRows(const PatternSpec& spec, const PatternShape& shape)
      : spec_(spec),
        shape_(shape),
        globals_(spec, shape),
        budget_(budget_of(spec, shape, [this](const Row& row) { return kept_anyway(row).size; })),
        set_(shape.cols()) {}
  bool by_head() const override { return true; }

  void append(int64_t head, const Row& row, std::vector<int32_t>& columns) override {
    const auto [ranges, count, fixed] = kept_anyway(row);
    for (size_t n = 0; n < count; ++n) set_.insert_range(ranges[n].first, ranges[n].last + 1);
    const int64_t free = row.admissible - fixed;
    const int64_t draws = budget_.of(row.admissible) - fixed;
    RandomStream random(spec_.seed, head, row.index);
    // The t-th column outside the ranges.
    const auto free_column = [&ranges = ranges, count = count](int64_t t) {
      for (size_t n = 0; n < count && t >= ranges[n].first; ++n) t += ranges[n].last - ranges[n].first + 1;
      return t;
    };
    // Floyd's sampling (Bentley & Floyd 1987): every set of `draws` out of `free` is equally likely, one draw each.
    for (int64_t t = free - draws; t < free; ++t) {
      if (!set_.insert(free_column(random.below(t + 1)))) set_.insert(free_column(t));
    }
    set_.flush(columns);
  }

 private:
  // Columns of a row that are kept anyway, as ascending disjoint ranges.
  struct KeptAnyway {
    std::array<ColumnRange, 3> ranges;
    size_t count = 1;
    int64_t size = 0;  // columns in all
  };
  KeptAnyway kept_anyway(const Row& row) const {
    KeptAnyway kept;
    kept.ranges[0] = {row.diagonal, row.diagonal};
    if (spec_.kind == PatternKind::bigbird && row.index < globals_.rows) {
      kept.ranges[0] = {0, row.admissible - 1};
    } else if (spec_.kind == PatternKind::bigbird) {
      kept.ranges[kept.count++] = {0, std::min(globals_.cols, row.admissible) - 1};
      kept.ranges[kept.count++] = spec_.window ? window_columns(shape_, spec_.causal, *spec_.window, row)
                                               : ColumnRange{std::max<int64_t>(0, row.diagonal - 1),
                                                             std::min(row.diagonal + 1, row.admissible - 1)};
    }
    kept.count = merge(std::span(kept.ranges).first(kept.count));
    for (size_t n = 0; n < kept.count; ++n) kept.size += kept.ranges[n].last - kept.ranges[n].first + 1;
    return kept;
  }

  // Sorts, drops empty ranges and joins those that overlap or touch; returns how many are left.
  static size_t merge(std::span<ColumnRange> ranges) {
    for (size_t n = 1; n < ranges.size(); ++n) {  // two or three of them: insertion
      for (size_t m = n; m > 0 && ranges[m].first < ranges[m - 1].first; --m) std::swap(ranges[m], ranges[m - 1]);
    }
    size_t count = 0;
    for (const ColumnRange range : ranges) {
      if (range.first > range.last) continue;
      if (count > 0 && range.first <= ranges[count - 1].last + 1) {
        ranges[count - 1].last = std::max(ranges[count - 1].last, range.last);
      } else {
        ranges[count++] = range;
      }
    }
    return count;
  }

  const PatternSpec& spec_;
  const PatternShape shape_;
  const Globals globals_;
  const RowBudget budget_;
  ColumnSet set_;
};

class DilatedSegments final : public RowBuilder {
 public:
  DilatedSegments(const PatternSpec& spec, const PatternShape& shape)
      : spec_(spec), shape_(shape), set_(shape.cols()) {}
  bool by_head() const override { return true; }

  void append(int64_t head, const Row& row, std::vector<int32_t>& columns) override {
    const auto clamped = [&](int64_t key) { return std::clamp<int64_t>(key, 0, shape_.seqlen_k - 1); };
    set_.insert(row.diagonal);
    for (size_t n = 0; n < spec_.segment_lengths.size(); ++n) {
      const int64_t length = std::min(spec_.segment_lengths[n], shape_.seqlen_k);
      const int64_t rate = std::min(spec_.dilation_rates[n], kMaxSeqlen);
      const int64_t offset = head % rate;
      if (row.diagonal % rate != offset) continue;
      const int64_t first_key = clamped(row.first_key) / length * length;
      const int64_t last_key = clamped((clamped(row.last_key) / length + 1) * length - 1);
      const int64_t end = std::min(last_key / shape_.block_k + 1, row.admissible);
      const int64_t begin = first_key / shape_.block_k;
      // The first column >= begin that is offset (mod rate).
      const int64_t shift = offset - begin % rate;
      for (int64_t j = begin + (shift < 0 ? shift + rate : shift); j < end; j += rate) set_.insert(j);
    }
    set_.flush(columns);
  }

 private:
  const PatternSpec& spec_;
  const PatternShape shape_;
  ColumnSet set_;
};

class Hierarchical final : public RowBuilder {
 public:
  Hierarchical(const PatternSpec& spec, const PatternShape& shape)
      : spec_(spec),
        shape_(shape),
        local_(local_budget()),
        global_(far_budget(spec.global_density, &FarRooms::node)),
        inter_node_(far_budget(spec.inter_node_density, &FarRooms::others)),
        set_(shape.cols()) {}

  void append(int64_t, const Row& row, std::vector<int32_t>& columns) override {
    const int64_t rank = row.index * spec_.ranks / shape_.rows();
    if (rank != rank_) choose_far_columns(rank);
    const int64_t begin = first_col(rank), end = std::min(first_col(rank + 1), row.admissible);
    set_.insert(row.diagonal);
    if (begin < end) {
      const ColumnRange run = nearest_run(std::clamp(row.diagonal, begin, end - 1), begin, end, local_.of(end - begin));
      set_.insert_range(run.first, run.last + 1);
    }
    for (int64_t j : far_) {
      if (j >= row.admissible) break;
      set_.insert(j);
    }
    set_.flush(columns);
  }

 private:
  // First column of a rank: the smallest j with j * ranks / cols >= rank.
  int64_t first_col(int64_t rank) const { return ceil_div(rank * shape_.cols(), spec_.ranks); }

  // Columns [outer) without [inner), as far as they are admissible: how many lie before and after the hole.
  struct Ring {
    int64_t begin = 0, hole_end = 0, before = 0, after = 0;
    int64_t room() const { return before + after; }
  };
  static Ring ring(int64_t begin, int64_t end, int64_t hole_begin, int64_t hole_end, int64_t admissible) {
    return {begin, hole_end, std::max<int64_t>(0, std::min(hole_begin, admissible) - begin),
            std::max<int64_t>(0, std::min(end, admissible) - hole_end)};
  }
  // What lies outside the rank: in other ranks of its node, and in other nodes.
  struct FarRooms {
    Ring node, others;
  };
  FarRooms far_rooms(int64_t rank) const {
    const int64_t last_row = ceil_div((rank + 1) * shape_.rows(), spec_.ranks) - 1;
    const int64_t admissible = admissible_cols(shape_, spec_.causal, last_row);
    const int64_t node_first = rank / spec_.ranks_per_node * spec_.ranks_per_node;
    const int64_t node_end =
        spec_.ranks_per_node > spec_.ranks - node_first ? spec_.ranks : node_first + spec_.ranks_per_node;
    const int64_t begin = first_col(node_first), end = first_col(node_end);
    return {ring(begin, end, first_col(rank), first_col(rank + 1), admissible),
            ring(0, shape_.cols(), begin, end, admissible)};
  }

  RowBudget local_budget() const {
    std::vector<RowRoom> rooms;
    for (int64_t i = 0; i < shape_.rows() && spec_.budget == Budget::even; ++i) {
      const int64_t rank = i * spec_.ranks / shape_.rows();
      const int64_t room = std::min(first_col(rank + 1), admissible_cols(shape_, spec_.causal, i)) - first_col(rank);
      if (room > 0) rooms.push_back({1, room});
    }
    return {spec_.budget, spec_.local_density ? *spec_.local_density : *spec_.density, rooms};
  }
  RowBudget far_budget(const std::optional<double>& own, Ring FarRooms::*part) const {
    std::vector<RowRoom> rooms;
    // More ranks than rows: most have none, and their rooms do not count.
    for (int64_t i = 0, last = -1; i < shape_.rows() && spec_.budget == Budget::even; ++i) {
      const int64_t rank = i * spec_.ranks / shape_.rows();
      if (rank == last) continue;
      last = rank;
      const int64_t room = (far_rooms(rank).*part).room();
      if (room > 0) rooms.push_back({1, room});
    }
    return {spec_.budget, own ? *own : *spec_.density, rooms};
  }

  void choose_far_columns(int64_t rank) {
    rank_ = rank;
    far_.clear();
    const FarRooms rooms = far_rooms(rank);
    choose_evenly(rooms.node, spec_.global_density ? *spec_.global_density : *spec_.density, global_);
    choose_evenly(rooms.others, spec_.inter_node_density ? *spec_.inter_node_density : *spec_.density, inter_node_);
    std::sort(far_.begin(), far_.end());
  }

  void choose_evenly(const Ring& ring, double density, const RowBudget& budgets) {
    const int64_t room = ring.room(), budget = density > 0 ? budgets.of(room) : 0;
    for (int64_t n = 0; n < budget; ++n) {
      const int64_t t = (2 * n + 1) * room / (2 * budget);
      far_.push_back(t < ring.before ? ring.begin + t : ring.hole_end + t - ring.before);
    }
  }

  const PatternSpec& spec_;
  const PatternShape shape_;
  const RowBudget local_, global_, inter_node_;
  ColumnSet set_;
  int64_t rank_ = -1;
  std::vector<int64_t> far_;  // columns of other ranks that the rows of rank_ share, ascending
};

}  // namespace

ColumnRange window_columns(const PatternShape& shape, bool causal, int64_t window, const Row& row) {
  const int64_t wide = std::min(window, 2 * kMaxSeqlen);  // beyond any distance
  const int64_t back = causal ? wide : wide / 2, ahead = causal ? 0 : wide / 2;
  const int64_t first = std::max<int64_t>(0, row.first_key - back);
  const int64_t last = std::min(shape.seqlen_k - 1, row.last_key + ahead);
  if (first > last) return {};
  return {first / shape.block_k, last / shape.block_k};
}

RowBudget density_budget(const PatternSpec& spec, const PatternShape& whole) {
  return budget_of(spec, whole, [](const Row&) { return int64_t{1}; });
}

int64_t stride_for_density(const PatternShape& shape, bool causal, double density, Budget budget) {
  const bool even = budget == Budget::even;
  double allowed = 0;
  const int64_t rows = shape.cols() > 0 ? shape.rows() : 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t admissible = admissible_cols(shape, causal, i);
    allowed += even ? density * static_cast<double>(admissible) : static_cast<double>(row_budget(density, admissible));
  }
  const auto kept = [&](int64_t stride) {
    int64_t sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const Row row = row_of(shape, causal, i);
      if (row.admissible == 0) continue;
      const int64_t before = row.diagonal, after = row.admissible - 1 - row.diagonal;
      sum += 1 + before / stride + after / stride;
      if (stride > 1) sum += (before > 0) + (after > 0);
    }
    return static_cast<double>(sum);
  };
  int64_t low = 1, high = std::max<int64_t>(1, shape.cols());  // kept() never grows with the stride
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (kept(middle) <= allowed) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return even && low > 1 && kept(low - 1) - allowed <= allowed - kept(low) ? low - 1 : low;
}

std::unique_ptr<RowBuilder> make_row_builder(const PatternSpec& spec, const PatternShape& shape) {
  switch (spec.kind) {
    case PatternKind::dense:
    case PatternKind::causal: return std::make_unique<DenseRows>();
    case PatternKind::local_window: return std::make_unique<LocalWindow>(spec, shape);
    case PatternKind::dilated_sparse: return std::make_unique<DilatedSparse>(spec, shape);
    case PatternKind::global_local: return std::make_unique<GlobalLocal>(spec, shape);
    case PatternKind::strided: return std::make_unique<Strided>(spec, shape);
    case PatternKind::random:
    case PatternKind::bigbird: return std::make_unique<RandomRows>(spec, shape);
    case PatternKind::dilated_segments: return std::make_unique<DilatedSegments>(spec, shape);
    case PatternKind::hierarchical: return std::make_unique<Hierarchical>(spec, shape);
  }
  return nullptr;
}

}  // namespace tessera
