// Where Tessera's threads come from: the caller hands in an Executor; the library starts no threads of its own
// unless asked for a ThreadPool.
#pragma once

#include <functional>
#include <memory>

namespace tessera {

// run(n, worker) calls worker(0) .. worker(n - 1), each exactly once, possibly at the same time on different
// threads, and returns when all have returned. n <= num_threads(). Workers do not throw.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int num_threads() const = 0;
  virtual void run(int n, const std::function<void(int)>& worker) = 0;
};

// Runs everything on the calling thread.
class InlineExecutor final : public Executor {
 public:
  int num_threads() const override { return 1; }
  void run(int n, const std::function<void(int)>& worker) override {
    for (int i = 0; i < n; ++i) worker(i);
  }
};

// A small fixed pool; the calling thread is one of its threads. run() from several threads at once is safe (the
// calls take turns). A worker must not call run() of the same pool.
class ThreadPool final : public Executor {
 public:
  explicit ThreadPool(int num_threads);  // 0: the number of CPUs this process may use
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int num_threads() const override;
  void run(int n, const std::function<void(int)>& worker) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Number of CPUs this process may run on (its affinity mask), at least 1.
int available_cpus();

}  // namespace tessera
