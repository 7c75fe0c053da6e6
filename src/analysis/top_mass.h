// The most that any n of many masses hold together, without keeping or sorting them.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>

namespace tessera::analysis {

// Masses are counted and summed in bins of one 128th of their size. Sums are integers in steps of 2^-32, so that they
// do not depend on the order in which threads add. Masses: 0..256, the tokens of a row of blocks.
class TopMass {
 public:
  TopMass() : bins_(std::make_unique<Bin[]>(kBins)) {}

  // From any thread.
  void add(double mass) {
    Bin& bin = bins_[std::bit_cast<uint32_t>(static_cast<float>(std::clamp(mass, 0.0, 256.0))) >> kDropped];
    bin.count.fetch_add(1, std::memory_order_relaxed);
    bin.sum.fetch_add(static_cast<uint64_t>(std::llround(mass * kSteps)), std::memory_order_relaxed);
  }
  TopMass& operator+=(const TopMass& other) {
    for (size_t i = 0; i < kBins; ++i) {
      bins_[i].count += other.bins_[i].count;
      bins_[i].sum += other.bins_[i].sum;
    }
    return *this;
  }
  // What the n largest hold; of the bin that only some of them come from at most a 128th too much.
  double largest(int64_t n) const {
    double sum = 0;
    for (size_t i = kBins; i-- > 0 && n > 0;) {
      const int64_t count = static_cast<int64_t>(bins_[i].count.load());
      const double all = static_cast<double>(bins_[i].sum.load()) / kSteps;
      const double edge = std::bit_cast<float>(static_cast<uint32_t>(i + 1) << kDropped);
      sum += n >= count ? all : std::min(all, edge * static_cast<double>(n));
      n -= count;
    }
    return sum;
  }

 private:
  static constexpr int kDropped = 16;  // bits of a float: 7 of the mantissa are left
  static constexpr size_t kBins = (std::bit_cast<uint32_t>(256.0f) >> kDropped) + 1;
  static constexpr double kSteps = 4294967296.0;
  struct Bin {
    std::atomic<uint64_t> count{0}, sum{0};
  };
  std::unique_ptr<Bin[]> bins_;
};

}  // namespace tessera::analysis
