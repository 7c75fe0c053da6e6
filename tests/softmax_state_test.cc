// SoftmaxState: the sums of any split of a row's keys, joined in any way, are those of the row. 40 scores over +-60: in
// fp32 the weights of most are far below 1, and references move often.
#include "call/softmax_state.h"

#include <gtest/gtest.h>

#include <vector>

#include "check/random.h"

namespace tessera {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<double> scores(uint64_t seed) {
  check::Random random(seed);
  std::vector<double> all(40);
  for (double& s : all) s = 30 * random.normal();
  return all;
}

// Keys first .. last - 1 with value 1 + index each; `out` is what is accumulated.
template <class T, class Powers>
struct Row {
  SoftmaxState<T, Powers> state;
  T out = 0;

  void take(const std::vector<double>& scores, size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      const T score = static_cast<T>(scores[i] * Powers::kPerLn);
      out *= state.cover(score);
      out += state.add(score) * static_cast<T>(i + 1);
    }
  }
  void join(const Row& other) {
    out *= state.cover(other.state.reference);
    out += state.merge(other.state) * other.out;
  }
};

template <class T, class Powers>
void expect_joins(uint64_t seed) {
  const std::vector<double> all = scores(seed);
  const float sink = 3;
  double sum = 0, out = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    sum += std::exp(all[i]);
    out += std::exp(all[i]) * static_cast<double>(i + 1);
  }
  // Roundings: of each score and its exponential (|score| <= 120), and of 40 terms.
  const double error = std::numeric_limits<T>::epsilon() * (2 * 120 + 40);
  for (const size_t parts : {1, 2, 3, 7, 40}) {
    std::vector<Row<T, Powers>> rows(parts);
    for (size_t n = 0; n < parts; ++n) rows[n].take(all, n * all.size() / parts, (n + 1) * all.size() / parts);
    // One after the other, as they come; and all at once, their references covered first.
    Row<T, Powers> one, many;
    for (const auto& row : rows) one.join(row);
    for (const auto& row : rows) many.state.cover(row.state.reference);
    for (const auto& row : rows) many.out += many.state.merge(row.state) * row.out;
    for (const auto& joined : {one, many}) {
      const auto end = joined.state.finish(), with_sink = joined.state.finish(&sink);
      EXPECT_NEAR(end.lse, std::log(sum), error);
      EXPECT_NEAR(end.factor * joined.out / (out / sum), 1, 2 * error);
      EXPECT_NEAR(with_sink.lse, std::log(sum + std::exp(sink)), error);
      EXPECT_NEAR(with_sink.factor * joined.out / (out / (sum + std::exp(sink))), 1, 2 * error);
    }
  }
}

TEST(SoftmaxState, PartsJoinToTheWhole) {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    expect_joins<float, PowersOfE>(seed);
    expect_joins<float, PowersOf2>(seed);
    expect_joins<double, PowersOfE>(seed);
    expect_joins<double, PowersOf2>(seed);
  }
}

TEST(SoftmaxState, RowsThatHaveEndedJoin) {
  using State = SoftmaxState<double, PowersOfE>;
  State joined;
  for (const double lse : {-2.0, -kInfinity, 1.0}) joined.cover(lse);
  EXPECT_EQ(joined.merge(State::ended(-kInfinity)), 0);
  EXPECT_EQ(joined.merge(State::ended(1)), 1);
  EXPECT_NEAR(joined.merge(State::ended(-2)), std::exp(-3.0), 1e-16);
  EXPECT_NEAR(joined.finish().lse, std::log(std::exp(1.0) + std::exp(-2.0)), 1e-15);
}

TEST(SoftmaxState, WithoutKeys) {
  const float sink = 2;
  SoftmaxState<float, PowersOf2> state;
  state.cover(-std::numeric_limits<float>::infinity());
  for (const auto end : {state.finish(), state.finish(&sink)}) {
    EXPECT_EQ(end.lse, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(end.factor, 0);
  }
}

TEST(SoftmaxState, NanStays) {
  SoftmaxState<float, PowersOfE> state;
  for (const float score : {1.0f, std::nanf(""), 5.0f}) state.cover(score);
  state.add(1);
  EXPECT_TRUE(std::isnan(state.finish().lse) && std::isnan(state.finish().factor));
}

TEST(SoftmaxState, OutIsNormalisedByTheWeightsAsUsed) {  // lse by the exact ones
  const SoftmaxState<float, PowersOf2> state{3, 2, 1.5};
  EXPECT_EQ(state.finish().factor, 1 / 1.5f);
  EXPECT_FLOAT_EQ(state.finish().lse, 4 * 0.6931471805599453f);
}

}  // namespace
}  // namespace tessera
