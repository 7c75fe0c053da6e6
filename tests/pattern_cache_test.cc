// PatternCache: that no field of a spec is forgotten, that limits by bytes and count hold in the order of use, that a
// size follows a pattern that grows, and that threads which want one spec make it once without holding up anybody.
// Builders of the tests stand in for make_pattern where a test must count, hold up or break a build; patterns are of
// 64 to 4,096 tokens, as nothing here depends on their size.
#include "tessera/pattern_cache.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tessera/error.h"

namespace tessera {
namespace {

PatternSpec spec_of(int64_t seqlen, double density = 0.25) {
  return {.kind = PatternKind::dilated_sparse,
          .seqlen_q = seqlen,
          .seqlen_k = seqlen,
          .block_q = 16,
          .block_k = 16,
          .density = density};
}

// A pattern that takes `blocks` row pointers, whatever the spec.
BlockPattern empty_rows(int64_t blocks) {
  PatternShape shape;
  shape.seqlen_q = 16 * blocks;
  shape.block_q = shape.block_k = 16;
  return BlockPattern::from_csr(shape, std::vector<int64_t>(blocks + 1), {});
}

bool same_storage(const BlockPattern& a, const BlockPattern& b) { return a.view().indptr == b.view().indptr; }

TEST(PatternCache, GivesWhatMakePatternGivesAndMakesItOnce) {
  PatternCache cache;
  const BlockPattern first = cache.get(spec_of(512));
  EXPECT_EQ(first, make_pattern(spec_of(512)));
  EXPECT_TRUE(same_storage(cache.get(spec_of(512)), first));
  EXPECT_FALSE(same_storage(cache.get(spec_of(513)), first));
  const PatternCacheStats s = cache.stats();
  EXPECT_EQ(s.hits, 1);
  EXPECT_EQ(s.misses, 2);
  EXPECT_EQ(s.evictions, 0);
  EXPECT_EQ(s.entries, 2u);
  const size_t patterns = first.bytes() + cache.get(spec_of(513)).bytes();
  EXPECT_GE(s.bytes, patterns + 2 * sizeof(PatternSpec));
  EXPECT_LT(s.bytes, patterns + 4 * sizeof(PatternSpec));
}

// Every field is changed in turn, and back. The binding does not compile once PatternSpec has a field more, and the
// count of changes must be that of its names.
TEST(PatternCache, AnyChangedFieldMisses) {
  PatternSpec spec;
  auto& [kind, seqlen_q, seqlen_k, block_q, block_k, heads, causal, density, budget, q_offset, seqlen_total, window,
         dilation_rates, segment_lengths, global_tokens, stride, seed, ranks, ranks_per_node, local_density,
         global_density, inter_node_density] = spec;
  const std::array<std::function<void()>, 22> changes = {
      [&] { kind = PatternKind::bigbird; },
      [&] { seqlen_q = 1; },
      [&] { seqlen_k = 1; },
      [&] { block_q = 64; },
      [&] { block_k = 64; },
      [&] { heads = 2; },
      [&] { causal = true; },
      [&] { density = 0.0; },  // is not "not given"
      [&] { budget = Budget::proportional; },
      [&] { q_offset = 0; },
      [&] { seqlen_total = 0; },
      [&] { window = 0; },
      [&] { dilation_rates = {0}; },
      [&] { segment_lengths = {0}; },
      [&] { global_tokens = 0; },
      [&] { stride = 0; },
      [&] { seed = uint64_t{1} << 63; },
      [&] { ranks = 2; },
      [&] { ranks_per_node = 2; },
      [&] { local_density = 0.0; },
      [&] { global_density = 0.0; },
      [&] { inter_node_density = 0.0; },
  };
  int builds = 0;
  PatternCache cache({}, [&](const PatternSpec&) {
    ++builds;
    return BlockPattern();
  });
  cache.get(spec);
  for (size_t i = 0; i < changes.size(); ++i) {
    spec = PatternSpec();
    changes[i]();
    cache.get(spec);
    EXPECT_EQ(builds, static_cast<int>(i) + 2) << "change " << i << " was not seen";
    cache.get(spec);
    EXPECT_EQ(builds, static_cast<int>(i) + 2) << "change " << i << " is not found again";
  }
  cache.get(PatternSpec());
  EXPECT_EQ(builds, static_cast<int>(changes.size()) + 1);
  EXPECT_EQ(cache.stats().entries, changes.size() + 1);
}

// Values, not only presence: neighbours of each other in the last bit, lists that are pieces of one another.
TEST(PatternCache, NearValuesAreOthers) {
  PatternCache cache({}, [](const PatternSpec&) { return BlockPattern(); });
  std::vector<PatternSpec> specs;
  for (double density : {0.1, std::nextafter(0.1, 1.0), 0.0}) {
    specs.emplace_back().density = density;
    specs.emplace_back().local_density = density;
  }
  const std::vector<int64_t> lists[] = {{1}, {2}, {1, 2}, {2, 1}, {1, 1}};
  for (const std::vector<int64_t>& list : lists) {
    specs.emplace_back().dilation_rates = list;
    specs.emplace_back().segment_lengths = list;
    for (const std::vector<int64_t>& other : lists) {
      specs.emplace_back().dilation_rates = list;
      specs.back().segment_lengths = other;
    }
  }
  for (const PatternSpec& s : specs) cache.get(s);
  EXPECT_EQ(cache.stats().misses, static_cast<int64_t>(specs.size()));
  for (const PatternSpec& s : specs) cache.get(s);
  EXPECT_EQ(cache.stats().hits, static_cast<int64_t>(specs.size()));

  PatternSpec zero, negative_zero;  // equal, so one pattern
  zero.global_density = 0.0;
  negative_zero.global_density = -0.0;
  cache.get(zero);
  cache.get(negative_zero);
  EXPECT_EQ(cache.stats().hits, static_cast<int64_t>(specs.size()) + 1);
}

TEST(PatternCache, LeastRecentlyUsedGoesFirst) {
  PatternCache cache({.entries = 3}, [](const PatternSpec& s) { return empty_rows(s.seqlen_q); });
  const auto made = [&](int64_t n) {  // whether the cache had to make it
    const int64_t before = cache.stats().misses;
    PatternSpec s;
    s.seqlen_q = n;
    EXPECT_EQ(cache.get(s), empty_rows(n));
    return cache.stats().misses > before;
  };
  EXPECT_TRUE(made(1) && made(2) && made(3));
  EXPECT_FALSE(made(1));  // order of use: 1 3 2
  EXPECT_TRUE(made(4));   // 2 goes
  EXPECT_EQ(cache.stats().evictions, 1);
  EXPECT_FALSE(made(3));
  EXPECT_FALSE(made(1));
  EXPECT_TRUE(made(2));  // 4 goes
  EXPECT_TRUE(made(4));  // 3 goes
  EXPECT_FALSE(made(1));
  EXPECT_EQ(cache.stats().evictions, 3);
  EXPECT_EQ(cache.stats().entries, 3u);
}

// Three patterns of about 8 KB fit into 30 KB, a fourth does not; one of 80 KB is returned but drives nobody out.
TEST(PatternCache, BytesAreLimited) {
  PatternCache cache({.bytes = 30000}, [](const PatternSpec& s) { return empty_rows(s.seqlen_q); });
  const auto get = [&](int64_t n) {
    PatternSpec s;
    s.seqlen_q = n;
    return cache.get(s);
  };
  for (int64_t n : {1000, 1001, 1002}) get(n);
  EXPECT_EQ(cache.stats().entries, 3u);
  EXPECT_GT(cache.stats().bytes, 3 * 8000u);
  EXPECT_LE(cache.stats().bytes, 30000u);
  EXPECT_EQ(get(10000), empty_rows(10000));
  EXPECT_EQ(cache.stats().entries, 3u);
  EXPECT_EQ(cache.stats().evictions, 0);
  get(1003);
  EXPECT_EQ(cache.stats().entries, 3u);
  EXPECT_EQ(cache.stats().evictions, 1);
  EXPECT_LE(cache.stats().bytes, 30000u);

  cache.resize({.bytes = 20000, .entries = 8});
  EXPECT_EQ(cache.limits().bytes, 20000u);
  EXPECT_EQ(cache.stats().entries, 2u);
  cache.resize({.bytes = 20000, .entries = 1});
  EXPECT_EQ(cache.stats().entries, 1u);
  const int64_t hits = cache.stats().hits;
  get(1003);  // the last one used
  EXPECT_EQ(cache.stats().hits, hits + 1);
  cache.resize({.bytes = 20000, .entries = 0});
  EXPECT_EQ(cache.stats().bytes, 0u);
  EXPECT_EQ(get(1003), empty_rows(1003));
  EXPECT_EQ(cache.stats().entries, 0u);
}

TEST(PatternCache, ResizeTakesEffectAtOnce) {
  PatternCache cache;
  const BlockPattern older = cache.get(spec_of(64)), newer = cache.get(spec_of(128));
  cache.resize({.entries = 1});
  cache.resize({.entries = 2});
  EXPECT_FALSE(same_storage(cache.get(spec_of(64)), older));
  EXPECT_TRUE(same_storage(cache.get(spec_of(128)), newer));
}

TEST(PatternCache, SizeFollowsThePattern) {
  PatternCache cache;
  const BlockPattern a = cache.get(spec_of(4096)), b = cache.get(spec_of(2048));
  const size_t keys = cache.stats().bytes - a.bytes() - b.bytes();
  const size_t before = a.bytes();
  a.transposed();
  ASSERT_GT(a.bytes(), before);
  EXPECT_EQ(cache.stats().bytes, a.bytes() + b.bytes() + keys);

  // A limit that only b's transposed form breaks: the other goes, at the next use of b. (stats() would look, too.)
  cache.resize({.bytes = cache.stats().bytes});
  EXPECT_EQ(cache.stats().entries, 2u);
  b.transposed();
  cache.get(spec_of(2048));
  EXPECT_FALSE(same_storage(cache.get(spec_of(4096)), a));
  EXPECT_EQ(cache.stats().evictions, 1);
  EXPECT_TRUE(same_storage(cache.get(spec_of(2048)), b));

  // One that outgrows the limit alone goes alone, though it was used last.
  PatternCache small;
  const BlockPattern c = small.get(spec_of(64)), d = small.get(spec_of(4096));
  small.resize({.bytes = small.stats().bytes});
  d.transposed();
  EXPECT_EQ(small.stats().entries, 1u);
  EXPECT_TRUE(same_storage(small.get(spec_of(64)), c));
  EXPECT_GT(d.num_blocks(), 0);  // still whole in our hands
}

TEST(PatternCache, WarmUpMakesBothForms) {
  const int64_t seqlens[] = {256, 1024, 4096};
  for (const bool transposed : {false, true}) {
    PatternCache cache;
    cache.warm_up(spec_of(0), seqlens, transposed);
    EXPECT_EQ(cache.stats().misses, 3);
    const size_t bytes = cache.stats().bytes;
    size_t grown = 0;
    for (int64_t n : seqlens) {
      const BlockPattern p = cache.get(spec_of(n));
      const size_t before = p.bytes();
      p.transposed();
      grown += p.bytes() - before;
    }
    EXPECT_EQ(cache.stats().misses, 3) << "lengths were not those asked for";
    EXPECT_EQ(grown == 0, transposed);
    EXPECT_EQ(cache.stats().bytes, bytes + grown);
  }
  PatternCache narrow({.entries = 2});
  narrow.warm_up(spec_of(0), seqlens);
  EXPECT_EQ(narrow.stats().evictions, 1);
  narrow.get(spec_of(4096));
  EXPECT_EQ(narrow.stats().hits, 1);
}

TEST(PatternCache, ClearForgetsPatternsAndKeepsCounts) {
  PatternCache cache;
  const BlockPattern p = cache.get(spec_of(512));
  cache.clear();
  EXPECT_EQ(cache.stats().entries, 0u);
  EXPECT_EQ(cache.stats().bytes, 0u);
  EXPECT_EQ(cache.stats().evictions, 0);
  EXPECT_EQ(cache.stats().misses, 1);
  EXPECT_EQ(cache.get(spec_of(512)), p);
  EXPECT_EQ(cache.stats().misses, 2);
}

// An invalid spec fails each time, is never kept, and leaves nothing behind that another call could wait for; a NaN
// does not equal itself and so can be found by no look-up.
TEST(PatternCache, ErrorsAreThoseOfMakePattern) {
  PatternCache cache;
  for (double density : {2.0, std::numeric_limits<double>::quiet_NaN()}) {
    for (int i = 0; i < 2; ++i) {
      try {
        cache.get(spec_of(512, density));
        ADD_FAILURE() << density;
      } catch (const Error& e) {
        EXPECT_EQ(e.argument(), "density");
      }
    }
  }
  EXPECT_EQ(cache.stats().entries, 0u);
  EXPECT_EQ(cache.stats().misses, 4);
}

// A builder that waits until it is let go.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void wait_for_one() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }
  void open() {
    const std::scoped_lock lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

// Of eight threads one makes the pattern; meanwhile other specs are made and found. The pause lets the seven arrive;
// had they not, they would hit and the counts be the same.
TEST(PatternCacheThreads, OneBuildsTheOthersWaitAndNobodyElseDoes) {
  Gate gate;
  std::atomic<int> builds = 0;
  PatternCache cache({}, [&](const PatternSpec& s) {
    if (s == spec_of(512)) {
      ++builds;
      gate.pass();
    }
    return make_pattern(s);
  });
  std::vector<BlockPattern> got(8);
  std::vector<std::thread> threads;
  for (BlockPattern& p : got) threads.emplace_back([&] { p = cache.get(spec_of(512)); });
  gate.wait_for_one();
  cache.get(spec_of(256));  // would wait for ever if a build held the lock
  cache.get(spec_of(256));
  cache.get(spec_of(512, 0.5));
  EXPECT_EQ(cache.stats().entries, 2u);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  gate.open();
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(builds, 1);
  for (const BlockPattern& p : got) EXPECT_TRUE(same_storage(p, got[0]));
  EXPECT_EQ(got[0], make_pattern(spec_of(512)));
  EXPECT_EQ(cache.stats().misses, 3);
  EXPECT_EQ(cache.stats().hits, 8);
}

// Those that waited get the pattern even if it is too large to be kept. On a busy machine the second may come too late
// to wait, and then makes its own: it gets more chances.
TEST(PatternCacheThreads, WaitersShareWhatIsNotKept) {
  bool shared = false;
  for (int chance = 0; chance < 50 && !shared; ++chance) {
    Gate gate;
    PatternCache cache({.bytes = 0}, [&](const PatternSpec& s) {
      gate.pass();
      return make_pattern(s);
    });
    BlockPattern first, second;
    std::thread a([&] { first = cache.get(spec_of(512)); });
    gate.wait_for_one();
    std::thread b([&] { second = cache.get(spec_of(512)); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    gate.open();
    a.join();
    b.join();
    EXPECT_EQ(first, make_pattern(spec_of(512)));
    EXPECT_EQ(second, first);
    EXPECT_EQ(cache.stats().entries, 0u);
    shared = same_storage(first, second);
    EXPECT_EQ(cache.stats().misses, shared ? 1 : 2);
  }
  EXPECT_TRUE(shared);
}

// The first build throws while others wait: its caller gets the exception, one of them builds, all are served.
TEST(PatternCacheThreads, AfterAFailedBuildTheNextTries) {
  Gate gate;
  std::atomic<int> builds = 0;
  PatternCache cache({}, [&](const PatternSpec& s) {
    if (builds++ == 0) {
      gate.pass();
      throw std::bad_alloc();
    }
    return make_pattern(s);
  });
  std::atomic<int> failed = 0, served = 0;
  const auto ask = [&] {
    try {
      served += cache.get(spec_of(512)).num_blocks() > 0;
    } catch (const std::bad_alloc&) {
      ++failed;
    }
  };
  std::thread unlucky(ask);
  gate.wait_for_one();
  std::vector<std::thread> others;
  for (int i = 0; i < 4; ++i) others.emplace_back(ask);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  gate.open();
  unlucky.join();
  for (std::thread& t : others) t.join();
  EXPECT_EQ(failed, 1);
  EXPECT_EQ(served, 4);
  EXPECT_EQ(builds, 2);
}

TEST(PatternCacheThreads, ABuilderMayAskForOtherSpecs) {
  PatternCache* self = nullptr;
  PatternCache cache({}, [&](const PatternSpec& s) {
    if (s.seqlen_q > 64) {
      PatternSpec half = s;
      half.seqlen_q /= 2;
      self->get(half);
    }
    return make_pattern(s);
  });
  self = &cache;
  cache.get(spec_of(512));
  EXPECT_EQ(cache.stats().misses, 4);  // 512, 256, 128, 64
}

// Everything at once, for ThreadSanitizer: few enough specs to hit, small enough limits to evict, transposed forms that
// grow under the cache's eyes.
TEST(PatternCacheThreads, ManyThreadsDoEverything) {
  PatternCache cache({.bytes = 40000, .entries = 6});
  std::vector<PatternSpec> specs;
  std::vector<BlockPattern> expected;
  for (int64_t n = 0; n < 10; ++n) {
    specs.push_back(spec_of(64 + 64 * n));
    expected.push_back(make_pattern(specs.back()));
  }
  constexpr int kThreads = 4, kCalls = 400;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kCalls; ++i) {
        const size_t n = (i * (2 * t + 1) + i / 7) % specs.size();
        const BlockPattern p = cache.get(specs[n]);
        if (i % 3 == 0) p.transposed();
        if (!(p == expected[n])) ++wrong;
        const int64_t seqlen = 64 + 64 * (i % 10);
        if (i % 50 == 10) cache.warm_up(spec_of(0), {&seqlen, 1});
        if (i % 50 == 20) cache.resize({.bytes = 20000u + 1000u * (i % 30), .entries = 6});
        if (i % 50 == 30) cache.clear();
        const PatternCacheStats s = cache.stats();
        if (s.entries > 6 || s.bytes > 50000) ++wrong;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  const PatternCacheStats s = cache.stats();
  EXPECT_EQ(s.hits + s.misses, kThreads * (kCalls + kCalls / 50));
  cache.clear();
  EXPECT_EQ(cache.stats().bytes, 0u);
}

}  // namespace
}  // namespace tessera
