// Gradients of one (query, key) pair in fp64, and bounds on the error of a kernel that computes them in fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "call/backward_problem.h"
#include "call/pair_mask.h"
#include "call/rows.h"
#include "call/scores.h"
#include "reference/error_bound.h"

namespace tessera {

// lse and delta = rowsum(dout * out) - dlse of each query row, [B, H, Sq]; errors are those that forward() and the
// kernel make there.
struct RowStatistics {
  std::vector<double> lse, delta;
  bool with_errors = false;                   // somebody wants bounds
  std::vector<Error> lse_error, delta_error;  // empty if not
};

struct PairGradient {
  int64_t q = 0, k = 0;           // tokens
  int64_t row = 0;                // of RowStatistics
  const double* query = nullptr;  // [D]
  const double* key = nullptr;    // [D]
  const double* value = nullptr;  // [Dv]
  const double* dout = nullptr;   // [Dv]
  double weight = 0;              // exp(score - lse)
  double kept = 0;                // weight after dropout: what meets V
  double centered = 0;            // gradient of the weight - delta
  double dscore = 0;              // gradient of the score: of all that is added to scale * q . k
  double ddot = 0;                // gradient of q . k: dscore through softcap, times scale
  double slope = 1;               // ddot / dscore
  // 0 where nobody wants bounds. What lse and delta of the row add comes on top, as it is common to all its keys: times
  // -dscore and -weight, for ddot that by slope, for kept -kept (first order).
  Error weight_error, kept_error, dscore_error, ddot_error;
};

// Visits the pairs of block pairs; a state of one thread.
class PairGradients {
 public:
  PairGradients(const BackwardProblem& problem, const RowStatistics& rows)
      : g_(problem), p_(problem.forward), rows_(rows), with_bounds_(rows.with_errors) {
    const PatternShape& s = p_.pattern.shape;
    query_.resize(s.block_q * p_.head_dim);
    dout_.resize(s.block_q * p_.head_dim_v);
    key_.resize(s.block_k * p_.head_dim);
    value_.resize(s.block_k * p_.head_dim_v);
  }

  // Calls visit(pair) for the pairs of pattern entry `entry`, in block row i of (b, h), that take part: admitted, not
  // biased by -inf, and of a row that has an lse. No other rows are read.
  template <class Visit>
  void visit(int64_t b, int64_t h, int64_t i, int64_t entry, Visit visit) {
    const PatternShape& s = p_.pattern.shape;
    const int64_t begin = s.query_begin(i), end = s.query_end(i);
    const int64_t column = p_.pattern.indices[entry], kv_head = h / p_.group();
    const int64_t element = static_cast<int64_t>(size_of(p_.dtype));
    const PairMask mask(p_, b);
    key_loaded_.assign(s.block_k, 0);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t row = (b * p_.heads + h) * p_.seqlen_q + q;
      if (rows_.lse[row] == -std::numeric_limits<double>::infinity()) continue;
      const RowScores<double> scores(p_, b, h, q);
      double* query = &query_[(q - begin) * p_.head_dim];
      double* dout = &dout_[(q - begin) * p_.head_dim_v];
      bool loaded = false;
      mask.for_each_key(entry, q, [&](int64_t k) {
        if (!loaded) {
          load_row(p_.q.at(b, q, h, element), p_.dtype, p_.head_dim, query);
          load_row(g_.dout.at(b, q, h, element), p_.dtype, p_.head_dim_v, dout);
          loaded = true;
        }
        const int64_t slot = k - column * s.block_k;
        double* key = &key_[slot * p_.head_dim];
        double* value = &value_[slot * p_.head_dim_v];
        if (!key_loaded_[slot]) {
          load_row(p_.k_block(b, column, kv_head) + slot * element * p_.k.seq, p_.dtype, p_.head_dim, key);
          load_row(p_.v_block(b, column, kv_head) + slot * element * p_.v.seq, p_.dtype, p_.head_dim_v, value);
          key_loaded_[slot] = 1;
        }
        PairGradient pair{q, k, row, query, key, value, dout};
        if (differentiate(scores, entry, keep_factor(p_, b, h, q, k), pair)) visit(pair);
      });
    }
  }

 private:
  struct Dot {
    double sum = 0;
    Error error;
  };
  Dot dot(const double* a, const double* b, int64_t n) const {
    Dot d;
    for (int64_t i = 0; i < n; ++i) d.sum += a[i] * b[i];
    if (!with_bounds_) return d;
    double magnitude = 0, squares = 0, flushed = 0;  // flushed: where factors below kTiny count as 0
    for (int64_t i = 0; i < n; ++i) {
      const double x = std::abs(a[i] * b[i]);
      magnitude += x;
      squares += x * x;
      flushed += std::abs(a[i]) + std::abs(b[i]) + 1;
    }
    // Two roundings more: of a factor that carries the scale.
    d.error = Error::summation(static_cast<double>(n + 2), d.sum, magnitude, squares) +
              Error::of(flushed * ErrorBound::kTiny);
    return d;
  }

  // False: a bias of -inf, a key that is not there.
  bool differentiate(const RowScores<double>& scores, int64_t entry, double keep, PairGradient& pair) const {
    const Dot qk = dot(pair.query, pair.key, p_.head_dim);
    const double scaled = p_.scale * qk.sum, score = scores.of_scaled(scaled, entry, pair.k);
    if (score == -std::numeric_limits<double>::infinity()) return false;
    const Dot dout_v = dot(pair.dout, pair.value, p_.head_dim_v);
    const double lse = rows_.lse[pair.row], tanh = scores.tanh_of_scaled(scaled), through = 1 - tanh * tanh;
    pair.weight = std::exp(score - lse);
    pair.kept = pair.weight * keep;
    pair.centered = keep * dout_v.sum - rows_.delta[pair.row];
    pair.dscore = pair.weight * pair.centered;
    pair.slope = p_.scale * through;
    pair.ddot = pair.slope * pair.dscore;
    if (!with_bounds_) return true;

    constexpr double kScore = ErrorBound::kScoreRoundings;
    const Error scaled_error = qk.error.times(p_.scale) + Error::roundings(kScore, scaled);
    // softcap * tanh stays within +-softcap, whatever the error of the product.
    const Error capped_error = p_.softcap > 0 ? scaled_error.limited(2 * p_.softcap) : scaled_error;
    Error exponent = capped_error + Error::roundings(4, scores.bias_magnitude(entry, pair.k)) +
                     Error::roundings(2, score) + Error::roundings(2, lse) + Error::roundings(2, score - lse) +
                     Error::roundings(ErrorBound::kExpRoundings, 1);
    if (p_.softcap > 0) exponent += Error::roundings(kScore, p_.softcap);
    pair.weight_error = exponent.grown().times(pair.weight) + Error::of(ErrorBound::kTiny);
    pair.kept_error =
        pair.weight_error.times(keep) + Error::roundings(2, pair.kept) + Error::storage(p_.dtype, pair.kept);
    // dP - delta cancels: what counts is the size of the two, not of their difference.
    const Error centered_error =
        dout_v.error.times(keep) + Error::roundings(2, keep * dout_v.sum) + Error::roundings(1, pair.centered);
    const double weight_bound = pair.weight_error.bound();
    pair.dscore_error = pair.weight_error.times(pair.centered) + centered_error.times(pair.weight + weight_bound) +
                        rows_.delta_error[pair.row].times(weight_bound) + Error::roundings(1, pair.dscore) +
                        Error::of(ErrorBound::kTiny) + Error::storage(p_.dtype, pair.dscore);
    Error through_error;
    if (p_.softcap > 0) {
      const Error tanh_error = scaled_error.times(through / p_.softcap).limited(2) + Error::roundings(kScore, 1);
      through_error = tanh_error.times(2 * std::abs(tanh) + tanh_error.bound()).limited(1) + Error::roundings(2, 1);
    }
    pair.ddot_error =
        (pair.dscore_error.times(through) + through_error.times(std::abs(pair.dscore) + pair.dscore_error.bound()) +
         Error::storage(p_.dtype, pair.dscore * through))
            .times(p_.scale) +
        Error::roundings(4, pair.ddot);
    return true;
  }

  const BackwardProblem& g_;
  const Problem& p_;
  const RowStatistics& rows_;
  const bool with_bounds_;
  std::vector<double> query_, dout_, key_, value_;  // [block, D or Dv]
  std::vector<char> key_loaded_;                    // rows of key_ and value_ that hold the current block's
};

}  // namespace tessera
