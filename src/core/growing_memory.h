// Memory that grows in place or moves without copying: its pages of the address space are moved instead.
#pragma once

#include <cstddef>
#include <utility>

namespace tessera {

class GrowingMemory {
 public:
  GrowingMemory() = default;
  ~GrowingMemory();
  GrowingMemory(GrowingMemory&& other) noexcept { swap(other); }
  GrowingMemory& operator=(GrowingMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  // At least so many bytes; what is new is zero. Error "memory", with the old memory as it was.
  void grow(size_t bytes);
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(GrowingMemory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tessera
