// The fp64 oracle.
#pragma once

#include "attention/problem.h"

namespace tessera {

// Writes out (out_dtype) and lse (lse_dtype). `bound`, if not null, receives for each out element [B, Sq, H, Dv]
// (contiguous) a bound on the rounding error of an fp32-accumulating kernel, derived from epsilon and sum lengths.
void reference_attention(const Problem& problem, Executor& executor, float* bound = nullptr);

}  // namespace tessera
