// ThreadPool: fixed threads, one signal word a thread.
//
// A call sets the signal of each thread it wants; the thread claims its worker by an exchange, so the caller may claim
// the workers of threads that have not woken up yet once its own is done: a call never waits for a thread to wake.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <sched.h>

#include "core/fork.h"
#include "tessera/error.h"
#include "tessera/executor.h"

namespace tessera {
namespace {

constexpr int kMaxThreads = 1024;
// Pauses before a thread sleeps: tens of microseconds, as long as a futex wake-up takes, so that the calls of a layer
// in a row find the threads awake and an idle pool costs nothing.
constexpr int kSpins = 2000;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

enum Signal : int { kIdle, kWork, kExit };

void wait_while(const std::atomic<int>& word, int value, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (word.load(std::memory_order_acquire) != value) return;
    pause_cpu();
  }
  word.wait(value, std::memory_order_acquire);
}

}  // namespace

struct ThreadPool::State final : ForkAware {
  struct alignas(64) Slot {
    std::atomic<int> signal{kIdle};
  };

  std::vector<std::thread> threads;  // thread i - 1 is the one of slot i
  std::vector<Slot> slots;           // slot 0 is the caller's, unused
  int spins = 0;
  std::mutex turn;  // held by the one call that is running
  const std::function<void(int)>* worker = nullptr;
  alignas(64) std::atomic<int> running{0};  // workers not finished yet, the caller's own not counted
  std::mutex error_mutex;
  std::exception_ptr error;

  bool lost_threads = false;  // in a child of fork(), until the first call there

  explicit State(int n) : slots(static_cast<size_t>(n)) {}

  // A call may be running for long, and fork() must not wait for it: the child forgets it, and starts threads of its
  // own when it calls.
  void before_fork() override {}
  void after_fork_in_parent() override {}
  void after_fork_in_child() override {
    std::construct_at(&turn);  // whoever held them is not there
    std::construct_at(&error_mutex);
    for (Slot& slot : slots) slot.signal.store(kIdle, std::memory_order_relaxed);
    running.store(0, std::memory_order_relaxed);
    for (std::thread& t : threads) t.detach();  // joining would wait for ever
    threads.clear();
    lost_threads = true;
  }

  // Throws std::system_error where the system starts no more; those that run stay.
  void start() {
    threads.reserve(slots.size() - 1);
    for (int i = static_cast<int>(threads.size()) + 1; i < static_cast<int>(slots.size()); ++i) {
      threads.emplace_back([this, i] { loop(i); });
    }
  }
  // Whatever cannot be started is done by the caller, who claims all workers that nobody takes.
  void start_again() noexcept {
    lost_threads = false;
    try {
      start();
    } catch (...) {
    }
  }

  // Workers are not to throw, but where one does (out of memory) the caller gets it instead of std::terminate.
  void call(int i) {
    try {
      (*worker)(i);
    } catch (...) {
      std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  bool claim_and_call(int i) {
    int expected = kWork;
    if (!slots[i].signal.compare_exchange_strong(expected, kIdle, std::memory_order_acq_rel)) return false;
    call(i);
    if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) running.notify_one();
    return true;
  }

  void loop(int i) {
    while (true) {
      wait_while(slots[i].signal, kIdle, spins);
      if (!claim_and_call(i) && slots[i].signal.load(std::memory_order_acquire) == kExit) return;
    }
  }

  void stop() {
    for (size_t i = 1; i <= threads.size(); ++i) {
      slots[i].signal.store(kExit, std::memory_order_release);
      slots[i].signal.notify_one();
    }
    for (std::thread& t : threads) t.join();
  }

  const ForkRegistration registration{this};
};

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 0 || num_threads > kMaxThreads) {
    fail("num_threads", std::to_string(num_threads), "0 (all CPUs) to " + std::to_string(kMaxThreads));
  }
  const int cpus = available_cpus();
  const int n = num_threads == 0 ? std::min(cpus, kMaxThreads) : num_threads;
  state_ = std::make_unique<State>(n);
  state_->spins = n <= cpus ? kSpins : 0;  // more threads than CPUs: spinning would take the CPU from those at work
  try {
    state_->start();
  } catch (const std::system_error& e) {
    const std::string started = std::to_string(state_->threads.size() + 1);
    state_->stop();
    fail("num_threads", std::to_string(n), "as many as the system lets start (" + started + "): " + e.what());
  }
}

ThreadPool::~ThreadPool() { state_->stop(); }

int ThreadPool::num_threads() const { return static_cast<int>(state_->slots.size()); }

void ThreadPool::run(int n, const std::function<void(int)>& worker) {
  if (n < 0 || n > num_threads()) fail("n", std::to_string(n), "0 to num_threads() = " + std::to_string(num_threads()));
  if (n == 0) return;
  State& s = *state_;
  std::lock_guard turn(s.turn);
  if (s.lost_threads) s.start_again();
  s.worker = &worker;
  s.error = nullptr;
  s.running.store(n - 1, std::memory_order_relaxed);
  for (int i = 1; i < n; ++i) {
    s.slots[i].signal.store(kWork, std::memory_order_release);
    s.slots[i].signal.notify_one();
  }
  s.call(0);
  for (int i = 1; i < n; ++i) s.claim_and_call(i);
  for (int left = s.running.load(std::memory_order_acquire); left != 0;
       left = s.running.load(std::memory_order_acquire)) {
    wait_while(s.running, left, s.spins);
  }
  if (s.error) std::rethrow_exception(s.error);
}

int available_cpus() {
  // The kernel's mask may be wider than the 1024 CPUs of a cpu_set_t.
  for (int cpus = CPU_SETSIZE; cpus <= 1 << 20; cpus *= 4) {
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (set == nullptr) break;
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    const int count = ok ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (ok) return std::max(count, 1);
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace tessera
