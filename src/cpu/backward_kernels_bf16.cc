// The backward pass, compiled for AVX-512 with the native bf16 dot product (targets_bf16-inl.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_kernels_bf16.cc"
#include "cpu/targets_bf16-inl.h"

#if TESSERA_TARGET_HAS_KERNELS
#include "cpu/backward_table-inl.h"
#endif

#if HWY_ONCE
namespace tessera::cpu {
template <>
const BackwardKernels* table_avx512_bf16() {
  return TESSERA_TABLE_OF_AVX512_BF16(BackwardKernels);
}
}  // namespace tessera::cpu
#endif
