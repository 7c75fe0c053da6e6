// From an Isa to its kernels: the only switch on instruction sets.
#pragma once

#include <span>

#include "cpu/kernel_table.h"

namespace tessera::cpu {

// What limits a kernel: decode waits for memory, everything else for the multipliers.
enum class Bound : uint8_t { compute, memory };

// The best usable one for `automatic`; Error when this CPU or build lacks the one asked for.
Isa resolve_isa(Isa isa, Bound bound);

// Which of the usable ones (worst first) `automatic` is. `dot_is_slow`: the native bf16 dot has fewer flops than the
// FMA; what is bound by compute then converts bf16 to fp32 instead.
Isa automatic_of(std::span<const Isa> usable, Bound bound, bool dot_is_slow);

// Of an ISA that resolve_isa returned.
const KernelTable& kernels_of(Isa isa);

}  // namespace tessera::cpu
