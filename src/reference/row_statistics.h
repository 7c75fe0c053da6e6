// lse and delta of query rows, before gradients are.
#pragma once

#include <vector>

#include "reference/pair_gradients.h"

namespace tessera {

// From out and lse of `given`, in their dtypes; the rest of it is the problem's own.
RowStatistics row_statistics(const BackwardProblem& problem, const Problem& given, Executor& executor);

// The errors that forward() makes in lse and, by way of out, in delta. `exact`: out and lse in fp64; the bounds are
// those of reference_attention.
void add_row_errors(const BackwardProblem& problem, const Problem& exact, const std::vector<float>& out_bound,
                    const std::vector<float>& lse_bound, Executor& executor, RowStatistics& rows);

// The same where nothing is known of out and lse but bounds on their errors: of a softmax over more keys than the
// problem's.
void set_row_errors(const BackwardProblem& problem, const Problem& exact, const float* out_bound,
                    const float* lse_bound, Executor& executor, RowStatistics& rows);

}  // namespace tessera
