// Units of work, taken by the threads of an executor: who has finished one takes the next.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <utility>
#include <vector>

#include "tessera/executor.h"

namespace tessera {

// Units begin .. end - 1, each taken once. Copied only while nobody takes.
class Units {
 public:
  explicit Units(int64_t end, int64_t begin = 0) : next_(begin), end_(end) {}
  Units(const Units& other) : next_(other.next_.load()), end_(other.end_) {}
  Units& operator=(const Units& other) {
    next_ = other.next_.load();
    end_ = other.end_;
    return *this;
  }

  int64_t left() const { return end_ - next_.load(std::memory_order_relaxed); }  // <= 0: none
  // How many of them one of `threads` threads takes at once: a few, fewer towards the end.
  int64_t share(int threads) const { return std::clamp<int64_t>(left() / (int64_t{8} * threads), 1, 8); }
  // Takes up to `count` units; false when none is left.
  bool take(int64_t count, int64_t* begin, int64_t* end) {
    *begin = next_.fetch_add(count, std::memory_order_relaxed);
    *end = std::min(end_, *begin + count);
    return *begin < end_;
  }
  // Calls work(unit) for all that this thread can take, one at a time.
  template <class Work>
  void drain(const Work& work) {
    for (int64_t unit, end; take(1, &unit, &end);) work(unit);
  }

 private:
  std::atomic<int64_t> next_;
  int64_t end_;
};

// How many threads a call on so many units uses.
inline int threads_for(const Executor& executor, int64_t units) {
  return static_cast<int>(std::clamp<int64_t>(units, 1, std::max(1, executor.num_threads())));
}

// Calls work(state, unit) for each unit 0 .. units - 1, on any thread in any order; each of the threads_for() threads
// has a state of its own, made by make(thread). Work that takes a third argument is told whether unit + 1 runs next on
// this thread: threads then take several units at once. An exception (out of memory) is rethrown on the calling thread
// when all have stopped.
template <class Make, class Work>
void parallel_for(Executor& executor, int64_t units, Make make, Work work) {
  constexpr bool kTold = std::is_invocable_v<Work&, decltype(make(0))&, int64_t, bool>;
  if (units <= 0) return;
  const int threads = threads_for(executor, units);
  Units queue(units);
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  executor.run(threads, [&](int thread) {
    try {
      auto state = make(thread);
      for (int64_t unit, end; !failed && queue.take(kTold ? queue.share(threads) : 1, &unit, &end);) {
        if constexpr (kTold) {
          for (; unit < end; ++unit) work(state, unit, unit + 1 < end);
        } else {
          work(state, unit);
        }
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The same without states: work(unit).
template <class Work>
void parallel_for(Executor& executor, int64_t units, Work work) {
  parallel_for(executor, units, [](int) { return 0; }, [&](int, int64_t unit) { work(unit); });
}

// The units of several problems, numbered one problem after the other.
class UnitRanges {
 public:
  void add(int64_t units) { begin_.push_back(begin_.back() + units); }
  int64_t units() const { return begin_.back(); }
  // The problem that a unit belongs to, and its number there.
  std::pair<size_t, int64_t> find(int64_t unit) const {
    const auto next = std::upper_bound(begin_.begin(), begin_.end(), unit);
    return {next - begin_.begin() - 1, unit - *(next - 1)};
  }

 private:
  std::vector<int64_t> begin_{0};
};

}  // namespace tessera
