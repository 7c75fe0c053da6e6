#include "core/growing_memory.h"

#include <sys/mman.h>

#include <new>

namespace tessera {

namespace {
constexpr size_t kPage = 4096;
}

GrowingMemory::~GrowingMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

void GrowingMemory::grow(size_t bytes) {
  if (bytes <= size_) return;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  void* p = data_ == nullptr ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                             : mremap(data_, size_, bytes, MREMAP_MAYMOVE);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(p);
  size_ = bytes;
}

}  // namespace tessera
