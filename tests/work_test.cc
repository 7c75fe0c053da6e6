// The loop that hands out units of work: each unit once, what it says of the next unit is true, and an exception ends
// it.
#include "core/work.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

namespace tessera {
namespace {

// 1000 units: enough for threads to take several at once, and not a multiple of how many.
constexpr int64_t kUnits = 1000;

TEST(Work, EachUnitOnceWithTheStateOfItsThread) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> taken(kUnits);
  std::vector<int64_t> done(3, 0);
  parallel_for(
      pool, kUnits, [&](int thread) { return &done[thread]; },
      [&](int64_t* mine, int64_t unit) {
        ++taken[unit];
        ++*mine;
      });
  for (const auto& times : taken) EXPECT_EQ(times, 1);
  EXPECT_EQ(done[0] + done[1] + done[2], kUnits);
}

// What a unit is told of the next one is what happens on its thread, and the units of a run go up one by one.
TEST(Work, TellsWhetherTheNextUnitFollows) {
  for (int threads : {1, 3}) {
    ThreadPool pool(threads);
    std::atomic<int64_t> all{0}, followed{0};
    parallel_for(
        pool, kUnits, [](int) { return int64_t{-1}; },  // the unit that must come next, -1: any
        [&](int64_t& expected, int64_t unit, bool follows) {
          EXPECT_TRUE(expected == -1 || unit == expected);
          expected = follows ? unit + 1 : -1;
          ++all;
          followed += follows;
        });
    EXPECT_EQ(all, kUnits);
    EXPECT_GT(followed, kUnits / 2);
  }
}

TEST(Work, AnExceptionReachesTheCaller) {
  ThreadPool pool(3);
  std::atomic<int64_t> done{0};
  const auto work = [&](int64_t unit) {
    if (unit == 5) throw std::runtime_error("five");
    ++done;
  };
  EXPECT_THROW(parallel_for(pool, kUnits, work), std::runtime_error);
  InlineExecutor here;
  done = 0;
  EXPECT_THROW(parallel_for(here, kUnits, work), std::runtime_error);
  EXPECT_EQ(done, 5);  // nothing is taken after it
}

// Problems without units are passed over.
TEST(Work, UnitsOfSeveralProblems) {
  UnitRanges ranges;
  for (int64_t units : {0, 3, 0, 2}) ranges.add(units);
  ASSERT_EQ(ranges.units(), 5);
  const std::pair<size_t, int64_t> expected[] = {{1, 0}, {1, 1}, {1, 2}, {3, 0}, {3, 1}};
  for (int64_t unit = 0; unit < 5; ++unit) EXPECT_EQ(ranges.find(unit), expected[unit]);
}

}  // namespace
}  // namespace tessera
