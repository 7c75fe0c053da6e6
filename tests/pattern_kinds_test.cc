// Every named pattern against its definition, written down as plainly as possible: pair by pair, token by token, in
// O(rows * cols). Sizes: up to 400 tokens in blocks of 16..96, so that rows and columns are ragged, square and
// oblong, down to a single block, with block_q != block_k and seqlen_q != seqlen_k in most cases.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "pattern_cases.h"
#include "tessera/error.h"
#include "tessera/pattern_combine.h"
#include "tessera/pattern_statistics.h"
#include "tessera/patterns.h"

namespace tessera {
namespace {

using testing::columns_of;
using testing::Random;
using Columns = std::set<int64_t>;

// The definitions of patterns.h over one shape.
struct Definition {
  PatternSpec spec;
  PatternShape shape;

  explicit Definition(const PatternSpec& s) : spec(s) {
    shape.seqlen_q = s.seqlen_q;
    shape.seqlen_k = s.seqlen_k;
    shape.block_q = s.block_q;
    shape.block_k = s.block_k;
    if (spec.kind == PatternKind::causal) spec.causal = true;
  }

  // Whether some token of row i and some token of column j satisfy test(key position of the query, key).
  template <class Test>
  bool some_pair(int64_t i, int64_t j, Test&& test) const {
    for (int64_t q = i * spec.block_q; q < std::min((i + 1) * spec.block_q, spec.seqlen_q); ++q) {
      for (int64_t k = j * spec.block_k; k < std::min((j + 1) * spec.block_k, spec.seqlen_k); ++k) {
        if (test(q + spec.seqlen_k - spec.seqlen_q, k)) return true;
      }
    }
    return false;
  }

  bool admissible(int64_t i, int64_t j) const {
    return !spec.causal || some_pair(i, j, [](int64_t p, int64_t k) { return k <= p; });
  }
  Columns admissible_columns(int64_t i) const {
    Columns c;
    for (int64_t j = 0; j < shape.cols(); ++j) {
      if (admissible(i, j)) c.insert(j);
    }
    return c;
  }
  int64_t diagonal(int64_t i) const {
    const int64_t last = std::min((i + 1) * spec.block_q, spec.seqlen_q) - 1;
    return std::max<int64_t>(0, last + spec.seqlen_k - spec.seqlen_q) / spec.block_k;
  }
  static int64_t proportional(double density, int64_t count) {
    return count == 0 ? 0 : std::max<int64_t>(1, static_cast<int64_t>(std::floor(density * count + 0.5)));
  }
  // What a row may keep, and what it keeps whatever the budget says.
  struct Room {
    int64_t least, most;
  };
  // The b of Budget::even: every number is tried.
  static int64_t even(double density, const std::vector<Room>& rooms) {
    int64_t best = 1, longest = 1;
    double wanted = 0, nearest = -1;
    for (const Room& r : rooms) {
      wanted += static_cast<double>(r.most);
      longest = std::max(longest, r.most);
    }
    wanted *= density;
    for (int64_t b = 1; b <= longest; ++b) {
      int64_t kept = 0;
      for (const Room& r : rooms) kept += std::max(r.least, std::min(b, r.most));
      const double away = std::abs(static_cast<double>(kept) - wanted);
      if (nearest < 0 || away <= nearest) {
        nearest = away;
        best = b;
      }
    }
    return best;
  }
  // Of a row with `count` admissible columns. Rooms are asked for where rows share a number.
  template <class Rooms>
  int64_t budget(double density, int64_t count, Rooms rooms) const {
    return spec.budget == Budget::even ? std::min(even(density, rooms()), count) : proportional(density, count);
  }
  mutable std::optional<int64_t> each;  // Budget::even of spec.density, once it has been asked for
  int64_t budget(int64_t count) const {
    if (spec.budget == Budget::proportional) return proportional(*spec.density, count);
    if (!each) {
      std::vector<Room> rooms;
      for (int64_t i = 0; i < shape.rows(); ++i) {
        const Columns all = admissible_columns(i);
        if (all.empty()) continue;
        rooms.push_back({static_cast<int64_t>(kept_anyway(i, all).size()), static_cast<int64_t>(all.size())});
      }
      each = even(*spec.density, rooms);
    }
    return std::min(*each, count);
  }
  std::vector<int64_t> nearest_first(const Columns& columns, int64_t d) const {
    std::vector<int64_t> list(columns.begin(), columns.end());
    std::stable_sort(list.begin(), list.end(), [d](int64_t a, int64_t b) {
      return std::abs(a - d) != std::abs(b - d) ? std::abs(a - d) < std::abs(b - d) : a < b;
    });
    return list;
  }
  void fill_nearest(const Columns& from, int64_t d, int64_t count, Columns& into) const {
    for (int64_t j : nearest_first(from, d)) {
      if (static_cast<int64_t>(into.size()) >= count) return;
      into.insert(j);
    }
  }
  bool in_window(int64_t i, int64_t j) const {
    const int64_t w = *spec.window;
    return some_pair(
        i, j, [&](int64_t p, int64_t k) { return spec.causal ? k <= p && p - k <= w : std::abs(p - k) <= w / 2; });
  }
  int64_t blocks(int64_t tokens, int block) const { return (tokens + block - 1) / block; }

  Columns dilated_sparse(int64_t i, const Columns& all) const {
    std::vector<int64_t> rates = spec.dilation_rates;
    if (rates.empty()) rates = {1, 2, 4, 8, 16};
    const int64_t d = diagonal(i), size = budget(static_cast<int64_t>(all.size()));
    Columns kept{d};
    for (bool added = true; added && static_cast<int64_t>(kept.size()) < size;) {
      added = false;
      for (int64_t r : rates) {
        if (static_cast<int64_t>(kept.size()) == size) break;
        for (int64_t step = r, found = 0; step <= shape.cols() && !found; step += r) {
          for (int64_t j : {d - step, d + step}) {
            if (found || !all.count(j) || kept.count(j)) continue;
            kept.insert(j);
            found = added = true;
          }
        }
      }
    }
    fill_nearest(all, d, size, kept);
    return kept;
  }

  Columns strided(int64_t i, const Columns& all, int64_t stride) const {
    Columns kept;
    const int64_t d = diagonal(i);
    for (int64_t j : all) {
      if ((d - j) % stride == 0 || std::abs(d - j) <= 1) kept.insert(j);
    }
    return kept;
  }
  int64_t stride() const {
    if (spec.stride) return *spec.stride;
    const bool even = spec.budget == Budget::even;
    double before = 0;  // pairs too many at the stride before
    for (int64_t s = 1;; ++s) {
      double kept = 0, allowed = 0;
      for (int64_t i = 0; i < shape.rows(); ++i) {
        const Columns all = admissible_columns(i);
        const int64_t count = static_cast<int64_t>(all.size());
        kept += static_cast<double>(strided(i, all, s).size());
        allowed +=
            even ? *spec.density * static_cast<double>(count) : static_cast<double>(proportional(*spec.density, count));
      }
      if (kept <= allowed || s >= shape.cols()) return even && s > 1 && before <= allowed - kept ? s - 1 : s;
      before = kept - allowed;
    }
  }

  Columns dilated_segments(int64_t i, const Columns& all, int64_t head) const {
    const int64_t d = diagonal(i);
    Columns kept{d};
    for (int64_t j : all) {
      for (size_t n = 0; n < spec.segment_lengths.size(); ++n) {
        const int64_t w = spec.segment_lengths[n], r = spec.dilation_rates[n];
        if (d % r != head % r || j % r != head % r) continue;
        if (some_pair(i, j, [&](int64_t p, int64_t k) {
              return std::clamp<int64_t>(p, 0, spec.seqlen_k - 1) / w == k / w;
            })) {
          kept.insert(j);
        }
      }
    }
    return kept;
  }

  Columns hierarchical(int64_t i, const Columns& all) const {
    const auto rank_of_row = [&](int64_t r) { return r * spec.ranks / shape.rows(); };
    const auto rank_of_col = [&](int64_t c) { return c * spec.ranks / shape.cols(); };
    const auto node = [&](int64_t rank) { return rank / spec.ranks_per_node; };
    const int64_t rank = rank_of_row(i);
    int64_t last_row = i;
    while (last_row + 1 < shape.rows() && rank_of_row(last_row + 1) == rank) ++last_row;
    const auto own_columns = [&](int64_t row) {
      Columns own;
      for (int64_t j : admissible_columns(row)) {
        if (rank_of_col(j) == rank_of_row(row)) own.insert(j);
      }
      return own;
    };
    const auto local_rooms = [&] {
      std::vector<Room> rooms;
      for (int64_t r = 0; r < shape.rows(); ++r) {
        const int64_t room = static_cast<int64_t>(own_columns(r).size());
        if (room > 0) rooms.push_back({1, room});
      }
      return rooms;
    };
    const Columns own = own_columns(i);
    Columns near, kept{diagonal(i)};
    fill_nearest(own, diagonal(i),
                 budget(spec.local_density.value_or(spec.density.value_or(0)), own.size(), local_rooms), near);
    kept.insert(near.begin(), near.end());
    for (bool inside : {true, false}) {
      const std::optional<double>& own_density = inside ? spec.global_density : spec.inter_node_density;
      const double density = own_density.value_or(spec.density.value_or(0));
      const auto far_columns = [&](int64_t of_rank, int64_t last) {
        std::vector<int64_t> far;
        for (int64_t j : admissible_columns(last)) {
          if (rank_of_col(j) != of_rank && (node(rank_of_col(j)) == node(of_rank)) == inside) far.push_back(j);
        }
        return far;
      };
      const auto far_rooms = [&] {
        std::vector<Room> rooms;
        for (int64_t r = 0; r < shape.rows(); ++r) {
          if (r + 1 < shape.rows() && rank_of_row(r + 1) == rank_of_row(r)) continue;
          const int64_t room = static_cast<int64_t>(far_columns(rank_of_row(r), r).size());
          if (room > 0) rooms.push_back({1, room});
        }
        return rooms;
      };
      const std::vector<int64_t> far = far_columns(rank, last_row);
      const int64_t room = static_cast<int64_t>(far.size());
      const int64_t count = density > 0 ? budget(density, room, far_rooms) : 0;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t j = far[(2 * n + 1) * room / (2 * count)];
        if (all.count(j)) kept.insert(j);
      }
    }
    return kept;
  }

  // What row i keeps whatever its budget.
  Columns kept_anyway(int64_t i, const Columns& all) const {
    const int64_t d = diagonal(i), tokens = spec.global_tokens.value_or(64);
    Columns kept{d};
    if (spec.kind != PatternKind::global_local && spec.kind != PatternKind::bigbird) return kept;
    for (int64_t j : all) {
      const bool global = i < blocks(tokens, spec.block_q) || j < blocks(tokens, spec.block_k);
      const bool near = spec.window ? in_window(i, j) : spec.kind == PatternKind::bigbird && std::abs(j - d) <= 1;
      if (global || near) kept.insert(j);
    }
    return kept;
  }

  // What is kept for sure: everything but the random pairs.
  Columns row(int64_t head, int64_t i) const {
    const Columns all = admissible_columns(i);
    if (all.empty()) return {};
    const int64_t d = diagonal(i), count = static_cast<int64_t>(all.size());
    Columns kept;
    switch (spec.kind) {
      case PatternKind::dense:
      case PatternKind::causal: return all;
      case PatternKind::local_window:
        if (!spec.window) {
          fill_nearest(all, d, budget(count), kept);
          return kept;
        }
        for (int64_t j : all) {
          if (in_window(i, j)) kept.insert(j);
        }
        kept.insert(d);
        return kept;
      case PatternKind::dilated_sparse: return dilated_sparse(i, all);
      case PatternKind::strided: return strided(i, all, stride());
      case PatternKind::random: return {d};
      case PatternKind::global_local:
      case PatternKind::bigbird: {
        kept = kept_anyway(i, all);
        if (spec.kind == PatternKind::global_local && !spec.window) {
          fill_nearest(all, d, budget(count), kept);
        }
        return kept;
      }
      case PatternKind::dilated_segments: return dilated_segments(i, all, head);
      case PatternKind::hierarchical: return hierarchical(i, all);
    }
    return {};
  }
};

PatternSpec random_spec(Random& random, PatternKind kind) {
  const PatternShape shape = testing::random_shape(random);
  PatternSpec s;
  s.kind = kind;
  s.seqlen_q = shape.seqlen_q;
  s.seqlen_k = shape.seqlen_k;
  s.block_q = shape.block_q;
  s.block_k = shape.block_k;
  s.heads = random.in(1, 3);
  s.causal = random.chance(0.5);
  s.budget = random.chance(0.6) ? Budget::even : Budget::proportional;
  s.seed = random.word();
  const auto density = [&] { return random.chance(0.1) ? 1.0 : 0.01 + 0.98 * random.unit(); };
  switch (kind) {
    case PatternKind::dense:
    case PatternKind::causal: break;
    case PatternKind::local_window:
    case PatternKind::global_local:
      if (random.chance(0.5)) s.window = random.in(1, 200);
      if (!s.window || random.chance(0.3)) s.density = density();
      break;
    case PatternKind::dilated_sparse:
      s.density = density();
      for (int64_t n = random.in(0, 4); n > 0; --n) s.dilation_rates.push_back(random.in(1, 9));
      break;
    case PatternKind::strided:
      if (random.chance(0.5)) s.stride = random.in(1, 12);
      if (!s.stride || random.chance(0.3)) s.density = density();
      break;
    case PatternKind::random: s.density = density(); break;
    case PatternKind::bigbird:
      s.density = density();
      if (random.chance(0.5)) s.window = random.in(1, 200);
      break;
    case PatternKind::dilated_segments:
      for (int64_t n = random.in(1, 3); n > 0; --n) {
        s.segment_lengths.push_back(random.in(1, 500));
        s.dilation_rates.push_back(random.in(1, 4));
      }
      break;
    case PatternKind::hierarchical:
      s.ranks = random.in(1, 6);
      s.ranks_per_node = random.in(1, 4);
      if (random.chance(0.5)) s.density = density();
      if (!s.density || random.chance(0.5)) s.local_density = density();
      if (!s.density || random.chance(0.5)) s.global_density = random.chance(0.2) ? 0 : density();
      if (!s.density || random.chance(0.5)) s.inter_node_density = random.chance(0.2) ? 0 : density();
      break;
  }
  if ((kind == PatternKind::global_local || kind == PatternKind::bigbird) && random.chance(0.7)) {
    s.global_tokens = random.in(0, 120);
  }
  return s;
}

std::string describe(const PatternSpec& s) {
  std::string text = std::string(name_of(s.kind)) + " Sq " + std::to_string(s.seqlen_q) + " Sk " +
                     std::to_string(s.seqlen_k) + " block_q " + std::to_string(s.block_q) + " block_k " +
                     std::to_string(s.block_k) + (s.causal ? " causal" : "");
  text += s.budget == Budget::even ? " even" : " proportional";
  if (s.density) text += " density " + std::to_string(*s.density);
  if (s.window) text += " window " + std::to_string(*s.window);
  if (s.stride) text += " stride " + std::to_string(*s.stride);
  if (s.global_tokens) text += " global_tokens " + std::to_string(*s.global_tokens);
  return text;
}

class PatternKinds : public ::testing::TestWithParam<PatternKind> {};

TEST_P(PatternKinds, AgreesWithItsDefinition) {
  Random random(17 + static_cast<uint64_t>(GetParam()));
  const bool drawn = GetParam() == PatternKind::random || GetParam() == PatternKind::bigbird;
  for (int n = 0; n < 120; ++n) {
    const PatternSpec spec = random_spec(random, GetParam());
    SCOPED_TRACE(describe(spec));
    const Definition definition(spec);
    const BlockPattern pattern = make_pattern(spec);
    ASSERT_EQ(pattern.shape().heads, spec.heads);
    EXPECT_EQ(pattern.num_bitmaps(), 0);
    for (int64_t h = 0; h < spec.heads; ++h) {
      for (int64_t i = 0; i < definition.shape.rows(); ++i) {
        const Columns got = columns_of(pattern, h, i), certain = definition.row(h, i);
        const Columns all = definition.admissible_columns(i);
        ASSERT_EQ(admissible_cols(pattern.shape(), definition.spec.causal, i), static_cast<int64_t>(all.size()));
        ASSERT_TRUE(all.empty() || got.count(definition.diagonal(i))) << "row " << i;
        if (drawn) {
          ASSERT_TRUE(std::includes(got.begin(), got.end(), certain.begin(), certain.end())) << "row " << i;
          ASSERT_TRUE(std::includes(all.begin(), all.end(), got.begin(), got.end())) << "row " << i;
          const int64_t budget = definition.budget(static_cast<int64_t>(all.size()));
          ASSERT_EQ(static_cast<int64_t>(got.size()), std::max<int64_t>(budget, certain.size())) << "row " << i;
        } else {
          ASSERT_EQ(got, certain) << "head " << h << " row " << i;
        }
      }
    }
  }
}

// A token sees the same blocks in the pattern of the whole, in rows taken out of it, and in rows made alone: steps of
// one token, chunks that begin inside a block, everything.
TEST_P(PatternKinds, RowsOfALongerSequenceAreThoseOfTheWhole) {
  Random random(71 + static_cast<uint64_t>(GetParam()));
  for (int n = 0; n < 60; ++n) {
    PatternSpec spec = random_spec(random, GetParam());
    spec.seqlen_k = spec.seqlen_q;
    const BlockPattern whole = make_pattern(spec);
    const std::vector<uint8_t> tokens = testing::dense_tokens(whole);
    for (int m = 0; m < 4; ++m) {
      const int64_t begin = random.in(0, spec.seqlen_q - 1);
      const int64_t end = random.chance(0.4) ? begin + 1 : random.in(begin, spec.seqlen_q);
      SCOPED_TRACE(describe(spec) + " queries " + std::to_string(begin) + ".." + std::to_string(end));
      const BlockPattern taken = for_queries(whole, begin, end);
      PatternSpec rows = spec;
      rows.seqlen_q = end - begin;
      rows.q_offset = begin;
      rows.seqlen_total = spec.seqlen_q;
      if (whole.shape().causal) rows.seqlen_k = end;
      const BlockPattern made = make_pattern(rows);
      ASSERT_TRUE(taken.shape() == made.shape());
      ASSERT_TRUE(taken == made);
      ASSERT_EQ(taken.hash(), made.hash());
      const PatternShape& s = taken.shape();
      ASSERT_EQ(s.seqlen_k, whole.shape().causal ? end : spec.seqlen_q);
      const std::vector<uint8_t> part = testing::dense_tokens(taken);
      for (int64_t h = 0; h < spec.heads; ++h) {
        for (int64_t q = 0; q < s.seqlen_q; ++q) {
          const uint8_t* all = tokens.data() + (h * spec.seqlen_q + begin + q) * spec.seqlen_q;
          ASSERT_TRUE(std::equal(all, all + s.seqlen_k, part.begin() + (h * s.seqlen_q + q) * s.seqlen_k));
          ASSERT_EQ(std::count(all + s.seqlen_k, all + spec.seqlen_q, 1), 0);
        }
      }
    }
  }
}

TEST_P(PatternKinds, IsTheSameEachTimeItIsMade) {
  Random random(5);
  for (int n = 0; n < 20; ++n) {
    const PatternSpec spec = random_spec(random, GetParam());
    const BlockPattern a = make_pattern(spec), b = make_pattern(spec);
    EXPECT_TRUE(a == b);
    EXPECT_EQ(a.hash(), b.hash());
  }
}

TEST_P(PatternKinds, TakesEmptySequences) {
  Random random(6);
  for (const auto& [q, k] : {std::pair<int64_t, int64_t>{0, 0}, {0, 100}, {100, 0}}) {
    PatternSpec spec = random_spec(random, GetParam());
    spec.seqlen_q = q;
    spec.seqlen_k = k;
    const BlockPattern pattern = make_pattern(spec);
    EXPECT_EQ(pattern.num_blocks(), 0);
    EXPECT_EQ(pattern.shape().seqlen_q, q);
  }
}

// A row costs what it keeps: with 2^19 x 2^19 block pairs anything that visits them all would never end.
TEST_P(PatternKinds, NeverVisitsAllPairs) {
  PatternSpec spec;
  spec.kind = GetParam();
  spec.seqlen_q = spec.seqlen_k = int64_t{1} << 26;
  switch (GetParam()) {
    case PatternKind::dense:
    case PatternKind::causal: return;  // keep them all
    case PatternKind::dilated_segments:
      spec.segment_lengths = {512, 1024};
      spec.dilation_rates = {1, 2};
      break;
    case PatternKind::hierarchical: spec.ranks = 1024; [[fallthrough]];
    default: spec.density = 4.0 / (1 << 19);
  }
  const BlockPattern pattern = make_pattern(spec);
  EXPECT_GE(pattern.num_blocks(), int64_t{1} << 19);
  EXPECT_LE(pattern.num_blocks(), int64_t{1} << 23);
}

INSTANTIATE_TEST_SUITE_P(All, PatternKinds, ::testing::ValuesIn(all_pattern_kinds().begin(), all_pattern_kinds().end()),
                         [](const auto& info) { return std::string(name_of(info.param)); });

PatternSpec spec_of(PatternKind kind, int64_t seqlen, int block) {
  PatternSpec s;
  s.kind = kind;
  s.seqlen_q = s.seqlen_k = seqlen;
  s.block_q = s.block_k = block;
  return s;
}

// By hand: 8 columns, row 4, budget 4, rates 1, 3: the diagonal 4, then -1 -> 3, -3 -> 1, +1 -> 5.
TEST(DilatedSparse, TakesTurns) {
  PatternSpec spec = spec_of(PatternKind::dilated_sparse, 128, 16);
  spec.density = 0.5;
  spec.dilation_rates = {1, 3};
  EXPECT_EQ(columns_of(make_pattern(spec), 0, 4), (Columns{1, 3, 4, 5}));
}

// Even rates reach every other column only: the nearest others fill up to density 1.
TEST(DilatedSparse, MeetsItsBudgetWhenRatesRunOut) {
  PatternSpec spec = spec_of(PatternKind::dilated_sparse, 160, 16);
  spec.dilation_rates = {2, 4};
  spec.density = 0.6;
  EXPECT_EQ(columns_of(make_pattern(spec), 0, 4), (Columns{0, 2, 3, 4, 6, 8}));
  spec.density = 1.0;
  EXPECT_EQ(make_pattern(spec).num_blocks(), 100);
}

// Rows 3 and 4 (causal) have the same budget, but only row 4 has a column at distance 4: a row must not repeat the
// offsets of the row above when more room changes them.
TEST(DilatedSparse, UsesRoomThatTheRowAboveLacked) {
  PatternSpec spec = spec_of(PatternKind::dilated_sparse, 80, 16);
  spec.causal = true;
  spec.dilation_rates = {1, 4};
  spec.density = 0.65;
  spec.budget = Budget::proportional;
  EXPECT_EQ(columns_of(make_pattern(spec), 0, 3), (Columns{1, 2, 3}));
  EXPECT_EQ(columns_of(make_pattern(spec), 0, 4), (Columns{0, 3, 4}));
}

// Half a block: 0.5 * 5 = 2.5 rounds up; a vanishing density keeps the diagonal.
TEST(Budget, RoundsHalvesUpAndKeepsOne) {
  EXPECT_EQ(row_budget(0.5, 5), 3);
  EXPECT_EQ(row_budget(1e-9, 5), 1);
  EXPECT_EQ(row_budget(1.0, 5), 5);
  EXPECT_EQ(row_budget(0.5, 0), 0);
  PatternSpec spec = spec_of(PatternKind::random, 1024, 16);
  spec.density = 1e-9;
  const PatternStatistics s = statistics(make_pattern(spec));
  EXPECT_EQ(s.kept_blocks, 64);
  EXPECT_EQ(s.diagonal_density, 1);
}

// Rows of 1 to 8 admissible columns: 3 each, capped, is 21 of 36, nearer to half (18) than 2 each (15)? Both are 3
// away: the larger.
TEST(Budget, EvenIsTheNearestNumberForAllRows) {
  const std::vector<int64_t> rooms = {1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_EQ(even_budget(0.5, rooms), 3);
  EXPECT_EQ(even_budget(1e-9, rooms), 1);
  EXPECT_EQ(even_budget(1.0, rooms), 8);
  EXPECT_EQ(even_budget(0.5, {}), 1);
  PatternSpec spec = spec_of(PatternKind::local_window, 128, 16);
  spec.causal = true;
  spec.density = 0.5;
  EXPECT_EQ(make_pattern(spec).num_blocks(), 21);
  spec.budget = Budget::proportional;
  EXPECT_EQ(make_pattern(spec).num_blocks(), 1 + 1 + 2 + 2 + 3 + 3 + 4 + 4);
}

// 64 columns, 16 a row, 400 seeds, row 20: each column but the diagonal is kept with p = 15/63. Six standard
// deviations of a binomial is 8.5 % of 400; a missing or doubled column would be 24 % off.
TEST(RandomPattern, DrawsAllColumnsAlike) {
  PatternSpec spec = spec_of(PatternKind::random, 1024, 16);
  spec.density = 0.25;
  spec.heads = 400;
  const BlockPattern pattern = make_pattern(spec);
  std::vector<int> kept(64, 0);
  std::set<Columns> different;
  for (int64_t h = 0; h < spec.heads; ++h) {
    const Columns c = columns_of(pattern, h, 20);
    for (int64_t j : c) ++kept[j];
    different.insert(c);
  }
  EXPECT_GT(different.size(), 395u);
  const double p = 15.0 / 63, six_sigma = 6 * std::sqrt(400 * p * (1 - p));
  for (int j = 0; j < 64; ++j) EXPECT_NEAR(kept[j], j == 20 ? 400 : 400 * p, six_sigma) << j;
  spec.heads = 2;
  PatternSpec other = spec;
  other.seed = 1;
  EXPECT_FALSE(make_pattern(spec) == make_pattern(other));
}

TEST(DilatedSegments, OffsetShiftsByHead) {
  PatternSpec spec = spec_of(PatternKind::dilated_segments, 256, 16);
  spec.segment_lengths = {128};
  spec.dilation_rates = {4};
  spec.heads = 5;
  const BlockPattern pattern = make_pattern(spec);
  EXPECT_EQ(columns_of(pattern, 0, 4), (Columns{0, 4}));
  EXPECT_EQ(columns_of(pattern, 1, 5), (Columns{1, 5}));
  EXPECT_EQ(columns_of(pattern, 1, 4), (Columns{4}));  // not its turn: the diagonal pair only
  EXPECT_EQ(columns_of(pattern, 4, 12), (Columns{8, 12}));
}

// The far columns of a rank are the same for all its rows: few K/V blocks travel.
TEST(Hierarchical, FarColumnsAreSharedByARank) {
  PatternSpec spec = spec_of(PatternKind::hierarchical, 64 * 16, 16);
  spec.ranks = 4;
  spec.ranks_per_node = 2;
  spec.local_density = 0.5;
  spec.global_density = 0.25;
  spec.inter_node_density = 0.125;
  const BlockPattern pattern = make_pattern(spec);
  Columns travelling;
  for (int64_t i = 16; i < 32; ++i) {
    for (int64_t j : columns_of(pattern, 0, i)) {
      if (j / 16 != 1) travelling.insert(j);
    }
  }
  EXPECT_EQ(travelling.size(), 4u + 4u);  // .25 of 16 columns inside the node, .125 of 32 across
  EXPECT_EQ(columns_of(pattern, 0, 20).size(), 8u + 8u);
}

void expect_error(const PatternSpec& spec, const std::string& argument) {
  try {
    make_pattern(spec);
    ADD_FAILURE() << describe(spec) << ": no Error for " << argument;
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
    EXPECT_NE(std::string(e.what()).find("allowed"), std::string::npos);
  }
}

TEST(PatternSpecErrors, RowsOfALongerSequence) {
  PatternSpec s = spec_of(PatternKind::local_window, 100, 16);
  s.density = 0.5;
  s.causal = true;
  s.seqlen_total = 200;
  expect_error(s, "seqlen_total");  // of what?
  s.q_offset = 60;
  expect_error(s, "seqlen_k");  // 60 + 100 > 100
  s.seqlen_k = 160;
  s.seqlen_total = 159;
  expect_error(s, "seqlen_total");
  s.seqlen_total = int64_t{1} << 62;
  expect_error(s, "seqlen_total");
  s.seqlen_total = 200;
  EXPECT_EQ(make_pattern(s).shape().q_skip, 60 % 16);
  s.q_offset = -1;
  expect_error(s, "q_offset");
  s.q_offset = std::numeric_limits<int64_t>::max();
  expect_error(s, "q_offset");
  s.q_offset = 60;
  s.causal = false;
  expect_error(s, "seqlen_k");  // sees all 200
  s.seqlen_k = 200;
  EXPECT_EQ(make_pattern(s).shape().seqlen_k, 200);
}

TEST(PatternSpecErrors, MissingOptionsAreNamed) {
  using enum PatternKind;
  expect_error(spec_of(local_window, 100, 16), "window");
  expect_error(spec_of(global_local, 100, 16), "window");
  expect_error(spec_of(dilated_sparse, 100, 16), "density");
  expect_error(spec_of(random, 100, 16), "density");
  expect_error(spec_of(bigbird, 100, 16), "density");
  expect_error(spec_of(strided, 100, 16), "stride");
  expect_error(spec_of(dilated_segments, 100, 16), "segment_lengths");
  expect_error(spec_of(hierarchical, 100, 16), "local_density");
  PatternSpec s = spec_of(dilated_segments, 100, 16);
  s.segment_lengths = {64, 128};
  expect_error(s, "dilation_rates");
  s.dilation_rates = {1};
  expect_error(s, "dilation_rates");
  s = spec_of(hierarchical, 100, 16);
  s.local_density = 0.5;
  expect_error(s, "global_density");
  s.global_density = 0.5;
  expect_error(s, "inter_node_density");
}

// 6e11 blocks would be 2 TB: the error must come before the memory is asked for.
TEST(PatternSpecErrors, TooManyBlocksAreRefusedAtOnce) {
  using enum PatternKind;
  for (const PatternKind kind : {dense, causal}) expect_error(spec_of(kind, 100'000'000, 128), "pattern");
  for (const PatternKind kind : {dilated_sparse, random}) {
    PatternSpec s = spec_of(kind, 100'000'000, 128);
    s.density = 0.1;
    expect_error(s, "pattern");
  }
}

TEST(PatternSpecErrors, ForeignOptionsAreNamed) {
  using enum PatternKind;
  const auto with = [](PatternKind kind, auto&& change) {
    PatternSpec s = spec_of(kind, 100, 16);
    if (kind == dilated_sparse || kind == random) s.density = 0.5;
    change(s);
    return s;
  };
  expect_error(with(dense, [](auto& s) { s.density = 0.5; }), "density");
  expect_error(with(causal, [](auto& s) { s.window = 5; }), "window");
  expect_error(with(dilated_sparse, [](auto& s) { s.window = 5; }), "window");
  expect_error(with(random, [](auto& s) { s.dilation_rates = {1}; }), "dilation_rates");
  expect_error(with(random, [](auto& s) { s.segment_lengths = {64}; }), "segment_lengths");
  expect_error(with(random, [](auto& s) { s.global_tokens = 64; }), "global_tokens");
  expect_error(with(random, [](auto& s) { s.stride = 4; }), "stride");
  expect_error(with(random, [](auto& s) { s.ranks = 4; }), "ranks");
  expect_error(with(random, [](auto& s) { s.ranks_per_node = 4; }), "ranks_per_node");
  expect_error(with(random, [](auto& s) { s.local_density = 0.5; }), "local_density");
  expect_error(with(random, [](auto& s) { s.global_density = 0.5; }), "global_density");
  expect_error(with(random, [](auto& s) { s.inter_node_density = 0.5; }), "inter_node_density");
  PatternSpec segments = spec_of(dilated_segments, 100, 16);
  segments.density = 0.5;
  expect_error(segments, "density");
}

TEST(PatternSpecErrors, ValuesOutOfRangeAreNamed) {
  using enum PatternKind;
  PatternSpec s = spec_of(random, 100, 16);
  for (double bad :
       {0.0, -0.1, 1.0001, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    s.density = bad;
    expect_error(s, "density");
  }
  s = spec_of(local_window, 100, 16);
  s.window = 0;
  expect_error(s, "window");
  s = spec_of(strided, 100, 16);
  s.stride = 0;
  expect_error(s, "stride");
  s = spec_of(dilated_sparse, 100, 16);
  s.density = 0.5;
  s.dilation_rates = {1, 0};
  expect_error(s, "dilation_rates");
  s.dilation_rates.assign(1000, 1);
  expect_error(s, "dilation_rates");
  s = spec_of(bigbird, 100, 16);
  s.density = 0.5;
  s.global_tokens = -1;
  expect_error(s, "global_tokens");
  s = spec_of(dilated_segments, 100, 16);
  s.segment_lengths = {-5};
  s.dilation_rates = {1};
  expect_error(s, "segment_lengths");
  s = spec_of(hierarchical, 100, 16);
  s.density = 0.5;
  s.ranks = 0;
  expect_error(s, "ranks");
  s.ranks = int64_t{1} << 40;
  expect_error(s, "ranks");
  s = spec_of(dense, 100, 16);
  s.seqlen_q = -1;
  expect_error(s, "seqlen_q");
  s.seqlen_q = 100;
  s.seqlen_k = std::numeric_limits<int64_t>::max();
  expect_error(s, "seqlen_k");
  s.seqlen_k = 100;
  s.heads = 0;
  expect_error(s, "heads");
  s.heads = 1;
  for (int block : {0, -16, 8, 24, 272}) {
    s.block_q = block;
    expect_error(s, "block_q");
  }
  s.block_q = 16;
  s.block_k = 17;
  expect_error(s, "block_k");
  s = spec_of(dense, int64_t{1} << 30, 16);  // 2^52 pairs: refused long before memory is full
  s.heads = 1 << 10;
  expect_error(s, "pattern");
  EXPECT_THROW(pattern_kind("dilated"), Error);
  for (PatternKind kind : all_pattern_kinds()) EXPECT_EQ(pattern_kind(name_of(kind)), kind);
}

// The largest values that are allowed must not overflow anywhere (UBSan watches).
TEST(PatternSpecErrors, HugeValuesAreOrdinary) {
  using enum PatternKind;
  const int64_t huge = std::numeric_limits<int64_t>::max();
  for (bool causal : {false, true}) {
    PatternSpec s = spec_of(local_window, 1000, 16);
    s.causal = causal;
    const PatternSpec plain = s;
    s.window = huge;
    const int64_t all = causal ? 63 * 64 / 2 : 63 * 63;
    EXPECT_EQ(make_pattern(s).num_blocks(), all);
    s = plain;
    s.kind = global_local;
    s.window = 1;
    s.global_tokens = huge;
    EXPECT_EQ(make_pattern(s).num_blocks(), all);
    s = plain;
    s.kind = strided;
    s.stride = huge;
    EXPECT_EQ(make_pattern(s).num_blocks(), 63 + 62 * (causal ? 1 : 2));
    s = plain;
    s.kind = dilated_segments;
    s.segment_lengths = {huge, huge};
    s.dilation_rates = {huge, 1};
    s.heads = 2;
    EXPECT_EQ(make_pattern(s).num_blocks(), 2 * all);
    s = plain;
    s.kind = dilated_sparse;
    s.density = 0.2;
    s.dilation_rates = {huge, huge - 1, 1};
    PatternSpec one = s;
    one.dilation_rates = {1};
    EXPECT_TRUE(make_pattern(s) == make_pattern(one));
    s = plain;
    s.kind = hierarchical;
    s.density = 0.2;
    s.ranks = 1 << 20;
    s.ranks_per_node = huge;
    EXPECT_GE(make_pattern(s).num_blocks(), 63);
  }
}

}  // namespace
}  // namespace tessera
