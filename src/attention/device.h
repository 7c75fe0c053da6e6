// The device switch: where resolved calls go to be computed.
#pragma once

#include <span>

#include "call/backward_problem.h"
#include "call/problem.h"

namespace tessera {

// Several problems are one call whose work is shared by all threads; all have the dtype `dtype`, and no two write to
// one place. fp64: the reference kernel, with Isa::automatic only.
ForwardInfo run_forward(std::span<const Problem> problems, DType dtype, Isa isa, Executor& executor);

// The same for gradients (see cpu::backward on what problems may share).
BackwardInfo run_backward(std::span<const BackwardProblem> problems, DType dtype, Isa isa, Executor& executor);

}  // namespace tessera
