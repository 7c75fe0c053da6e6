// The score of a pair: the one place that knows what an option does to the product of a query and a key,
//
//   score = cap(scale * (q . k)) + slope * |distance| + shift + bias      cap(x) = softcap * tanh(x / softcap), or x
//
// where shift is common to a kept block of a head, and bias belongs to the pair. Kernels take the terms as vectors
// (LaneScores, cpu/modify-inl.h); the fp64 reference, attention_weights, the analysis and the plain low-precision
// implementation of the checks a pair at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "call/problem.h"

namespace tessera {

constexpr int64_t kNoEntry = -1;  // of a call without block_bias

// The terms of one head.
class ScoreTerms {
 public:
  ScoreTerms(const Problem& p, int64_t b, int64_t h)
      : softcap(p.softcap),
        slope(p.alibi ? -static_cast<double>(*p.alibi.at(b, h)) * static_cast<double>(p.row_distance) : 0),
        diagonal(p.diagonal(b)),
        has_slope(p.alibi),
        has_shift(p.block_bias != nullptr),
        has_bias(p.attn_bias != nullptr),
        p_(p),
        block_bias_(b * p.bias_batch + h * p.bias_head),
        attn_bias_(b * p.attn_bias_stride[0] + h * p.attn_bias_stride[1]) {}

  // Is there more to a score than scale * (q . k)?
  static bool any(const Problem& p) { return p.softcap > 0 || p.alibi || p.block_bias || p.attn_bias; }
  // May a score be -inf: a key that is not there?
  static bool may_hide_keys(const Problem& p) { return p.block_bias || p.attn_bias; }

  const double softcap;    // 0: none
  const double slope;      // of the distance in rows
  const int64_t diagonal;  // position of query 0 on the scale where key k is at k
  const bool has_slope, has_shift, has_bias;

  double shift(int64_t entry) const { return has_shift ? p_.block_bias[block_bias_ + entry * p_.bias_entry] : 0; }
  double bias(int64_t q, int64_t k) const {
    return has_bias ? load_as_double(p_.attn_bias, p_.attn_bias_dtype, bias_index(q, k)) : 0;
  }
  // Where the bias of a pair lies, in elements.
  int64_t bias_index(int64_t q, int64_t k) const {
    return attn_bias_ + q * p_.attn_bias_stride[2] + k * p_.attn_bias_stride[3];
  }

 private:
  const Problem& p_;
  const int64_t block_bias_, attn_bias_;  // the head's first elements
};

// The scores of one query row. T is the type they are computed in.
template <class T>
class RowScores {
 public:
  RowScores(const Problem& p, int64_t b, int64_t h, int64_t q)
      : terms_(p, b, h), scale_(static_cast<T>(p.scale)), softcap_(static_cast<T>(p.softcap)), q_(q) {}

  // `dot` is q . k of key k, which lies in the block of pattern entry `entry`. `round` is applied to each
  // intermediate result: the identity, or a rounding to a storage type.
  template <class Round>
  T score(T dot, int64_t entry, int64_t k, Round round) const {
    return of_scaled(round(scale_ * dot), entry, k, round);
  }
  T score(T dot, int64_t entry, int64_t k) const { return score(dot, entry, k, exact); }
  T of_scaled(T s, int64_t entry, int64_t k) const { return of_scaled(s, entry, k, exact); }

  // The softcap's tanh, without one 0; the derivative of the score by the scaled product is 1 - tanh^2.
  T tanh_of_scaled(T s) const { return softcap_ > 0 ? std::tanh(s / softcap_) : T{0}; }

  // Sum of the absolute values of what is added to the score.
  T bias_magnitude(int64_t entry, int64_t k) const {
    return std::abs(number(terms_.shift(entry))) + std::abs(by_distance(k)) + std::abs(number(terms_.bias(q_, k)));
  }

 private:
  static T exact(T x) { return x; }
  // Only -inf itself says that there is no key.
  static T number(double bias) {
    constexpr double lowest = std::numeric_limits<T>::lowest();
    return static_cast<T>(bias < lowest && bias != -std::numeric_limits<double>::infinity() ? lowest : bias);
  }
  T by_distance(int64_t k) const {
    return static_cast<T>(terms_.slope) * static_cast<T>(std::abs(q_ + terms_.diagonal - k));
  }
  template <class Round>
  T of_scaled(T s, int64_t entry, int64_t k, Round round) const {
    if (softcap_ > 0) s = round(softcap_ * tanh_of_scaled(s));
    if (terms_.has_slope) s = round(s + round(by_distance(k)));
    if (terms_.has_shift) s = round(s + number(terms_.shift(entry)));
    if (terms_.has_bias) s = round(s + number(terms_.bias(q_, k)));
    return s;
  }

  const ScoreTerms terms_;
  const T scale_, softcap_;
  const int64_t q_;
};

// What dropout multiplies the weight of a pair with.
inline double keep_factor(const Problem& p, int64_t b, int64_t h, int64_t q, int64_t k) {
  if (p.dropout.p == 0) return 1;
  const uint32_t random = dropout_random(p.dropout, p.dropout_stream(b, h), p.dropout_q(q), p.dropout_k(k));
  return random < drop_threshold(p.dropout.p) ? 0 : 1 / (1 - p.dropout.p);
}

}  // namespace tessera
