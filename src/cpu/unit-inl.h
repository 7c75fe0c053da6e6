// What a thread does around each unit of work, and the switch on the dtype of a call.
#if defined(TESSERA_CPU_UNIT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_UNIT_INL_H_
#undef TESSERA_CPU_UNIT_INL_H_
#else
#define TESSERA_CPU_UNIT_INL_H_
#endif

#include "core/float_mode.h"
#include "cpu/kernel_table.h"
#include "cpu/vecmath-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

// Lives while a thread runs one unit: the state of the processor that the kernels want, and that others get back.
class UnitScope {
  const FlushSubnormals flush_;
};

// The only switch on dtype.
#define TESSERA_BY_DTYPE(problem, CALL)      \
  switch ((problem).dtype) {                 \
    case DType::bf16: CALL(bfloat16); break; \
    case DType::f16: CALL(float16); break;   \
    default: CALL(float); break;             \
  }

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
