#include "result_memory.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "tessera/huge_pages.h"

namespace tessera::ops {

namespace {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

// Freed blocks, the newest last. Nobody waits for it: who finds it taken (in a child forked at that moment it stays so
// for ever) does without.
class KeptBlocks {
 public:
  // The newest block that fits and does not waste more than a quarter; nullptr without one.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    for (auto it = blocks_.rbegin(); it != blocks_.rend(); ++it) {
      if (it->bytes < bytes || it->bytes - bytes > it->bytes / 4) continue;
      const Block found = *it;
      blocks_.erase(std::next(it).base());
      kept_ -= found.bytes;
      return found;
    }
    return {};
  }
  void give(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(block.data);
    blocks_.push_back(block);
    kept_ += block.bytes;
    while (kept_ > kKeptResultBytes) {
      kept_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }
  void clear() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    kept_ = 0;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

KeptBlocks& kept_blocks() {
  static auto* blocks = new KeptBlocks;  // tensors may outlive every static object
  return *blocks;
}

void release(void* block) {
  const Block freed = *static_cast<Block*>(block);
  delete static_cast<Block*>(block);
  c10::profiledCPUMemoryReporter().Delete(freed.data);
  kept_blocks().give(freed);
}

Block fresh(size_t bytes) {
  Block block{nullptr, bytes};
  if (posix_memalign(&block.data, alignment_for(bytes), bytes) != 0) {
    kept_blocks().clear();
    if (posix_memalign(&block.data, alignment_for(bytes), bytes) != 0) return {};
  }
  advise_huge_pages(block.data, bytes);
  return block;
}

class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kHugeArray) return c10::GetCPUAllocator()->allocate(bytes);
    Block block = kept_blocks().take(bytes);
    if (block.data == nullptr) block = fresh(bytes);
    if (block.data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);  // says so in torch's own words
    c10::profiledCPUMemoryReporter().New(block.data, bytes);
    return {block.data, new Block(block), &release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static auto* allocator = new ResultAllocator;
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   at::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace tessera::ops
