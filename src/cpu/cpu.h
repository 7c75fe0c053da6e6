// CPU backend: picks the kernel for ISA, dtype and shape, cuts the call into work units and runs them.
#pragma once

#include <span>

#include "call/backward_problem.h"
#include "call/problem.h"

namespace tessera::cpu {

// Runs all problems (several for varlen) as one pool of work units. dtype is f32, bf16 or f16; out_dtype == dtype.
ForwardInfo forward(std::span<const Problem> problems, Isa isa, Executor& executor);

// The same for gradients: dtype f32, bf16 or f16; gradient_dtype f32 or dtype. dblock_bias, dattn_bias and dsinks of
// all problems are written (set to the sum over the problems where they are the same memory). No two problems may write
// to one place of dq, dk or dv.
BackwardInfo backward(std::span<const BackwardProblem> problems, Isa isa, Executor& executor);

}  // namespace tessera::cpu
