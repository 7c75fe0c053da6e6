// The score of a pair and the pairs of a row, written once for the fp64 reference, attention_weights and the plain
// low-precision implementation of the checks. T is the type it is computed in.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "call/problem.h"

namespace tessera {

// What turns the dot products of one query row into scores.
template <class T>
class RowScores {
 public:
  RowScores(const Problem& p, int64_t b, int64_t h, int64_t q)
      : p_(p),
        scale_(static_cast<T>(p.scale)),
        softcap_(static_cast<T>(p.softcap)),
        slope_(p.alibi ? static_cast<T>(p.alibi[b * p.alibi_batch + h * p.alibi_head]) : T{0}),
        position_(q + p.diagonal(b)),
        block_bias_(p.block_bias ? p.block_bias + b * p.bias_batch + h * p.bias_head : nullptr),
        attn_bias_(b * p.attn_bias_stride[0] + h * p.attn_bias_stride[1] + q * p.attn_bias_stride[2]) {}

  // `dot` is q . k of key k, which lies in the block of pattern entry `entry`. `round` is applied to each
  // intermediate result: the identity, or a rounding to a storage type.
  template <class Round>
  T score(T dot, int64_t entry, int64_t k, Round round) const {
    T s = round(scale_ * dot);
    if (softcap_ > 0) s = round(softcap_ * std::tanh(s / softcap_));
    if (p_.alibi) s = round(s - round(slope_ * static_cast<T>(distance(k))));
    if (block_bias_) s = round(s + static_cast<T>(block_bias_[entry * p_.bias_entry]));
    if (p_.attn_bias) s = round(s + attn_bias(k));
    return s;
  }
  T score(T dot, int64_t entry, int64_t k) const {
    return score(dot, entry, k, [](T x) { return x; });
  }

  int64_t distance(int64_t k) const { return std::abs(position_ - k); }
  // Sum of the absolute values of what is added to the score.
  T bias_magnitude(int64_t entry, int64_t k) const {
    T sum = 0;
    if (p_.alibi) sum += std::abs(slope_ * static_cast<T>(distance(k)));
    if (block_bias_) sum += std::abs(static_cast<T>(block_bias_[entry * p_.bias_entry]));
    if (p_.attn_bias) sum += std::abs(attn_bias(k));
    return sum;
  }

 private:
  T attn_bias(int64_t k) const {
    const double bias = load_as_double(p_.attn_bias, p_.attn_bias_dtype, attn_bias_ + k * p_.attn_bias_stride[3]);
    constexpr double lowest = std::numeric_limits<T>::lowest();  // only -inf itself says that there is no key
    return static_cast<T>(bias < lowest && bias != -std::numeric_limits<double>::infinity() ? lowest : bias);
  }

  const Problem& p_;
  T scale_, softcap_, slope_;
  int64_t position_;  // of the query, on the scale where key k is at k
  const float* block_bias_;
  int64_t attn_bias_;
};

// Calls visit(k), in ascending order, for the keys of pattern entry `entry` that query q admits. All masks meet here:
// bitmap, causality, window, key length, ragged ends.
template <class Visit>
void for_each_admitted_key(const Problem& p, const MaskGeometry& mask, int64_t q, int64_t entry, Visit visit) {
  const PatternShape& s = p.pattern.shape;
  const int64_t block_begin = static_cast<int64_t>(p.pattern.indices[entry]) * s.block_k;
  Interval keys = mask.keys_of(q, p.seqlen_k);
  keys.begin = std::max(keys.begin, block_begin);
  keys.end = std::min(keys.end, block_begin + s.block_k);
  const uint64_t* bits = p.pattern.bitmap_row(entry, q);
  for (int64_t k = keys.begin; k < keys.end; ++k) {
    const int64_t i = k - block_begin;
    if (bits == nullptr || (bits[i / 64] >> (i % 64) & 1)) visit(k);
  }
}

// n elements of a row as T.
template <class T>
void load_row(const char* row, DType dtype, int64_t n, T* to) {
  const auto copy = [&](const auto* from, auto convert) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(convert(from[i]));
  };
  switch (dtype) {
    case DType::f64: copy(reinterpret_cast<const double*>(row), [](double x) { return x; }); break;
    case DType::f32: copy(reinterpret_cast<const float*>(row), [](float x) { return x; }); break;
    case DType::bf16: copy(reinterpret_cast<const bfloat16*>(row), [](bfloat16 x) { return to_float(x); }); break;
    case DType::f16: copy(reinterpret_cast<const float16*>(row), [](float16 x) { return to_float(x); }); break;
    default: break;
  }
}

}  // namespace tessera
