// From an Isa to its kernels: the only switch on instruction sets.
#pragma once

#include "cpu/kernel_table.h"

namespace tessera::cpu {

// The best usable one for `automatic`; Error when this CPU or build lacks the one asked for.
Isa resolve_isa(Isa isa);

// Of an ISA that resolve_isa returned.
const KernelTable& kernels_of(Isa isa);

}  // namespace tessera::cpu
