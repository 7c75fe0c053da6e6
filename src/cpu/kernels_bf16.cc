// AVX-512 once more, with the native bf16 dot product (AVX512-BF16), which Highway 1.0 has no target for. A namespace
// of its own keeps its functions apart from those that must run without it.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels_bf16.cc"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"

#if HWY_TARGET == HWY_AVX3
#undef HWY_BEFORE_NAMESPACE
#define HWY_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#define TESSERA_KERNELS N_AVX3_BF16
#define TESSERA_BF16_DOT 1
#include "cpu/table-inl.h"
#undef TESSERA_KERNELS
#undef TESSERA_BF16_DOT
#endif

#if HWY_ONCE
#include "cpu/kernel_table.h"

namespace tessera::cpu {

#if HWY_TARGETS & HWY_AVX3
const KernelTable* kernels_avx512_bf16() { return N_AVX3_BF16::Table(); }
#else
const KernelTable* kernels_avx512_bf16() { return nullptr; }
#endif

}  // namespace tessera::cpu
#endif
