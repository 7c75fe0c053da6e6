// The fp64 oracle.
#pragma once

#include "call/problem.h"

namespace tessera {

// Writes out (out_dtype) and lse (lse_dtype). `out_bound` [B, Sq, H, Dv] and `lse_bound` [B, H, Sq] (contiguous), if
// not null, receive a bound on the rounding error of a kernel that accumulates in fp32 and stores out in the dtype of
// q, derived from epsilon and sum lengths; see ErrorBound in reference.cc.
void reference_attention(const Problem& problem, Executor& executor, float* out_bound = nullptr,
                         float* lse_bound = nullptr);

}  // namespace tessera
