// Memory of what operators return.
#pragma once

#include <ATen/core/Tensor.h>

namespace tessera::ops {

// Uninitialised, on the CPU. A large one lies on huge pages, and what is freed of such memory is kept for the next
// result, up to kKeptResultBytes: at 4096 tokens, 8 heads, D = 64 the page faults of fresh results would cost a tenth
// of a forward and backward pass.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

inline constexpr size_t kKeptResultBytes = size_t{64} << 20;  // as much as glibc's malloc may keep

}  // namespace tessera::ops
