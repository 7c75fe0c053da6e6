// The two inner loops of the analysis alone, against fp64. Sizes: remainders of the register tile (4 rows x 2 vectors)
// and of nothing else, as columns come in multiples of 16; ranges that begin and end anywhere in a vector.
#include "analysis/tile.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tessera/dtype.h"

namespace tessera::analysis {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_floats(std::mt19937& random, int64_t n, float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = normal(random);
  return x;
}

TEST(Tile, Multiply) {
  std::mt19937 random(1);
  for (const int64_t rows : {1, 3, 4, 5, 8, 11}) {
    for (const int64_t inner : {1, 2, 17, 64}) {
      for (const int64_t cols : {16, 32, 48, 80, 256}) {
        const std::vector<float> a = random_floats(random, rows * inner), b = random_floats(random, inner * cols);
        std::vector<float> c(static_cast<size_t>(rows * cols + 1), kNan);
        c.back() = 7;
        multiply(a.data(), b.data(), c.data(), rows, inner, cols);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t x = 0; x < cols; ++x) {
            double sum = 0, magnitude = 0;
            for (int64_t i = 0; i < inner; ++i) {
              const double product = double{a[r * inner + i]} * b[i * cols + x];
              sum += product;
              magnitude += std::abs(product);
            }
            ASSERT_NEAR(c[r * cols + x], sum, magnitude * static_cast<double>(inner) * epsilon_of(DType::f32));
          }
        }
        EXPECT_EQ(c.back(), 7);
      }
    }
  }
}

// Two tiles, one after the other: numerators against the running maximum, and the factor that joins their sums.
TEST(Tile, SoftmaxNumerators) {
  std::mt19937 random(2);
  const int64_t rows = 37, cols = 48;
  std::vector<int32_t> begin(rows), end(rows);
  std::vector<float> max(rows, -kInfinity), rescale(rows), sum(rows);
  std::vector<double> total(rows, 0.0), expected(rows, 0.0);
  std::vector<std::vector<double>> seen(rows);
  for (int tile = 0; tile < 6; ++tile) {
    std::vector<float> s = random_floats(random, rows * cols, tile == 0 ? 1.0f : 12.0f);
    const std::vector<float> scores = s;
    for (int64_t r = 0; r < rows; ++r) {
      begin[r] = static_cast<int32_t>(random() % cols);
      end[r] = begin[r] + static_cast<int32_t>(random() % static_cast<unsigned>(cols + 1 - begin[r]));
      for (int64_t c = 0; c < cols; ++c) {  // what stands outside the range must not matter
        if (c < begin[r] || c >= end[r]) s[r * cols + c] = c % 2 ? kNan : kInfinity;
      }
    }
    const std::vector<float> before = max;
    ASSERT_TRUE(
        softmax_numerators(s.data(), rows, cols, begin.data(), end.data(), max.data(), rescale.data(), sum.data()));
    for (int64_t r = 0; r < rows; ++r) {
      ASSERT_GE(max[r], before[r]);
      double row_sum = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const float p = s[r * cols + c];
        if (c < begin[r] || c >= end[r]) {
          ASSERT_EQ(p, 0);
          continue;
        }
        const double score = scores[r * cols + c];
        ASSERT_LE(score, max[r] + kMaxSlack);
        const double exact = std::exp(score - max[r]);
        // The difference is rounded (relative error of p: its size times epsilon); the polynomial is good to 2 ulp.
        ASSERT_NEAR(p, exact, exact * (4 + std::abs(score - max[r])) * epsilon_of(DType::f32) + 1e-38);
        row_sum += p;
        seen[r].push_back(score);
      }
      ASSERT_NEAR(sum[r], row_sum, row_sum * static_cast<double>(cols) * epsilon_of(DType::f32));
      total[r] = total[r] * rescale[r] + sum[r];
      double whole = 0;
      for (double score : seen[r]) whole += std::exp(score - max[r]);
      ASSERT_NEAR(total[r], whole, whole * 1e-5);
    }
  }
}

TEST(Tile, SoftmaxNumeratorsNotFinite) {
  const int32_t begin = 2, end = 9;
  for (const float bad : {kNan, kInfinity}) {
    for (const int at : {2, 5, 8}) {
      std::vector<float> s(16, 0.5f);
      s[static_cast<size_t>(at)] = bad;
      float max = -kInfinity, rescale = 0, sum = 0;
      EXPECT_FALSE(softmax_numerators(s.data(), 1, 16, &begin, &end, &max, &rescale, &sum));
    }
  }
  // A row that is -inf throughout sees nothing, and forgets nothing that it saw before.
  std::vector<float> s(16, -kInfinity);
  float max = 3, rescale = 0, sum = 1;
  EXPECT_TRUE(softmax_numerators(s.data(), 1, 16, &begin, &end, &max, &rescale, &sum));
  EXPECT_EQ(max, 3);
  EXPECT_EQ(rescale, 1);
  EXPECT_EQ(sum, 0);
  max = -kInfinity;
  std::fill(s.begin(), s.end(), -kInfinity);
  EXPECT_TRUE(softmax_numerators(s.data(), 1, 16, &begin, &end, &max, &rescale, &sum));
  EXPECT_EQ(max, -kInfinity);
  EXPECT_EQ(sum, 0);
}

TEST(Tile, AddAndScale) {
  std::mt19937 random(3);
  for (const int64_t n : {16, 48, 160}) {
    const std::vector<float> x = random_floats(random, n), y = random_floats(random, n);
    std::vector<float> z = y;
    add_to(z.data(), x.data(), n);
    scale_by(z.data(), 0.3f, n);
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(z[i], (y[i] + x[i]) * 0.3f);
  }
}

}  // namespace
}  // namespace tessera::analysis
