// The forward pass, compiled for AVX-512 with the native bf16 dot product (targets_bf16-inl.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward_kernels_bf16.cc"
#include "cpu/targets_bf16-inl.h"

#if TESSERA_TARGET_HAS_KERNELS
#include "cpu/forward_table-inl.h"
#endif

#if HWY_ONCE
namespace tessera::cpu {
template <>
const ForwardKernels* table_avx512_bf16() {
  return TESSERA_TABLE_OF_AVX512_BF16(ForwardKernels);
}
}  // namespace tessera::cpu
#endif
