// The backward pass of one instruction set as a table.
#if defined(TESSERA_CPU_BACKWARD_TABLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TESSERA_CPU_BACKWARD_TABLE_INL_H_
#undef TESSERA_CPU_BACKWARD_TABLE_INL_H_
#else
#define TESSERA_CPU_BACKWARD_TABLE_INL_H_
#endif

#include "cpu/backward-inl.h"
#include "cpu/unit-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tessera::cpu::TESSERA_KERNELS {

double BackwardPrepare(const BackwardState& state, int64_t b, int64_t h, int64_t i) {
  const UnitScope scope;
  double sink = 0;
#define TESSERA_CALL(T) sink = PrepareRow<T>(state, b, h, i)
  TESSERA_BY_DTYPE(state.problem->forward, TESSERA_CALL)
#undef TESSERA_CALL
  return sink;
}

size_t BackwardScratch(const BackwardProblem& g) {
  size_t bytes = 0;
#define TESSERA_CALL(T) \
  bytes = std::max(ColumnKernel<T>::ScratchBytes(g), g.dattn_bias ? AttnBiasKernel<T>::ScratchBytes(g) : size_t{0})
  TESSERA_BY_DTYPE(g.forward, TESSERA_CALL)
#undef TESSERA_CALL
  return bytes;
}

void BackwardColumn(const BackwardState& state, const ColumnUnit& unit, std::byte* memory) {
  const UnitScope scope;
  Scratch scratch(memory);
#define TESSERA_CALL(T) ColumnKernel<T>(state, unit, scratch).Run()
  TESSERA_BY_DTYPE(state.problem->forward, TESSERA_CALL)
#undef TESSERA_CALL
}

void AttnBiasGradient(const BackwardState& state, const BiasUnit& unit, std::byte* memory) {
  const UnitScope scope;
  Scratch scratch(memory);
#define TESSERA_CALL(T) AttnBiasKernel<T>(state, unit, scratch).Run()
  TESSERA_BY_DTYPE(state.problem->forward, TESSERA_CALL)
#undef TESSERA_CALL
}

const BackwardKernels* Table(const BackwardKernels*) {
  static constexpr BackwardKernels table{.prepare_row = BackwardPrepare,
                                         .scratch = BackwardScratch,
                                         .column = BackwardColumn,
                                         .attn_bias_gradient = AttnBiasGradient};
  return &table;
}

}  // namespace tessera::cpu::TESSERA_KERNELS
HWY_AFTER_NAMESPACE();
#endif
