// The online softmax of one query row over some of its keys (Milakov & Gimelshein 2018), and how the states of disjoint
// sets of keys become one (as FlashInfer's state.cuh). Kernels run many of them side by side, one a lane
// (cpu/softmax-inl.h); this is what a lane holds at the end. Plain arithmetic without memory of its own, which a
// compiler for devices takes as well.
#pragma once

#include <cmath>
#include <limits>

namespace tessera {

// What weights are powers of: scores in their own units, or in log2 units.
struct PowersOfE {
  static constexpr double kLn = 1, kPerLn = 1;  // ln(base), and its inverse
  template <class T>
  static T exp(T x) {
    return std::exp(x);
  }
  template <class T>
  static T log(T x) {
    return std::log(x);
  }
};
struct PowersOf2 {
  static constexpr double kLn = 0.6931471805599453, kPerLn = 1.4426950408889634;
  template <class T>
  static T exp(T x) {
    return std::exp2(x);
  }
  template <class T>
  static T log(T x) {
    return std::log2(x);
  }
};

// How a row ends: out = factor * (accumulated out), and lse as a natural logarithm.
template <class T>
struct RowEnd {
  T lse = -std::numeric_limits<T>::infinity();
  T factor = 0;
};

template <class T, class Powers>
struct SoftmaxState {
  T reference = -std::numeric_limits<T>::infinity();  // weights are base^(score - reference)
  T sum = 0;                                          // of the weights
  // The sum of the same weights as they met V, rounded to its dtype: normalising by it makes the weights add up to 1 as
  // they were used (a row of one key returns its value exactly).
  T used = 0;

  // The state of a row that has ended: its out is what was accumulated.
  static SoftmaxState ended(T lse) {
    const T sum = lse == -std::numeric_limits<T>::infinity() ? T{0} : T{1};
    return {lse, sum, sum};
  }
  template <class U>
  SoftmaxState<U, Powers> as() const {
    return {static_cast<U>(reference), static_cast<U>(sum), static_cast<U>(used)};
  }
  bool empty() const { return sum == 0; }  // no key so far

  // Raises the reference to `score` if that is higher, or NaN, which stays. Returns what everything accumulated so far
  // must be multiplied by.
  T cover(T score) {
    if (!(score > reference || std::isnan(score))) return 1;
    const T factor = Powers::exp(reference - score);
    reference = score;
    sum *= factor;
    used *= factor;
    return factor;
  }
  // One more key (or sink), whose score is covered; returns its weight.
  T add(T score) {
    const T weight = Powers::exp(score - reference);
    sum += weight;
    used += weight;
    return weight;
  }
  // The state of other keys joins, whose reference is covered. Returns the weight of its accumulated out; an empty one
  // weighs nothing, whatever its out holds.
  T merge(const SoftmaxState& other) {
    if (other.empty()) return 0;
    const T weight = Powers::exp(other.reference - reference);
    sum += weight * other.sum;
    used += weight * other.used;
    return weight;
  }

  // `sink`: a logit that joins the sums of a row that has keys, or nullptr.
  RowEnd<T> finish(const float* sink = nullptr) const {
    if (empty()) return {};
    if (sink == nullptr) {  // the usual way: one logf a row counts where a row has one block
      const double lse = static_cast<double>(reference) + static_cast<double>(Powers::log(sum));
      return {static_cast<T>(lse * Powers::kLn), 1 / used};
    }
    SoftmaxState<double, Powers> all = as<double>();
    const double logit = static_cast<double>(*sink) * Powers::kPerLn;
    const double shrink = all.cover(logit);
    all.add(logit);
    return {static_cast<T>((all.reference + Powers::log(all.sum)) * Powers::kLn), static_cast<T>(shrink / all.used)};
  }
};

}  // namespace tessera
