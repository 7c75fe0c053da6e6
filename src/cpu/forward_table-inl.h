// The forward pass of one instruction set as a table.
#if defined(TESSERA_CPU_FORWARD_TABLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_FORWARD_TABLE_INL_H_
#undef TESSERA_CPU_FORWARD_TABLE_INL_H_
#else
#define TESSERA_CPU_FORWARD_TABLE_INL_H_
#endif

#include "cpu/forward-inl.h"
#include "cpu/unit-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

size_t ForwardScratch(const Problem& p) {
  size_t bytes = 0;
#define TESSERA_CALL(T) bytes = RowKernel<T>::ScratchBytes(p)
  TESSERA_BY_DTYPE(p, TESSERA_CALL)
#undef TESSERA_CALL
  return bytes;
}

void ForwardRow(const Problem& p, const RowUnit& unit, const RowUnit* next, std::byte* memory) {
  const UnitScope scope;
  Scratch scratch(memory);
#define TESSERA_CALL(T) RowKernel<T>(p, unit, scratch).Run(next)
  TESSERA_BY_DTYPE(p, TESSERA_CALL)
#undef TESSERA_CALL
}

const ForwardKernels* Table(const ForwardKernels*) {
  static constexpr ForwardKernels table{.scratch = ForwardScratch, .row = ForwardRow};
  return &table;
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
