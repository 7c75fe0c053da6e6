// What this machine can do at best, measured with the instruction set and the threads of the kernels: what speeds are
// judged against.
#pragma once

#include "tessera/attention.h"
#include "tessera/executor.h"

namespace tessera {

// Peaks of all threads together, each the best of several runs of some milliseconds.
struct Peaks {
  double fma_gflops = 0;              // fp32 FMA of the instruction set, 2 flops each
  double bf16_dot_gflops = 0;         // native bf16 dot product, 4 flops a pair; 0 where the instruction set has none
  double read_gbytes_per_second = 0;  // reading a buffer far larger than the caches; 0 unless asked for

  // Of the units that the kernels multiply `dtype` with: the bf16 dot product where it is native, FMA elsewhere.
  double gflops(DType dtype) const {
    return dtype == DType::bf16 && bf16_dot_gflops > 0 ? bf16_dot_gflops : fma_gflops;
  }
};

// `threads` (at most the executor's) run at the same time. Error for an instruction set that this CPU lacks.
Peaks measure_peaks(Isa isa, int threads, Executor& executor, bool with_read_bandwidth);

}  // namespace tessera
