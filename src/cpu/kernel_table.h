// What one compiled instruction set offers: plain function pointers, filled in the compile unit of each pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "call/problem.h"
#include "call/softmax_state.h"
#include "cpu/backward_state.h"

namespace tessera::cpu {

using RowState = SoftmaxState<float, PowersOf2>;

// Output of a decode unit over part of the keys: unnormalised, relative to its own reference.
struct DecodePartial {
  float* out = nullptr;       // [rows, Dv]
  RowState* state = nullptr;  // [rows]
};

// A decode unit: the query rows of heads [head_begin, head_end) (all of one kv head, or of several that share a
// pattern) over entries [entry_begin, entry_end) of their common pattern row.
struct DecodeUnit {
  int64_t batch = 0, head_begin = 0, head_end = 0;
  int64_t entry_begin = 0, entry_end = 0;
};

// A unit of the forward pass: query block `row` of head h.
struct RowUnit {
  int64_t b = 0, h = 0, row = 0;
};

struct ForwardKernels {
  // One row of blocks: writes its out and lse. `next`, if not null, is the unit that this thread runs after it: what
  // that one reads first is fetched into the cache.
  size_t (*scratch)(const Problem& problem);
  void (*row)(const Problem& problem, const RowUnit& unit, const RowUnit* next, std::byte* scratch);
};

struct DecodeKernels {
  // Sq <= 16: one unit into a partial whose rows are (head - head_begin) * Sq + query. `next` as above.
  size_t (*scratch)(const Problem& problem);
  void (*run)(const Problem& problem, const DecodeUnit& unit, const DecodeUnit* next, const DecodePartial& partial,
              std::byte* scratch);
};

struct BackwardKernels {
  // First delta and lse of block row i of each (b, h); returns its share of the gradient of the head's sink.
  double (*prepare_row)(const BackwardState& state, int64_t b, int64_t h, int64_t i);
  size_t (*scratch)(const BackwardProblem& problem);
  void (*column)(const BackwardState& state, const ColumnUnit& unit, std::byte* scratch);
  void (*attn_bias_gradient)(const BackwardState& state, const BiasUnit& unit, std::byte* scratch);
};

struct PeakKernels {
  // Runs `iterations` rounds of independent FMAs (or bf16 dots) in registers; returns the flops done.
  double (*fma_burn)(int64_t iterations);
  double (*bf16_burn)(int64_t iterations);  // nullptr without the native dot
  // Reads n bytes (a multiple of 1024) and returns something that depends on all of them.
  uint64_t (*read)(const std::byte* data, size_t n);
};

// One instruction set.
struct KernelTable {
  const ForwardKernels* forward = nullptr;
  const DecodeKernels* decode = nullptr;
  const BackwardKernels* backward = nullptr;
  const PeakKernels* peak = nullptr;
};

// The tables of one pass (a compile unit of its own: forward_kernels.cc and so on); nullptr where this build has no
// such target.
template <class Pass>
struct TablesOfTargets {
  const Pass* neon = nullptr;
  const Pass* sse4 = nullptr;
  const Pass* avx2 = nullptr;
  const Pass* avx512 = nullptr;
};
template <class Pass>
TablesOfTargets<Pass> tables_of_targets();
template <class Pass>
const Pass* table_avx512_bf16();

#define TESSERA_DECLARE_TABLES(Pass)         \
  template <>                                \
  TablesOfTargets<Pass> tables_of_targets(); \
  template <>                                \
  const Pass* table_avx512_bf16();
TESSERA_DECLARE_TABLES(ForwardKernels)
TESSERA_DECLARE_TABLES(DecodeKernels)
TESSERA_DECLARE_TABLES(BackwardKernels)
TESSERA_DECLARE_TABLES(PeakKernels)
#undef TESSERA_DECLARE_TABLES

}  // namespace tessera::cpu
