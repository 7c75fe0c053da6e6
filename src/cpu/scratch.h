// Cuts one allocation into aligned arrays; with a null base it only counts, so that the size and the cutting are
// the same code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tessera::cpu {

class Scratch {
 public:
  static constexpr size_t kAlign = 128;

  explicit Scratch(std::byte* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

}  // namespace tessera::cpu
