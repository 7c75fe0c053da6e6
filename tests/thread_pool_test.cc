// ThreadPool: every worker index runs exactly once, from one caller or several, on pools smaller, as large as and
// larger than the machine; sizes 1..8 as a two-core machine then has spinning and sleeping threads. Run under TSan.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <set>
#include <thread>
#include <vector>

#include "tessera/error.h"
#include "tessera/executor.h"

namespace tessera {
namespace {

class PoolSize : public testing::TestWithParam<int> {};

TEST_P(PoolSize, EachIndexOnceInEveryCall) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.num_threads(), GetParam());
  for (int call = 0; call < 300; ++call) {
    const int n = call % (GetParam() + 1);
    std::vector<int> seen(static_cast<size_t>(GetParam()), 0);  // plain ints: TSan sees it if two share an index
    pool.run(n, [&](int i) { ++seen[i]; });
    for (int i = 0; i < GetParam(); ++i) ASSERT_EQ(seen[i], i < n ? 1 : 0) << "call " << call << " index " << i;
  }
}

TEST_P(PoolSize, WorkWrittenByWorkersIsSeenByTheCallerAndTheNextCall) {
  ThreadPool pool(GetParam());
  const int n = GetParam();
  std::vector<int64_t> value(static_cast<size_t>(n), 1);
  for (int call = 0; call < 100; ++call) {
    std::vector<int64_t> next(value.size());
    pool.run(n, [&](int i) { next[i] = value[i] + value[(i + 1) % n]; });
    value = next;
    for (int64_t& v : value) v %= 1000003;
  }
  int64_t expected = 1;
  for (int call = 0; call < 100; ++call) expected = expected * 2 % 1000003;
  for (int64_t v : value) EXPECT_EQ(v, expected);
}

TEST_P(PoolSize, SeveralCallersTakeTurns) {
  ThreadPool pool(GetParam());
  std::atomic<int> inside{0}, overlaps{0};
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int call = 0; call < 50; ++call) {
        pool.run(pool.num_threads(), [&](int i) {
          if (i == 0) {
            if (inside.fetch_add(1) != 0) ++overlaps;
            std::this_thread::yield();
            inside.fetch_sub(1);
          }
          total += i + 1;
        });
      }
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(overlaps, 0);
  EXPECT_EQ(total, 200 * int64_t{GetParam()} * (GetParam() + 1) / 2);
}

INSTANTIATE_TEST_SUITE_P(Sizes, PoolSize, testing::Values(1, 2, 3, 8));

// Workers that meet at a barrier finish only if each has a thread of its own.
TEST(ThreadPool, WorkersRunAtTheSameTime) {
  ThreadPool pool(4);
  for (int call = 0; call < 20; ++call) {
    std::atomic<int> arrived{0};
    std::vector<std::thread::id> ids(4);
    pool.run(4, [&](int i) {
      ids[i] = std::this_thread::get_id();
      ++arrived;
      while (arrived.load() < 4) std::this_thread::yield();
    });
    EXPECT_EQ(std::set<std::thread::id>(ids.begin(), ids.end()).size(), 4u);
    EXPECT_EQ(ids[0], std::this_thread::get_id());
  }
}

TEST(ThreadPool, WakesAfterSleeping) {
  ThreadPool pool(2);
  for (int call = 0; call < 5; ++call) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // far beyond the spinning
    std::atomic<int> arrived{0};
    pool.run(2, [&](int) {
      ++arrived;
      while (arrived.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(arrived, 2);
  }
}

TEST(ThreadPool, ExceptionReachesTheCallerAndThePoolStaysUsable) {
  ThreadPool pool(3);
  for (int bad = 0; bad < 3; ++bad) {
    EXPECT_THROW(pool.run(3,
                          [&](int i) {
                            if (i == bad) throw std::bad_alloc();
                          }),
                 std::bad_alloc);
    std::atomic<int> ran{0};
    pool.run(3, [&](int) { ++ran; });
    EXPECT_EQ(ran, 3);
  }
}

TEST(ThreadPool, BadSizesAreErrors) {
  EXPECT_THROW(ThreadPool(-1), Error);
  EXPECT_THROW(ThreadPool(1 << 20), Error);
  ThreadPool pool(2);
  const auto nothing = [](int) {};
  EXPECT_THROW(pool.run(3, nothing), Error);
  EXPECT_THROW(pool.run(-1, nothing), Error);
}

TEST(ThreadPool, DefaultIsTheAffinityMask) {
  EXPECT_GE(available_cpus(), 1);
  EXPECT_LE(available_cpus(), static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  EXPECT_EQ(ThreadPool(0).num_threads(), available_cpus());
}

TEST(ThreadPool, ManyShortLives) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(4);
    if (i % 2) pool.run(4, [](int) {});
  }
}

}  // namespace
}  // namespace tessera
