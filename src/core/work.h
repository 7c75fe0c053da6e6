// Units of work taken one by one by the threads of an executor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "tessera/executor.h"

namespace tessera {

// Calls work(state, unit) for each unit 0 .. units - 1, on any thread in any order; each thread has a state of its own,
// made by make(). An exception (out of memory) is rethrown on the calling thread when all have stopped.
template <class Make, class Work>
void parallel_for(Executor& executor, int64_t units, Make make, Work work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const int threads = static_cast<int>(std::clamp<int64_t>(units, 1, executor.num_threads()));
  executor.run(threads, [&](int) {
    try {
      auto state = make();
      for (int64_t unit; !failed && (unit = next.fetch_add(1)) < units;) work(state, unit);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace tessera
