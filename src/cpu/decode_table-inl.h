// Decode of one instruction set as a table.
#if defined(TESSERA_CPU_DECODE_TABLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_DECODE_TABLE_INL_H_
#undef TESSERA_CPU_DECODE_TABLE_INL_H_
#else
#define TESSERA_CPU_DECODE_TABLE_INL_H_
#endif

#include "cpu/decode-inl.h"
#include "cpu/unit-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

size_t DecodeScratch(const Problem& p) {
  size_t bytes = 0;
#define TESSERA_CALL(T) bytes = DecodeKernel<T>::ScratchBytes(p)
  TESSERA_BY_DTYPE(p, TESSERA_CALL)
#undef TESSERA_CALL
  return bytes;
}

void Decode(const Problem& p, const DecodeUnit& unit, const DecodeUnit* next, const DecodePartial& partial,
            std::byte* memory) {
  const UnitScope scope;
  Scratch scratch(memory);
#define TESSERA_CALL(T) DecodeKernel<T>(p, unit, partial, scratch).Run(next)
  TESSERA_BY_DTYPE(p, TESSERA_CALL)
#undef TESSERA_CALL
}

const DecodeKernels* Table(const DecodeKernels*) {
  static constexpr DecodeKernels table{.scratch = DecodeScratch, .run = Decode};
  return &table;
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
