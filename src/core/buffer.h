// Memory of a call: scratch, partial results, sums in a wider dtype.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "tessera/error.h"
#include "tessera/huge_pages.h"

namespace tessera {

// Uninitialised bytes, aligned for any kernel and, where they are many, to a huge page.
class Buffer {
 public:
  static constexpr size_t kAlign = 2 * kCacheLine;

  Buffer() = default;
  Buffer(size_t bytes, const char* what) : size_(bytes) {
    if (bytes == 0) return;
    const auto align = std::align_val_t(std::max(kAlign, alignment_for(bytes)));
    data_ = {static_cast<std::byte*>(::operator new(bytes, align, std::nothrow)), Free{align}};
    if (data_ == nullptr) throw OutOfMemory(bytes, what);
    advise_huge_pages(data_.get(), bytes);
#ifndef NDEBUG
    std::memset(data_.get(), 0xff, bytes);  // NaN in every dtype: what is read unwritten shows
#endif
  }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  size_t size() const { return size_; }

 private:
  struct Free {
    std::align_val_t align;
    void operator()(std::byte* p) const { ::operator delete(p, align); }
  };
  std::unique_ptr<std::byte, Free> data_{nullptr, Free{}};
  size_t size_ = 0;
};

}  // namespace tessera
