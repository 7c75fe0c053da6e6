// What this machine can do at best, measured with the same threads and instruction set as the kernels.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "tessera/machine.h"

#include "cpu/isa.h"
#include "tessera/huge_pages.h"

namespace tessera {

namespace {

constexpr int kRounds = 7;                        // the best one counts
constexpr double kRoundSeconds = 0.008;           // long against timers, short against a neighbour's time slice
constexpr size_t kReadBytes = size_t{192} << 20;  // beyond any last-level cache that two cores would own

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Sum over the threads of flops / second in the best round; threads start together.
double burn_gflops(double (*burn)(int64_t), int threads, Executor& executor) {
  double start = now();
  burn(20000);
  const int64_t iterations = static_cast<int64_t>(20000 * kRoundSeconds / std::max(now() - start, 1e-6)) + 1;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> rate(threads, 0.0);
    std::atomic<int> arrived{0};
    executor.run(threads, [&](int i) {
      arrived.fetch_add(1);
      // An executor may run its workers one after the other: do not wait for ever.
      for (int spin = 0; spin < 100000 && arrived.load() < threads; ++spin) {
      }
      const double begin = now();
      const double flops = burn(iterations);
      rate[i] = flops / (now() - begin);
    });
    double sum = 0;
    for (double r : rate) sum += r;
    best = std::max(best, sum / 1e9);
  }
  return best;
}

double read_gbytes(const cpu::PeakKernels& kernels, int threads, Executor& executor) {
  const size_t share = kReadBytes / threads / 1024 * 1024;
  std::vector<std::unique_ptr<std::byte[]>> data(threads);
  executor.run(threads, [&](int i) {
    data[i] = std::make_unique_for_overwrite<std::byte[]>(share);
    advise_huge_pages(data[i].get(), share);          // as Tensor does
    std::fill_n(data[i].get(), share, std::byte{1});  // pages exist only once they are written
  });
  double best = 0;
  std::atomic<uint64_t> keep{0};
  for (int round = 0; round < kRounds; ++round) {
    const double begin = now();
    executor.run(threads, [&](int i) { keep.fetch_add(kernels.read(data[i].get(), share)); });
    best = std::max(best, static_cast<double>(share) * threads / (now() - begin) / 1e9);
  }
  return best;
}

}  // namespace

Peaks measure_peaks(Isa isa, int threads, Executor& executor, bool with_read_bandwidth) {
  const cpu::PeakKernels& kernels = *cpu::kernels_of(cpu::resolve_isa(isa, cpu::Bound::compute)).peak;
  threads = std::clamp(threads, 1, std::max(1, executor.num_threads()));
  Peaks peaks;
  peaks.fma_gflops = burn_gflops(kernels.fma_burn, threads, executor);
  if (kernels.bf16_burn) peaks.bf16_dot_gflops = burn_gflops(kernels.bf16_burn, threads, executor);
  if (with_read_bandwidth) peaks.read_gbytes_per_second = read_gbytes(kernels, threads, executor);
  return peaks;
}

}  // namespace tessera
