// Compiled with -fopenmp, as at::parallel_for is a pragma in a header; linked to no OpenMP runtime but torch's.
#include "executor.h"

#include <ATen/Parallel.h>

namespace tessera::ops {

namespace {

class TorchThreads final : public Executor {
 public:
  int num_threads() const override { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
  void run(int n, const std::function<void(int)>& worker) override {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) worker(static_cast<int>(i));
    });
  }
};

}  // namespace

Executor& torch_threads() {
  static TorchThreads threads;
  return threads;
}

}  // namespace tessera::ops
