// All instruction sets that Highway knows, from one source: this file is compiled once for each of them.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cc"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"

#define TESSERA_KERNELS HWY_NAMESPACE
#define TESSERA_BF16_DOT 0
// Highway insists on its baseline, which is scalar code on x86-64 and no instruction set of ours.
#if HWY_TARGET & (HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | HWY_NEON)
#include "cpu/table-inl.h"
#endif
#undef TESSERA_KERNELS
#undef TESSERA_BF16_DOT

#if HWY_ONCE
namespace tessera::cpu {

#if HWY_TARGETS & HWY_SSE4
const KernelTable* kernels_sse4() { return N_SSE4::Table(); }
#else
const KernelTable* kernels_sse4() { return nullptr; }
#endif

#if HWY_TARGETS & HWY_AVX2
const KernelTable* kernels_avx2() { return N_AVX2::Table(); }
#else
const KernelTable* kernels_avx2() { return nullptr; }
#endif

#if HWY_TARGETS & HWY_AVX3
const KernelTable* kernels_avx512() { return N_AVX3::Table(); }
#else
const KernelTable* kernels_avx512() { return nullptr; }
#endif

#if HWY_TARGETS & HWY_NEON
const KernelTable* kernels_neon() { return N_NEON::Table(); }
#else
const KernelTable* kernels_neon() { return nullptr; }
#endif

}  // namespace tessera::cpu
#endif
