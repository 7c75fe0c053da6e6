// Whether the result of a kernel is right.
#pragma once

#include <string>
#include <vector>

#include "check/cases.h"

namespace tessera::check {

// What one problem of a case should give, and how far a kernel may be from it.
struct Truth {
  std::vector<double> out;       // [B, Sq, H, Dv]
  std::vector<double> lse;       // [B, H, Sq]
  std::vector<float> out_bound;  // like out
  std::vector<float> lse_bound;  // like lse
  double plain_error = 0;        // largest error of the plain implementation in the dtype of the inputs

  Truth(const Problem& problem, Executor& executor);
  // fp32: the derived bound. bf16, fp16: FlashAttention's rule, see tessera/check.h.
  double out_tolerance(DType dtype, size_t i) const;
};

struct Verdict {
  double worst = 0;     // largest error as a fraction of its tolerance
  std::string problem;  // the first one; empty: none
};

// Holds out and lse, as the last run left them, against the truth.
void compare(const Problem& problem, const Truth& truth, Verdict& verdict);

// Runs a case on one ISA and judges everything about it: the ISA that ran, the result, the memory around it.
Verdict judge(Case& test, const std::vector<Truth>& truths, Isa isa, Executor& executor);

}  // namespace tessera::check
