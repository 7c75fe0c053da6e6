// First-order rounding errors of a kernel that computes in fp32, for the bounds that the fp64 reference gives along
// with its results. u is the unit roundoff of fp32; after Higham, Accuracy and Stability of Numerical Algorithms,
// section 3.1 (sums of n terms in any order: relative error n u). Nothing here is tuned.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "call/problem.h"

namespace tessera {

struct ErrorBound {
  static constexpr double u = 0x1p-24;
  // exp2 as a polynomial in fp32, and the conversion of its argument to base 2.
  static constexpr double kExpRoundings = 4;
  // scale and softcap as fp32 numbers, their products, tanh by way of exp.
  static constexpr double kScoreRoundings = 8;
  // What a kernel may take for zero: some instructions know no subnormal numbers.
  static constexpr double kTiny = std::numeric_limits<float>::min();

  // Absolute error of a score. `magnitude`: |scale| sum |q_i k_i|; `biases`: sum of |bias|. Whatever the error of the
  // product, softcap * tanh of it stays within +-softcap.
  static double score_error(const Problem& p, double magnitude, double score, double biases) {
    const bool capped = p.softcap > 0;
    double product = u * (static_cast<double>(p.head_dim) + kScoreRoundings) * magnitude;
    if (capped) product = std::min(2 * p.softcap, product) + u * kScoreRoundings * p.softcap;
    return product + u * (4 * biases + 2 * std::abs(score));
  }
  // Relative error of exp(score - reference), of an absolute error `error` of the two together.
  static double exp_error(double score, double reference, double error) {
    const double more = u * (2 * std::abs(reference) + 2 * std::abs(score - reference) + kExpRoundings);
    return std::expm1(std::min(error + more, 700.0));
  }
};

// An error as a sum of many small ones. `sum` adds up their bounds: it always holds. `square` adds up the squares: as
// roundings are independent and have mean 0, the error exceeds kDeviations * sqrt(square) with a probability below
// 2 exp(-kDeviations^2 / 2) = 3e-14 (Hoeffding 1963; Higham & Mary, A New Approach to Probabilistic Rounding Error
// Analysis, 2019). Gradients need it: they are small differences of many terms, and n errors of any sign add up to
// sqrt(n), not to n: with 500 keys a bound is 4e-5 of a gradient instead of 1e-2. Equal rows make equal errors: theirs
// are not independent.
struct Error {
  static constexpr double u = ErrorBound::u;
  static constexpr double kDeviations = 8;

  double sum = 0, square = 0;

  // One error of at most x.
  static Error of(double x) { return {std::abs(x), x * x}; }
  // n roundings of numbers of this magnitude.
  static Error roundings(double n, double magnitude) {
    return {n * u * std::abs(magnitude), n * u * u * magnitude * magnitude};
  }
  // n terms x added up in any order that has nothing to do with their signs: E partial sum^2 <= total^2 + sum x^2.
  static Error summation(double n, double total, double magnitude, double squares) {
    return {n * u * magnitude, n * u * u * (total * total + squares)};
  }
  // What x loses when it is stored in 16 bits before the next product; fp16 is subnormal below 2^-14.
  static Error storage(DType dtype, double x) {
    if (dtype == DType::bf16) return of(epsilon_of(dtype) / 2 * std::abs(x));
    if (dtype == DType::f16) return of(epsilon_of(dtype) / 2 * std::abs(x) + 0x1p-25);
    return {};
  }

  Error& operator+=(const Error& e) {
    sum += e.sum;
    square += e.square;
    return *this;
  }
  friend Error operator+(Error a, const Error& b) { return a += b; }
  Error times(double c) const { return {sum * std::abs(c), square * c * c}; }
  // Where the error is known to be at most x.
  Error limited(double x) const { return bound() <= x ? *this : of(x); }
  double bound() const { return std::min(sum, kDeviations * std::sqrt(square)); }
  // Of exp(x) - 1, where this is the error of x.
  Error grown() const {
    const double b = std::min(bound(), 700.0);
    return b > 0 ? times(std::expm1(b) / b) : *this;
  }
};

}  // namespace tessera
