// How a row of attention ends: from the softmax state to lse and to the factor that normalises out.
#pragma once

#include <cmath>
#include <limits>

#include "call/problem.h"

namespace tessera::cpu {

struct RowEnd {
  float lse = 0;
  float factor = 0;  // out = factor * accumulated out
};

// reference in log2 units; sum of 2^(score - reference) over the keys of the row; `used`, the sum of the same weights
// after rounding to the dtype in which they met V: normalising by it makes the weights sum to 1 as used (a row of one
// key returns its value exactly). A row without keys: -inf and 0, the sink notwithstanding.
inline RowEnd EndOfRow(const Problem& p, int64_t h, float reference, float sum, float used) {
  if (sum == 0.0f) return {-std::numeric_limits<float>::infinity(), 0.0f};
  if (p.sinks == nullptr) {  // the usual way: one logf a row counts where a row has one block
    return {static_cast<float>((static_cast<double>(reference) + std::log2(sum)) * 0.6931471805599453), 1.0f / used};
  }
  const double sink = static_cast<double>(p.sinks[h * p.sinks_head]) * 1.4426950408889634;
  const double top = sink > reference ? sink : reference;
  const double shrink = std::exp2(reference - top), weight = std::exp2(sink - top);
  const double denominator = sum * shrink + weight, normaliser = used * shrink + weight;
  return {static_cast<float>((top + std::log2(denominator)) * 0.6931471805599453),
          static_cast<float>(shrink / normaliser)};
}

inline void StoreLse(const Problem& p, int64_t b, int64_t h, int64_t q, float lse) {
  if (p.lse == nullptr) return;
  reinterpret_cast<float*>(p.lse)[b * p.lse_batch + h * p.lse_head + q * p.lse_seq] = lse;
}

}  // namespace tessera::cpu
