// Begins a file that is compiled for AVX-512 once more, with the native bf16 dot product (AVX512-BF16), which Highway
// 1.0 has no target for. A namespace of its own keeps its functions apart from those that must run without it. The
// file names itself in HWY_TARGET_INCLUDE first.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3_DL)
#include "hwy/foreach_target.h"

#include "hwy/highway.h"

#undef TESSERA_KERNELS
#undef TESSERA_BF16_DOT
#undef TESSERA_TARGET_HAS_KERNELS
#define TESSERA_KERNELS N_AVX3_BF16
#define TESSERA_BF16_DOT 1
#define TESSERA_TARGET_HAS_KERNELS (HWY_TARGET == HWY_AVX3)
#if TESSERA_TARGET_HAS_KERNELS
#undef HWY_BEFORE_NAMESPACE
#define HWY_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#endif

#if HWY_ONCE
#include "cpu/kernel_table.h"

#if HWY_TARGETS & HWY_AVX3
#define TESSERA_TABLE_OF_AVX512_BF16(Pass) N_AVX3_BF16::Table(static_cast<const Pass*>(nullptr))
#else
#define TESSERA_TABLE_OF_AVX512_BF16(Pass) nullptr
#endif
#endif
