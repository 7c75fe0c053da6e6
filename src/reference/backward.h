// The fp64 oracle of gradients.
#pragma once

#include <span>

#include "call/backward_problem.h"

namespace tessera {

// out and lse of the problem are not used: they are recomputed in fp64. gradient_dtype and dattn_bias_dtype may be f64
// whatever the inputs are. `bounds`: dq, dk, dv contiguous as [B, S, heads, dim], the others contiguous in the sizes of
// the biases; those of fp64 gradients leave out the last rounding, to the dtype of the gradient.
void reference_gradients(const BackwardProblem& problem, Executor& executor, const GradientBounds& bounds = {});

// The same of a part of a joined softmax: out and lse of `given` (the problem's, fp64) are those of the whole, their
// errors at most out_error [B, Sq, H, Dv] and lse_error [B, H, Sq]; both nullptr: no bounds. The problem has no biases
// or sinks that want a gradient.
void reference_part_gradients(const BackwardProblem& problem, const Problem& given, Executor& executor,
                              const float* out_error, const float* lse_error, const GradientBounds& bounds);

// What backward() is for fp64: out and lse are used as given. dblock_bias, dattn_bias and dsinks are the sums over the
// problems where several write to one place.
void fp64_backward(std::span<const BackwardProblem> problems, Executor& executor);

}  // namespace tessera
