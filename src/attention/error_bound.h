// First-order rounding errors of a kernel that computes in fp32, for the bounds that the fp64 reference gives along
// with its results. u is the unit roundoff of fp32; after Higham, Accuracy and Stability of Numerical Algorithms,
// section 3.1 (sums of n terms in any order: relative error n u). Nothing here is tuned.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/problem.h"

namespace tessera {

struct ErrorBound {
  static constexpr double u = 0x1p-24;
  // exp2 as a polynomial in fp32, and the conversion of its argument to base 2.
  static constexpr double kExpRoundings = 4;
  // scale and softcap as fp32 numbers, their products, tanh by way of exp.
  static constexpr double kScoreRoundings = 8;
  // What a kernel may take for zero: some instructions know no subnormal numbers.
  static constexpr double kTiny = std::numeric_limits<float>::min();

  // Absolute error of a score. `magnitude`: |scale| sum |q_i k_i|; `biases`: sum of |bias|.
  static double score_error(const Problem& p, double magnitude, double score, double biases) {
    const double capped = p.softcap > 0 ? p.softcap : 0;
    return u * ((static_cast<double>(p.head_dim) + kScoreRoundings) * magnitude + kScoreRoundings * capped +
                4 * biases + 2 * std::abs(score));
  }
  // Relative error of exp(score - reference), of an absolute error `error` of the two together.
  static double exp_error(double score, double reference, double error) {
    const double more = u * (2 * std::abs(reference) + 2 * std::abs(score - reference) + kExpRoundings);
    return std::expm1(std::min(error + more, 700.0));
  }
  // What `value` loses when it is stored in 16 bits before the next product; fp16 is subnormal below 2^-14.
  static double storage_error(DType dtype, double value) {
    if (dtype == DType::bf16) return epsilon_of(dtype) * std::abs(value);
    if (dtype == DType::f16) return epsilon_of(dtype) * std::abs(value) + 0x1p-25;
    return 0;
  }
};

}  // namespace tessera
