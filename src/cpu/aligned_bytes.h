// Memory for scratch and partial results.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "cpu/scratch.h"
#include "tessera/error.h"

namespace tessera::cpu {

struct AlignedFree {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(Scratch::kAlign)); }
};
using AlignedBytes = std::unique_ptr<std::byte, AlignedFree>;

inline AlignedBytes allocate(size_t bytes, const char* what) {
  void* p = ::operator new(std::max<size_t>(bytes, 1), std::align_val_t(Scratch::kAlign), std::nothrow);
  if (p == nullptr) {
    throw Error("memory", "memory: could not allocate " + std::to_string(bytes) + " bytes of " + what);
  }
#ifndef NDEBUG
  std::memset(p, 0xff, bytes);  // NaN in every dtype: a kernel that reads what it has not written shows it
#endif
  return AlignedBytes(static_cast<std::byte*>(p));
}

}  // namespace tessera::cpu
