// The forward pass, compiled once for each instruction set (targets-inl.h).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward_kernels.cc"
#include "cpu/targets-inl.h"

#if TESSERA_TARGET_HAS_KERNELS
#include "cpu/forward_table-inl.h"
#endif

#if HWY_ONCE
namespace tessera::cpu {
template <>
TablesOfTargets<ForwardKernels> tables_of_targets() {
  return TESSERA_TABLES_OF_TARGETS(ForwardKernels);
}
}  // namespace tessera::cpu
#endif
