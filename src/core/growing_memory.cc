#include "core/growing_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <string>

#include "tessera/error.h"
#include "tessera/huge_pages.h"

namespace tessera {

namespace {

constexpr size_t kPage = 4096;

char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw OutOfMemory(bytes, "a cache");
  return static_cast<char*>(p);
}

// Addresses for so many bytes that begin at a huge page.
char* reserve_aligned(size_t bytes) {
  char* p = reserve(bytes + kHugePage);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(p) % kHugePage) % kHugePage;
  if (before > 0) munmap(p, before);
  munmap(p + before + bytes, kHugePage - before);
  return p + before;
}

}  // namespace

GrowingMemory::~GrowingMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

void GrowingMemory::grow(size_t bytes) {
  if (bytes <= size_) return;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  // What is large lies on huge pages, and stays on them when it moves if it begins at one.
  const bool large = bytes >= kHugeArray;
  const bool in_place = data_ != nullptr && (!large || reinterpret_cast<uintptr_t>(data_) % kHugePage == 0) &&
                        mremap(data_, size_, bytes, 0) != MAP_FAILED;
  if (!in_place) {
    char* to = large ? reserve_aligned(bytes) : reserve(bytes);
    const bool made = data_ == nullptr ? mprotect(to, bytes, PROT_READ | PROT_WRITE) == 0
                                       : mremap(data_, size_, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED;
    if (!made) {
      munmap(to, bytes);
      throw OutOfMemory(bytes, "a cache");
    }
    data_ = to;
  }
  size_ = bytes;
  advise_huge_pages(data_, bytes);
}

}  // namespace tessera
