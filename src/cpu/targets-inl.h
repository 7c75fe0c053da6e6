// Begins a file that is compiled once for each instruction set that Highway knows. The file names itself in
// HWY_TARGET_INCLUDE first; what it holds for one instruction set lies in namespace TESSERA_KERNELS.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include "hwy/foreach_target.h"

#include "hwy/highway.h"

#undef TESSERA_KERNELS
#undef TESSERA_BF16_DOT
#undef TESSERA_TARGET_HAS_KERNELS
#define TESSERA_KERNELS HWY_NAMESPACE
#define TESSERA_BF16_DOT 0
// Highway insists on its baseline, which is scalar code on x86-64 and no instruction set of ours.
#define TESSERA_TARGET_HAS_KERNELS (HWY_TARGET & (HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | HWY_NEON))

#if HWY_ONCE
#include "cpu/kernel_table.h"

// Table() of each namespace; nullptr where this build has no such target.
#define TESSERA_TABLE_OF(target, Pass) target::Table(static_cast<const Pass*>(nullptr))
#if HWY_TARGETS & HWY_NEON
#define TESSERA_TABLE_OF_NEON(Pass) TESSERA_TABLE_OF(N_NEON, Pass)
#else
#define TESSERA_TABLE_OF_NEON(Pass) nullptr
#endif
#if HWY_TARGETS & HWY_SSE4
#define TESSERA_TABLE_OF_SSE4(Pass) TESSERA_TABLE_OF(N_SSE4, Pass)
#else
#define TESSERA_TABLE_OF_SSE4(Pass) nullptr
#endif
#if HWY_TARGETS & HWY_AVX2
#define TESSERA_TABLE_OF_AVX2(Pass) TESSERA_TABLE_OF(N_AVX2, Pass)
#else
#define TESSERA_TABLE_OF_AVX2(Pass) nullptr
#endif
#if HWY_TARGETS & HWY_AVX3
#define TESSERA_TABLE_OF_AVX512(Pass) TESSERA_TABLE_OF(N_AVX3, Pass)
#else
#define TESSERA_TABLE_OF_AVX512(Pass) nullptr
#endif
#define TESSERA_TABLES_OF_TARGETS(Pass) \
  {.neon = TESSERA_TABLE_OF_NEON(Pass), \
   .sse4 = TESSERA_TABLE_OF_SSE4(Pass), \
   .avx2 = TESSERA_TABLE_OF_AVX2(Pass), \
   .avx512 = TESSERA_TABLE_OF_AVX512(Pass)}
#endif
