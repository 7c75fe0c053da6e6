// Memory of a call that grows with its tensors: partial results, fp32 gradients.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "tessera/error.h"
#include "tessera/huge_pages.h"

namespace tessera {

struct LargeFree {
  size_t align = kCacheLine;
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(align)); }
};

// Uninitialised bytes, aligned to a cache line or, where they are many, to a huge page.
class LargeBuffer {
 public:
  LargeBuffer() = default;
  LargeBuffer(size_t bytes, const char* what) : size_(bytes) {
    if (bytes == 0) return;
    const size_t align = alignment_for(bytes);
    data_ = {static_cast<char*>(::operator new(bytes, std::align_val_t(align), std::nothrow)), LargeFree{align}};
    if (data_ == nullptr) {
      throw Error("memory", "memory: could not allocate " + std::to_string(bytes) + " bytes of " + what);
    }
    advise_huge_pages(data_.get(), bytes);
#ifndef NDEBUG
    std::memset(data_.get(), 0xff, bytes);  // NaN in every dtype: what is read unwritten shows
#endif
  }
  char* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<char, LargeFree> data_;
  size_t size_ = 0;
};

}  // namespace tessera
