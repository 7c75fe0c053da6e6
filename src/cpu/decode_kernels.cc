// Decode, compiled once for each instruction set (targets-inl.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode_kernels.cc"
#include "cpu/targets-inl.h"

#if TESSERA_TARGET_HAS_KERNELS
#include "cpu/decode_table-inl.h"
#endif

#if HWY_ONCE
namespace tessera::cpu {
template <>
TablesOfTargets<DecodeKernels> tables_of_targets() {
  return TESSERA_TABLES_OF_TARGETS(DecodeKernels);
}
}  // namespace tessera::cpu
#endif
