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
  double keep = 1;               // factor of dropout on what is not dropped

  Truth() = default;
  Truth(const Problem& problem, Executor& executor);
  // fp32: the derived bound. bf16, fp16: FlashAttention's rule, see tessera/check.h.
  double out_tolerance(DType dtype, size_t i) const;
};

// Of each problem of the case.
std::vector<Truth> truths_of(const Case& test, Executor& executor);

// What a case's gradients should be, all packed sequences together, and how far a kernel may be from them.
struct GradientTruth {
  struct Values {
    std::vector<double> value;  // of the sizes of the case's gradient, contiguous; empty: not wanted
    std::vector<float> bound;   // on rounding errors; if `plain`, those of fp32 arithmetic alone
    std::vector<char> touched;  // [value.size() / inner] some pair of weight above 0 has a part in it; else exactly 0
    int64_t inner = 1;          // elements that are touched together: a row of dq, dk or dv
    bool plain = false;         // FlashAttention's rule holds: the error may be 2 * plain_error + bound
    double plain_error = 0;     // if `plain`: largest error of the plain implementation in the dtype of the inputs
  };
  std::array<Values, kGradients> values;

  // With `by_bound` no gradient is judged by FlashAttention's rule: all have bounds of arithmetic in their own dtype.
  GradientTruth(const Case& test, Executor& executor, bool by_bound = false);
};

// Those of a dilated case: what is touched, values and bounds of the gradients that the bound alone judges (`bounded`),
// of those that FlashAttention's rule judges (`plain`), and of the latter also what a plain implementation gives.
void dilated_gradient_truth(const Case& test, Executor& executor, bool bounded, bool plain, GradientTruth& truth,
                            std::array<std::vector<double>, kGradients>& plain_values);

struct Verdict {
  double worst = 0;     // largest error as a fraction of its tolerance
  std::string problem;  // the first one; empty: none

  // A mistake that is not a matter of tolerance.
  void complain(std::string what);
};

// |got - expected| / tolerance; above 1 is wrong. Where the expectation is not finite: 0 or infinity.
double error_fraction(double got, double expected, double tolerance);

// Over the elements where it is finite.
double largest_error(const std::vector<double>& plain, const std::vector<double>& exact);

// A maximum over fewer elements is a matter of luck: there FlashAttention's rule could fail a right result (or the
// plain implementation happen to be exact), and the derived bound holds instead.
constexpr size_t kFewElements = 4096;

// Holds out and lse, as the last run left them, against the truth.
void compare(const Problem& problem, const Truth& truth, Verdict& verdict);

// Runs a case on one ISA and judges everything about it: the ISA that ran, the result, the memory around it.
Verdict judge(Case& test, const std::vector<Truth>& truths, Isa isa, Executor& executor);

// The same of its gradients, from the out and lse that the last run left.
Verdict judge_backward(Case& test, const GradientTruth& truth, Isa isa, Executor& executor);

}  // namespace tessera::check
