// A child of fork() while other threads are inside: it makes patterns and runs pools as if nobody had been there. Each
// child has ten seconds. (Sanitizers' own locks are not released in a child of several threads: ThreadSanitizer refuses
// it, and AddressSanitizer's allocator now and then stays locked. There these tests are left out, and
// under qemu-user, where a child of several threads cannot start others.)
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "tessera/executor.h"
#include "tessera/pattern_cache.h"

namespace tessera {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__) || defined(TESSERA_EMULATED)
constexpr bool kSkip = true;
#else
constexpr bool kSkip = false;
#endif

// 0 where `work` returned true in a child of fork(), in time.
int in_child(const std::function<bool()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGALRM, SIG_DFL);
    alarm(10);
    _exit(work() ? 0 : 1);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return -1;
  return status;
}

PatternSpec spec_of(int64_t seqlen) {
  return {.kind = PatternKind::dilated_sparse,
          .seqlen_q = seqlen,
          .seqlen_k = seqlen,
          .block_q = 16,
          .block_k = 16,
          .density = 0.25};
}

TEST(Fork, AChildMakesWhatAnotherThreadWasMaking) {
  if (kSkip) GTEST_SKIP();
  std::mutex mutex;
  std::condition_variable changed;
  bool inside = false, leave = false;
  const std::thread::id here = std::this_thread::get_id();
  PatternCache cache({}, [&](const PatternSpec& spec) {
    if (std::this_thread::get_id() != here) {
      std::unique_lock lock(mutex);
      inside = true;
      changed.notify_all();
      changed.wait(lock, [&] { return leave; });
    }
    return make_pattern(spec);
  });
  const BlockPattern kept = cache.get(spec_of(128));
  std::thread maker([&] { cache.get(spec_of(256)); });
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return inside; });
  }
  EXPECT_EQ(in_child([&] {
              return cache.get(spec_of(128)) == kept && cache.get(spec_of(256)) == make_pattern(spec_of(256)) &&
                     cache.stats().entries == 2;
            }),
            0);
  {
    const std::lock_guard lock(mutex);
    leave = true;
    changed.notify_all();
  }
  maker.join();
  EXPECT_EQ(cache.get(spec_of(256)), make_pattern(spec_of(256)));
}

TEST(Fork, AMakerThatForksGoesOnInBoth) {
  if (kSkip) GTEST_SKIP();
  bool first = true;
  int status = -1;
  PatternCache cache({}, [&](const PatternSpec& spec) {
    if (first) {
      first = false;
      status = in_child([&] { return cache.get(spec_of(512)) == make_pattern(spec_of(512)); });
    }
    return make_pattern(spec);
  });
  EXPECT_EQ(cache.get(spec_of(256)), make_pattern(spec_of(256)));
  EXPECT_EQ(status, 0);
}

// Threads look up, make and drop all the time: a lock that one of them holds at the moment of a fork must not stay
// held.
TEST(Fork, ManyForksAmongThreadsThatUseTheCache) {
  if (kSkip) GTEST_SKIP();
  PatternCache cache({.entries = 3});
  std::atomic<bool> stop{false};
  std::vector<std::thread> users;
  for (int t = 0; t < 3; ++t) {
    users.emplace_back([&, t] {
      for (int64_t i = t; !stop; ++i) cache.get(spec_of(64 + i % 7 * 16)).transposed();
    });
  }
  int failed = 0;
  for (int i = 0; i < 200 && failed == 0; ++i) {
    failed = in_child([&] {
      for (int64_t n = 0; n < 7; ++n) {
        const BlockPattern found = cache.get(spec_of(64 + n * 16));
        if (!(found == make_pattern(spec_of(64 + n * 16)))) return false;
        found.transposed();
        found.hash();
      }
      return true;
    });
  }
  stop = true;
  for (std::thread& user : users) user.join();
  EXPECT_EQ(failed, 0);
}

// The transposed form of a large pattern, while another thread makes it.
TEST(Fork, AChildTransposesWhatAnotherThreadWasTransposing) {
  if (kSkip) GTEST_SKIP();
  for (int i = 0; i < 10; ++i) {
    const BlockPattern pattern = make_pattern(spec_of(32768));
    std::atomic<bool> started{false};
    std::thread other([&] {
      started = true;
      pattern.transposed();
      pattern.hash();
    });
    while (!started) std::this_thread::yield();
    const int status = in_child([&] {
      const int64_t* indptr = pattern.transposed().indptr;
      return indptr[pattern.shape().cols()] == pattern.num_blocks() && pattern.hash() != 0;
    });
    other.join();
    EXPECT_EQ(status, 0);
  }
}

bool all_run(ThreadPool& pool) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(pool.num_threads()));
  for (int call = 0; call < 3; ++call) pool.run(pool.num_threads(), [&](int i) { ++seen[i]; });
  for (const auto& count : seen) {
    if (count != 3) return false;
  }
  return true;
}

TEST(Fork, AChildHasAPoolWithThreadsOfItsOwn) {
  if (kSkip) GTEST_SKIP();
  ThreadPool pool(3);
  ASSERT_TRUE(all_run(pool));
  EXPECT_EQ(in_child([&] {
              std::mutex mutex;
              std::condition_variable changed;
              int inside = 0;
              pool.run(3, [&](int) {  // ends only where three threads are inside at once
                std::unique_lock lock(mutex);
                ++inside;
                changed.notify_all();
                changed.wait(lock, [&] { return inside == 3; });
              });
              return all_run(pool);
            }),
            0);
  EXPECT_TRUE(all_run(pool));
}

TEST(Fork, APoolWhoseCallWasRunningIsFreeInTheChild) {
  if (kSkip) GTEST_SKIP();
  auto pool = std::make_unique<ThreadPool>(2);
  std::atomic<bool> inside{false}, leave{false};
  std::thread caller([&] {
    pool->run(2, [&](int i) {
      inside = true;
      while (i == 0 && !leave) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
  EXPECT_EQ(in_child([&] {
              const bool right = all_run(*pool);
              pool.reset();  // its threads end, those of the parent are not waited for
              return right;
            }),
            0);
  EXPECT_EQ(in_child([&] {
              pool.reset();  // never used there
              return true;
            }),
            0);
  leave = true;
  caller.join();
  EXPECT_TRUE(all_run(*pool));
}

}  // namespace
}  // namespace tessera
